"""The modes of a benchmark: this engine, speculative or plain, and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from outrider.cluster.api import GenerationRequest
from outrider.cluster.bench.identity import Question
from outrider.cluster.bench.runner import BusySeconds
from outrider.workers.answer import Completion
from outrider.workers.baselines import (
    BASELINE_MODES,
    BaselineMode,
    BaselineProcess,
    BaselineRequest,
)
from outrider.workers.sequences.params import SamplingParams

MODES: tuple[str, ...] = ("plain", *BASELINE_MODES)
"""What drafting is compared with."""

PLAIN: Mapping[str, object] = {"max_nodes": 0}
AS_CONFIGURED: Mapping[str, object] = {}
"""What a request says of drafting."""

EXACT: Mapping[str, object] = {}
"""What a request says of acceptance."""


class RunningEngine(Protocol):
    """What a benchmark needs of an `Engine`."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]: ...

    def stats(self) -> dict[str, dict[str, Any]]: ...


class EngineDecoder:
    """This engine, drafting as its requests say."""

    is_concurrent = True

    def __init__(
        self,
        mode: str,
        engine: RunningEngine,
        draft: Mapping[str, object],
        acceptance: Mapping[str, object] = EXACT,
    ) -> None:
        """draft, acceptance: fields of a `GenerationRequest`'s options that differ from the configuration."""
        self.mode = mode
        self._engine = engine
        self._draft = draft
        self._acceptance = acceptance

    def generate(self, prompt_tokens: tuple[int, ...], sampling: SamplingParams) -> Completion:
        request = GenerationRequest(prompt_tokens, sampling.request_fields(), self._draft, self._acceptance)
        (answer,) = _complete(self._engine, [request])
        return answer

    def busy_seconds(self) -> BusySeconds:
        return {
            name: dict(stats["busy_s"]) for name, stats in self._engine.stats().items() if "busy_s" in stats
        }


class BaselineDecoder:
    """A mode of transformers, one request at a time. Several modes share one process and its weights."""

    is_concurrent = False

    def __init__(self, mode: BaselineMode, process: BaselineProcess) -> None:
        self.mode = mode
        self._process = process

    def generate(self, prompt_tokens: tuple[int, ...], sampling: SamplingParams) -> Completion:
        return self._process.generate(
            BaselineRequest(
                mode=self.mode,
                prompt_tokens=prompt_tokens,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=sampling.seed,
            )
        )

    def busy_seconds(self) -> BusySeconds:
        return {}


class EngineAnswerer:
    """A running engine as `outrider check` asks it: all questions at once."""

    def __init__(self, engine: RunningEngine) -> None:
        self._engine = engine

    def answer(self, questions: Sequence[Question]) -> list[Completion]:
        requests = [
            GenerationRequest(
                q.prompt_tokens, q.sampling.request_fields(), AS_CONFIGURED if q.speculative else PLAIN
            )
            for q in questions
        ]
        return _complete(self._engine, requests)


def _complete(engine: RunningEngine, requests: Sequence[GenerationRequest]) -> list[Completion]:
    answers = engine.generate(requests)
    for answer in answers:
        if answer.finish_reason == "error":
            raise ValueError(answer.error)
    return answers
