"""What excuses a difference, and what does not."""

from dataclasses import replace

import pytest
import torch

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.sequences.params import SamplingParams
from support.equality import TOLERANCE, Case, Reference, assert_same_tokens, score_gaps
from support.tiny import GREEDY, tiny_cases

ROW = torch.tensor([1.0, 3.0, 3.0 - TOLERANCE / 2, 2.0, -1.0])


def gaps(sampling: SamplingParams, *candidates: int, row: torch.Tensor = ROW) -> list[float]:
    return score_gaps(row, Case("", (0,), sampling), (), candidates)


def test_equal_texts_pass_and_count_nothing(reference: Reference) -> None:
    ties: list[Mismatch] = []
    case = tiny_cases()[0]
    assert_same_tokens(reference, case, reference.text(case), reference.text(case), ties, "")
    assert not ties


@pytest.mark.parametrize("index", [0, 7, 19])
def test_a_wrong_token_fails(reference: Reference, index: int) -> None:
    case = tiny_cases()[1]
    right = list(reference.text(case))
    wrong = [*right[:index], (right[index] + 1) % 320, *right[index + 1 :]]
    with pytest.raises(
        AssertionError, match=f"a wrong one, prompt 1, seed 1, output token {index}: expected"
    ):
        assert_same_tokens(reference, case, right, wrong, [], "a wrong one")


def test_a_wrong_token_fails_at_a_temperature(reference: Reference) -> None:
    case = tiny_cases(sampling=SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8))[1]
    right = list(reference.text(case))
    with pytest.raises(AssertionError, match="output token 3"):
        assert_same_tokens(reference, case, right, [*right[:3], (right[3] + 1) % 320], [], "")


def test_a_text_that_ends_early_fails(reference: Reference) -> None:
    case = tiny_cases()[1]
    right = reference.text(case)
    with pytest.raises(AssertionError, match="one text ends"):
        assert_same_tokens(reference, case, right, right[:-1], [], "")


def test_a_tie_passes_is_counted_and_ends_the_comparison() -> None:
    class TwoEqual:
        def logits(self, context: tuple[int, ...]) -> torch.Tensor:
            assert context == (7, 8, 0)
            return ROW

    ties: list[Mismatch] = []
    case = Case("a prompt", (7, 8), GREEDY)
    assert_same_tokens(TwoEqual(), case, (0, 1, 4), (0, 2, 3), ties, "some way")  # type: ignore[arg-type]
    (tie,) = ties
    assert (tie.prompt_id, tie.index, tie.plain_token, tie.speculative_token) == (
        "some way, a prompt",
        1,
        1,
        2,
    )
    assert tie.plain_gap == 0.0
    assert 0.0 < tie.speculative_gap < TOLERANCE


def test_gaps_are_those_of_the_processed_law() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert gaps(greedy, 1, 3) == pytest.approx([0.0, 1.0])
    # 3.0 / 1.5 for a token of the prompt that has logit 3; the next best is 3 - tolerance / 2.
    halved = replace(greedy, repetition_penalty=1.5)
    assert score_gaps(ROW, Case("", (1,), halved), (), (1, 2)) == pytest.approx([1.0, 0.0], abs=1e-4)
    present = replace(greedy, presence_penalty=0.5, frequency_penalty=0.25)
    assert score_gaps(ROW, Case("", (0,), present), (1, 1), (1, 2)) == pytest.approx([1.0, 0.0], abs=1e-4)
    assert gaps(replace(greedy, logit_bias=((0, 5.0),)), 0, 1) == pytest.approx([0.0, 3.0])


def test_a_removed_token_is_no_candidate_but_one_at_the_edge_is() -> None:
    hot = SamplingParams(temperature=1.0, seed=1)
    infinite = float("inf")
    assert gaps(replace(hot, top_k=1), 1)[0] <= 0.0
    assert gaps(replace(hot, top_k=1), 2)[0] < infinite  # it ties with the first
    assert gaps(replace(hot, top_k=1), 3) == [infinite]
    assert gaps(replace(hot, top_k=2), 3) == [infinite]
    assert gaps(replace(hot, top_p=0.5), 3) == [infinite]
    assert gaps(replace(hot, min_p=0.5), 3) == [infinite]
    edge = torch.exp(ROW[3] - ROW[1]).item()
    assert gaps(replace(hot, min_p=edge * (1 + TOLERANCE / 2)), 3)[0] < infinite
    mass = ROW.softmax(0)
    before = (mass[1] + mass[2]).item()
    assert gaps(replace(hot, top_p=before - TOLERANCE / 2), 3)[0] < infinite
    assert gaps(replace(hot, top_p=before - 2 * TOLERANCE), 3) == [infinite]
