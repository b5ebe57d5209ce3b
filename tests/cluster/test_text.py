"""Text assembly: what is shown when, and where it ends."""

import pytest

from outrider.cluster.text import TextAssembler
from outrider.workers.sequences.origin import Origin
from support.char_admission import CharDecoder


def shown(stop: tuple[str, ...], text: str) -> tuple[list[str], bool]:
    """What is shown after each character, then at the end; and whether a stop string was seen."""
    assembler = TextAssembler(CharDecoder(), stop)
    steps = []
    for char in text:
        if assembler.stopped:
            break
        steps.append("".join(segment.text for segment in assembler.add(ord(char), Origin.DRAFT)))
    steps.append("".join(segment.text for segment in assembler.finish()))
    return steps, assembler.stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert shown((), "abc") == (["a", "b", "c", ""], False)


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    # "ab" could become "abc"; with x it cannot, with c it is.
    assert shown(("abc",), "abx") == (["", "", "abx", ""], False)
    assert shown(("abc",), "xabc") == (["x", "", "", "", ""], True)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    assert shown(("abc",), "xab") == (["x", "", "", "ab"], False)


def test_a_held_beginning_may_start_again_inside_itself() -> None:
    # "aab": after "aaa" the first a is free, the last two may still begin the stop string.
    assert shown(("aab",), "aaab") == (["", "", "a", "", ""], True)


@pytest.mark.parametrize("stop", [("bc", "abcd"), ("abcd", "bc")])
def test_the_stop_string_that_is_complete_first_ends_the_text(stop: tuple[str, ...]) -> None:
    steps, stopped = shown(stop, "abcd")
    assert ("".join(steps), stopped) == ("a", True)


def test_held_text_keeps_its_origin() -> None:
    assembler = TextAssembler(CharDecoder(), ("xyz",))
    assert assembler.add(ord("x"), Origin.DRAFT) == []
    segments = assembler.add(ord("a"), Origin.TARGET)
    assert [(segment.text, segment.origin) for segment in segments] == [
        ("x", Origin.DRAFT),
        ("a", Origin.TARGET),
    ]


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(1, ""), (2, "abx"), (4, "abx"), (5, "abxabx"), (6, "abxabx")]
)
def test_a_stop_string_within_the_least_length_means_nothing(min_tokens: int, text: str) -> None:
    """As with vLLM: one that begins within it and is complete behind it ends the text where it begins."""
    assembler, said = TextAssembler(CharDecoder(), ("ab",), min_tokens), ""
    for char in "abxabx":
        if not assembler.stopped:
            said += "".join(segment.text for segment in assembler.add(ord(char), Origin.TARGET))
    said += "".join(segment.text for segment in assembler.finish())
    assert (said, assembler.stopped) == (text, text != "abxabx")
