"""SmolLM2-135M-Instruct and what it is asked in equality tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from outrider.cluster.bench.prompts import SHIPPED_PROMPTS, encode, load_prompts, select
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tokenizer import load_tokenizer
from support.equality import Case, Reference
from support.models import smollm2

SPEC_BENCH = Path(__file__).parents[3] / "shared" / "data" / "spec_bench.jsonl"
NUM_SPEC_BENCH = 12
LONG = 260  # tokens; reading long prompts is what takes the time
_LONGER_THAN = (LONG, 1024)  # tokens: the shortest prompt that is longer than each


@dataclass(frozen=True)
class SmolLM2:
    """One per run: reading it takes seconds."""

    source: WeightSource
    reference: Reference
    shipped: list[Case]
    spec_bench: list[Case]  # empty without the file

    @property
    def all_cases(self) -> list[Case]:
        return self.shipped + self.spec_bench


@lru_cache
def load_smollm2() -> SmolLM2:
    """Skips the test when the model cannot be had."""
    resolved = smollm2()
    source = open_source(resolved)
    tokenizer = load_tokenizer(resolved)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=16, stop_token_ids=tuple(source.config.eos_token_ids)
    )

    def cases(path: Path) -> list[Case]:
        prompts = load_prompts(path)
        return [Case(prompt.id, encode(prompt, tokenizer, "chat"), sampling) for prompt in prompts]

    spec_bench: list[Case] = []
    if SPEC_BENCH.is_file():
        prompts = load_prompts(SPEC_BENCH)
        by_id = {case.id: case for case in cases(SPEC_BENCH)}
        short = [prompt for prompt in prompts if len(by_id[prompt.id].prompt) <= LONG]
        long = sorted((case for case in by_id.values() if len(case.prompt) > LONG), key=_length)
        spec_bench = [by_id[prompt.id] for prompt in select(short, NUM_SPEC_BENCH - len(_LONGER_THAN))]
        spec_bench += [next(case for case in long if _length(case) > bound) for bound in _LONGER_THAN]
    return SmolLM2(source, Reference(resolved), cases(SHIPPED_PROMPTS), spec_bench)


def _length(case: Case) -> int:
    return len(case.prompt)
