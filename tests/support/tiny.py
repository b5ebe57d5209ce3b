"""A random target small enough to try every combination on, its noisy drafter, and prompts for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from outrider.workers.rounds.budget import PassProfile
from outrider.workers.rounds.loop import LoopOptions
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.weights.resolver import ResolvedModel
from support.equality import Case
from support.local_engine import default_options
from support.models import random_model

VOCAB_SIZE = 320
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)

NGRAM = DraftOptions(("ngram",), 8, 6)
MODEL = DraftOptions(("model",), 8, 6)
BOTH = DraftOptions(("ngram", "model"), 10, 6)
METHODS = {"ngram": NGRAM, "model": MODEL, "both": BOTH}

# With these at an advantage the output keeps to six tokens and repeats itself: lookup is often right. They are
# spread over the shards of a vocabulary.
FEW_TOKENS = tuple((token, 30.0) for token in (3, 7, 101, 150, 222, VOCAB_SIZE - 1))

# Name: loop, lanes, drafting ahead.
LOOPS = {
    "serial, 1 lane": (False, 1, False),
    "serial, 2 lanes": (False, 2, False),
    "1 lane": (True, 1, False),
    "2 lanes": (True, 2, False),
    "1 lane, ahead": (True, 1, True),
    "2 lanes, ahead": (True, 2, True),
}


def loop_options(loop: str, fixed_budget: bool) -> LoopOptions:
    """Of one of `LOOPS`."""
    overlapped, num_lanes, draft_ahead = LOOPS[loop]
    return default_options(
        overlapped=overlapped, num_lanes=num_lanes, draft_ahead=draft_ahead, fixed_budget=fixed_budget
    )


# So slow a target, with rows so cheap, that a measured budget drafts as much as it may.
SLOW_TARGET = PassProfile((1, 64), (10.0, 10.01))

# Five query heads and 24 blocks of the MLP: nothing divides by 2 or 3.
_SHAPE = f"hidden_size=80&num_layers=2&num_heads=5&num_kv_heads=1&head_dim=16&vocab_size={VOCAB_SIZE}"


def tiny_target() -> ResolvedModel:
    return random_model(f"{_SHAPE}&seed=0")


def tiny_drafter() -> ResolvedModel:
    """The target's weights with noise: often right, but not always."""
    return random_model(f"{_SHAPE}&seed=0&perturb=0.15")


def poor_drafter() -> ResolvedModel:
    """As `tiny_drafter`, and mostly wrong."""
    return random_model(f"{_SHAPE}&seed=0&perturb=0.6")


def random_tokens(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCAB_SIZE) for _ in range(count)]


def tiny_cases(
    lengths: Sequence[int] = (5, 17, 40, 130, 3, 64, 99, 200), sampling: SamplingParams = GREEDY
) -> list[Case]:
    """Prompts of these lengths; the seed of a case is its number.

    Every other prompt repeats itself and, where the sampling is greedy, so does its answer.
    """
    cases = []
    repeating = replace(sampling, logit_bias=FEW_TOKENS) if sampling.is_greedy else sampling
    for number, length in enumerate(lengths):
        block = random_tokens(number, 12 if number % 2 else length)
        prompt = (block * (length // len(block) + 1))[:length]
        cases.append(
            Case(
                f"prompt {number}", tuple(prompt), replace(repeating if number % 2 else sampling, seed=number)
            )
        )
    return cases
