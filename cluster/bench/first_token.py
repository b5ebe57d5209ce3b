"""Does sampling follow the model's law? First tokens of many seeds against the model's own probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2

from outrider.cluster.bench.identity import Answerer, Question
from outrider.cluster.bench.runner import EncodedPrompt
from outrider.workers.sequences.params import MAX_TOP_LOGPROBS, SamplingParams

SMALLEST_P_VALUE = 1e-4
"""A correct sampler falls below it once in ten thousand checks."""

_SMALLEST_EXPECTED_COUNT = 5.0  # of a class of the chi-square test, the usual rule


@dataclass(frozen=True)
class LawResult:
    """One prompt's first tokens at temperature 1."""

    prompt_id: str
    num_draws: int
    num_classes: int
    """Tokens tested one by one, and one class for all others."""

    p_value: float
    """How likely a sampler that follows the law deviates as much; 1 if there is a single class."""

    total_variation: float
    """Half the summed absolute difference between the frequencies and the law, over the classes."""

    @property
    def holds(self) -> bool:
        return self.p_value >= SMALLEST_P_VALUE


def check_first_tokens(
    answerer: Answerer, prompts: Sequence[EncodedPrompt], num_prompts: int, num_draws: int
) -> list[LawResult]:
    """Draws `num_draws` first tokens, one per seed, for the `num_prompts` prompts with the most open law."""
    ask_law = SamplingParams(temperature=0.0, max_tokens=1, logprobs=True, top_logprobs=MAX_TOP_LOGPROBS)
    answers = answerer.answer([Question(prompt.tokens, ask_law, speculative=False) for prompt in prompts])
    laws = [
        {token: math.exp(logprob) for token, logprob in answer.logprobs[0].top} if answer.logprobs else {}
        for answer in answers
    ]
    by_openness = sorted(range(len(prompts)), key=lambda index: max(laws[index].values(), default=1.0))
    results = []
    for index in by_openness[:num_prompts]:
        draws = answerer.answer(
            [
                Question(prompts[index].tokens, SamplingParams(max_tokens=1, seed=seed), speculative=True)
                for seed in range(num_draws)
            ]
        )
        counts = Counter(answer.tokens[0] for answer in draws)
        results.append(compare_with_law(prompts[index].id, counts, laws[index]))
    return results


def compare_with_law(prompt_id: str, counts: Counter[int], law: dict[int, float]) -> LawResult:
    """Pearson's chi-square test of `counts` against `law`, the probabilities of the likeliest tokens."""
    num_draws = counts.total()
    tested = [token for token, p in law.items() if p * num_draws >= _SMALLEST_EXPECTED_COUNT]
    expected = [law[token] * num_draws for token in tested]
    observed = [float(counts[token]) for token in tested]
    rest = max(num_draws - sum(expected), 0.0)
    rest_observed = num_draws - sum(observed)
    if rest >= _SMALLEST_EXPECTED_COUNT or not expected:
        expected.append(rest)
        observed.append(rest_observed)
    else:  # too few to be a class of their own: they join the rarest
        expected[-1] += rest
        observed[-1] += rest_observed
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    difference = sum(abs(o - e) for o, e in zip(observed, expected, strict=True))
    return LawResult(
        prompt_id=prompt_id,
        num_draws=num_draws,
        num_classes=len(expected),
        p_value=float(chi2.sf(statistic, len(expected) - 1)) if len(expected) > 1 else 1.0,
        total_variation=difference / (2 * num_draws),
    )
