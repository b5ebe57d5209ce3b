"""Loops and near-duplicates are found; what merely resembles them is not."""

import numpy as np
import pytest

from outrider.workers.training.filters import NearDuplicates, degeneration


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 5000, count).tolist()


@pytest.mark.parametrize("period", [1, 3, 12, 48])
def test_a_loop_is_found_wherever_it_stands(period: int) -> None:
    loop = (tokens(period, 1) * 48)[: max(48, 4 * period)]
    assert degeneration(tokens(300) + loop + tokens(300, 2)) == f"loop of {period} tokens"
    assert degeneration(tokens(300) + loop[:-1] + tokens(300, 2)) == ""


def test_a_loop_that_changes_a_word_each_time_is_found() -> None:
    sentence = tokens(20)
    text = [token for number in range(12) for token in [*sentence, 6000 + number]]
    assert degeneration(text) == "few distinct 4-grams"


def test_a_text_that_says_something_twice_and_a_short_one_are_no_loops() -> None:
    assert degeneration(tokens(60) * 2) == ""
    assert degeneration([7] * 40) == ""
    assert degeneration([]) == ""


def test_a_text_with_a_few_other_words_is_a_near_duplicate() -> None:
    seen = NearDuplicates(0.8)
    texts = [tokens(200, seed) for seed in range(50)]
    assert [seen.add(str(number), text) for number, text in enumerate(texts)] == [""] * 50
    changed = list(texts[17])
    changed[100] = 6000
    assert seen.add("changed", changed) == "17"
    # Half of its words are another text's.
    assert seen.add("half", texts[3][:100] + tokens(100, 99)) == ""


def test_short_texts_are_the_same_or_not() -> None:
    seen = NearDuplicates(0.8)
    assert [seen.add(str(number), text) for number, text in enumerate([[1], [1, 2], [1, 2], []])] == [
        "",
        "",
        "1",
        "",
    ]
