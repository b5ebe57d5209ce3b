"""Stop strings against the definition: search everything, every time."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.cluster.stop_strings import StopStrings

FEW = st.text("ab", min_size=1, max_size=5)


@given(st.lists(FEW, max_size=6), st.lists(st.text("abc", max_size=4), max_size=12))
def test_finds_what_a_search_of_the_whole_text_finds(strings: list[str], pieces: list[str]) -> None:
    automaton, text = StopStrings(strings), ""
    for piece in pieces:
        before, text = text, text + piece
        found = automaton.find(piece)
        begins = [text.find(string) for string in strings if string in text]
        assert found == (min(begins) - len(before) if begins else None)
        if begins:
            return
        doubtful = [n for s in strings for n in range(1, len(s)) if text.endswith(s[:n])]
        assert automaton.num_doubtful == max(doubtful, default=0)


def test_many_strings_that_nearly_match_are_one_state_per_character() -> None:
    automaton = StopStrings(["a" * 30 + chr(i) for i in range(1000, 1300)])
    assert automaton.find("a" * 10_000) is None
    assert automaton.num_doubtful == 30
    assert automaton.find("a" + chr(1299)) == -29
