import math
from dataclasses import replace

import pytest

from outrider.cluster.bench.identity import check_identity
from outrider.cluster.bench.runner import EncodedPrompt
from outrider.workers.sequences.params import SamplingParams
from support.fake_answerer import FakeAnswerer

PROMPTS = [EncodedPrompt(f"p{index}", "qa", (index, index + 3)) for index in range(4)]
GREEDY = [SamplingParams(temperature=0.0, max_tokens=12)]
SAMPLED = [SamplingParams(temperature=0.8, max_tokens=12, seed=seed) for seed in range(3)]
BOTH = pytest.mark.parametrize("samplings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@BOTH
def test_an_honest_engine_holds_without_any_excuse(samplings: list[SamplingParams]) -> None:
    result = check_identity(FakeAnswerer(), PROMPTS, samplings, tolerance=1e-4)
    assert result.holds
    assert result.mismatches == ()
    assert result.num_texts == 4 * len(samplings)
    assert result.num_tokens == 12 * result.num_texts
    assert (result.num_drafted, result.num_accepted) == (2 * result.num_tokens, result.num_tokens)


@BOTH
@pytest.mark.parametrize("lie_at", [0, 7, 11])
def test_an_engine_that_lies_is_caught_at_the_place(samplings: list[SamplingParams], lie_at: int) -> None:
    result = check_identity(FakeAnswerer(lie_at=lie_at), PROMPTS, samplings, tolerance=1e-4)
    assert not result.holds
    assert len(result.mismatches) == result.num_texts
    for mismatch in result.mismatches:
        assert mismatch.index == lie_at
        assert mismatch.plain_gap == pytest.approx(0.0, abs=1e-6)
        assert mismatch.speculative_gap > 1e-4
        assert not mismatch.is_tie


def test_ties_that_rounding_swaps_are_counted_and_excused() -> None:
    engine = FakeAnswerer(num_repeats=2, rounding=1e-6)
    result = check_identity(engine, PROMPTS, GREEDY, tolerance=1e-4)
    assert result.mismatches  # the fake makes them on purpose
    assert result.holds
    for mismatch in result.mismatches:
        assert max(mismatch.plain_gap, mismatch.speculative_gap) <= 1e-5


def test_the_same_swap_is_no_tie_for_a_narrower_tolerance() -> None:
    engine = FakeAnswerer(num_repeats=2, rounding=1e-6)
    engine_that_rounds_coarsely = FakeAnswerer(num_repeats=1, rounding=3.0)
    assert check_identity(engine, PROMPTS, GREEDY, tolerance=1e-4).holds
    assert not check_identity(engine_that_rounds_coarsely, PROMPTS, GREEDY, tolerance=1e-4).holds


def test_noise_is_part_of_the_score() -> None:
    """Under sampling the winner is rarely the likeliest token; log p alone would call it a lie."""
    engine = FakeAnswerer(rounding=0.02)
    seeds = [SamplingParams(temperature=0.8, max_tokens=40, seed=seed) for seed in range(20)]
    result = check_identity(engine, PROMPTS, seeds, tolerance=0.04)
    assert result.mismatches
    assert result.holds


def test_a_text_that_only_ends_early_is_no_tie() -> None:
    result = check_identity(FakeAnswerer(ends_early=True), PROMPTS, GREEDY, tolerance=1e9)
    assert not result.holds
    assert all(mismatch.index == 11 for mismatch in result.mismatches)


def test_a_difference_that_cannot_be_recomputed_is_no_tie() -> None:
    result = check_identity(FakeAnswerer(lie_at=2, knows_logprobs=False), PROMPTS, GREEDY, tolerance=1.0)
    assert not result.holds
    assert all(math.isinf(mismatch.plain_gap) for mismatch in result.mismatches)


def test_both_wrong_by_the_same_amount_is_no_tie() -> None:
    """Two candidates may be close to each other only because both are far from the best."""

    class BothWrong(FakeAnswerer):
        def _answer(self, question):  # type: ignore[no-untyped-def]
            answer = super()._answer(question)
            if question.sampling.logprobs:
                return answer
            order = self.logits(question.prompt_tokens).argsort(descending=True)
            token = int(order[5 if question.speculative else 6])
            return replace(answer, tokens=(token,))

    result = check_identity(BothWrong(), PROMPTS, GREEDY, tolerance=0.5)
    assert not result.holds
