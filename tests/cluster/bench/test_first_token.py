from collections import Counter

import pytest

from outrider.cluster.bench.first_token import check_first_tokens, compare_with_law
from outrider.cluster.bench.runner import EncodedPrompt
from support.fake_answerer import FakeAnswerer

PROMPTS = [EncodedPrompt(f"p{index}", "qa", (index, index + 3)) for index in range(6)]


def test_an_engine_that_samples_from_its_law_holds() -> None:
    results = check_first_tokens(FakeAnswerer(), PROMPTS, num_prompts=2, num_draws=400)
    assert len(results) == 2
    for result in results:
        assert result.holds
        assert result.num_classes > 3
        assert result.total_variation < 0.15


@pytest.mark.parametrize("sharpness", [0.6, 1.7])
def test_an_engine_that_samples_from_another_law_is_caught(sharpness: float) -> None:
    engine = FakeAnswerer(sharpness=sharpness)
    results = check_first_tokens(engine, PROMPTS, num_prompts=2, num_draws=400)
    assert not all(result.holds for result in results)


def test_the_most_open_laws_are_chosen() -> None:
    engine = FakeAnswerer()
    peaks = {prompt.id: float(engine.logits(prompt.tokens).softmax(-1).max()) for prompt in PROMPTS}
    results = check_first_tokens(engine, PROMPTS, num_prompts=2, num_draws=20)
    assert {result.prompt_id for result in results} == set(sorted(peaks, key=lambda key: peaks[key])[:2])


def test_chi_square_of_a_die_written_out() -> None:
    # 60 throws, 10 expected each; counts 5, 8, 9, 8, 10, 20: statistic 13.4, 5 degrees of freedom
    law = dict.fromkeys(range(6), 1 / 6)
    counts = Counter(dict(enumerate([5, 8, 9, 8, 10, 20])))
    result = compare_with_law("die", counts, law)
    assert result.num_classes == 6
    assert result.p_value == pytest.approx(0.0199, abs=2e-4)
    assert result.total_variation == pytest.approx(10 / 60)


def test_rare_tokens_share_a_class() -> None:
    law = {0: 0.5, 1: 0.3, 2: 0.02}
    result = compare_with_law("p", Counter({0: 50, 1: 30, 2: 2, 7: 18}), law)
    assert result.num_classes == 3
    assert result.p_value == pytest.approx(1.0)


def test_tokens_that_the_law_forbids_are_noticed() -> None:
    law = {0: 0.5, 1: 0.5}
    assert not compare_with_law("p", Counter({0: 25, 1: 25, 2: 50}), law).holds


def test_a_certain_token_leaves_nothing_to_test() -> None:
    result = compare_with_law("p", Counter({3: 50}), {3: 1.0})
    assert (result.num_classes, result.p_value) == (1, 1.0)
