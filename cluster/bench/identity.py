"""Is speculative decoding token for token what plain decoding gives? Every difference has to explain itself.

A matrix product rounds differently for one row and for eight, so two candidates whose scores are closer than
the rounding may swap. At the first difference of two texts both candidates are scored again from the common
prefix, without speculation: log p, divided by the temperature, plus the shared noise. It is a tie if neither
is further than the tolerance from the best candidate; anything wider is a failure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from outrider.cluster.bench.metrics import first_difference
from outrider.cluster.bench.runner import EncodedPrompt
from outrider.workers.answer import Completion
from outrider.workers.sampling.token_noise import token_noise
from outrider.workers.sequences.params import MAX_TOP_LOGPROBS, SamplingParams

# Largest score difference that rounding explains. float32: the project's rule. bfloat16: logits between 16 and
# 32 are multiples of 0.125, and each of two computations may be a few of those off; the largest gap seen over
# 36 texts of SmolLM2-135M was 0.35, at temperature 0.8. float16 is eight times finer.
TOLERANCE_OF_DTYPE = {"float32": 1e-4, "float16": 0.0625, "bfloat16": 0.5}

# Large enough to win against any logit, and the most a request may ask for.
_FORCING_BIAS = 100.0


@dataclass(frozen=True)
class Question:
    """A prompt, decoded plainly or as the configuration says."""

    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    speculative: bool


class Answerer(Protocol):
    """What is checked."""

    def answer(self, questions: Sequence[Question]) -> list[Completion]:
        """Answers in the order of the questions; several may run at once."""


@dataclass(frozen=True)
class Mismatch:
    """The first place where two texts differ, and the scores of both candidates there."""

    prompt_id: str
    seed: int
    index: int
    """Position in the output."""

    plain_token: int
    speculative_token: int
    plain_gap: float
    """Score of the best candidate less that of the plain token; infinite if it could not be computed."""

    speculative_gap: float
    is_tie: bool


@dataclass(frozen=True)
class IdentityResult:
    """Texts compared at one temperature."""

    temperature: float
    tolerance: float
    num_texts: int
    num_tokens: int
    num_drafted: int
    num_accepted: int
    mismatches: tuple[Mismatch, ...]

    @property
    def holds(self) -> bool:
        return all(mismatch.is_tie for mismatch in self.mismatches)


def check_identity(
    answerer: Answerer,
    prompts: Sequence[EncodedPrompt],
    samplings: Sequence[SamplingParams],
    tolerance: float,
) -> IdentityResult:
    """Decodes every prompt with each of `samplings` (one temperature, different seeds) both ways.

    `samplings` may only differ from the model's law by the temperature: penalties and top-k, top-p and min-p
    would change the scores in ways that cannot be recomputed from log-probabilities.
    """
    temperature = samplings[0].temperature
    for sampling in samplings:
        assert sampling.temperature == temperature
        assert not sampling.edits_logits
        assert not sampling.truncates
    cases = [(prompt, sampling) for prompt in prompts for sampling in samplings]
    texts = {}
    for speculative in (False, True):
        questions = [Question(prompt.tokens, sampling, speculative) for prompt, sampling in cases]
        texts[speculative] = answerer.answer(questions)
    mismatches = [
        explain(answerer, prompt, sampling, plain.tokens, speculative.tokens, tolerance)
        for (prompt, sampling), plain, speculative in zip(cases, texts[False], texts[True], strict=True)
        if plain.tokens != speculative.tokens
    ]
    return IdentityResult(
        temperature=temperature,
        tolerance=tolerance,
        num_texts=len(cases),
        num_tokens=sum(len(answer.tokens) for answer in texts[True]),
        num_drafted=sum(answer.stats.num_drafted for answer in texts[True]),
        num_accepted=sum(answer.stats.num_accepted for answer in texts[True]),
        mismatches=tuple(mismatches),
    )


def explain(
    answerer: Answerer,
    prompt: EncodedPrompt,
    sampling: SamplingParams,
    plain: tuple[int, ...],
    speculative: tuple[int, ...],
    tolerance: float,
) -> Mismatch:
    """Scores both candidates at the first difference anew. A text that just ends early is never a tie."""
    index = first_difference(plain, speculative)
    if index in (len(plain), len(speculative)):
        ended = (*plain, *speculative)[-1]
        return Mismatch(
            prompt_id=prompt.id,
            seed=sampling.seed,
            index=index,
            plain_token=plain[index] if index < len(plain) else ended,
            speculative_token=speculative[index] if index < len(speculative) else ended,
            plain_gap=math.inf,
            speculative_gap=math.inf,
            is_tie=False,
        )
    context = prompt.tokens + plain[:index]
    candidates = (plain[index], speculative[index])
    logprobs = _score(answerer, context, candidates)
    scores = _perturb(logprobs, sampling, position=len(context))
    best = max(scores.values(), default=math.inf)
    plain_gap, speculative_gap = (best - scores.get(token, -math.inf) for token in candidates)
    return Mismatch(
        prompt_id=prompt.id,
        seed=sampling.seed,
        index=index,
        plain_token=candidates[0],
        speculative_token=candidates[1],
        plain_gap=plain_gap,
        speculative_gap=speculative_gap,
        is_tie=max(plain_gap, speculative_gap) <= tolerance,
    )


def _score(answerer: Answerer, context: tuple[int, ...], candidates: Sequence[int]) -> dict[int, float]:
    """log p of the candidates and of the likeliest tokens after `context`.

    A bias makes a request take a candidate, whatever its rank; reported log-probabilities are without it.
    """
    forced = SamplingParams(temperature=0.0, max_tokens=1, logprobs=True, top_logprobs=MAX_TOP_LOGPROBS)
    answers = answerer.answer(
        [
            Question(context, replace(forced, logit_bias=((token, _FORCING_BIAS),)), speculative=False)
            for token in candidates
        ]
    )
    scores: dict[int, float] = {}
    for answer in answers:
        if answer.logprobs:
            scores.update(answer.logprobs[0].top)
            scores[answer.tokens[0]] = answer.logprobs[0].logprob
    return scores


def _perturb(logprobs: dict[int, float], sampling: SamplingParams, position: int) -> dict[int, float]:
    """The sampler's scores: what it takes the largest of."""
    if sampling.is_greedy:
        return logprobs
    tokens = list(logprobs)
    noise = token_noise(sampling.seed, position, tokens)
    return {
        token: logprobs[token] / sampling.temperature + noise
        for token, noise in zip(tokens, noise, strict=True)
    }
