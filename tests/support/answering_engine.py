"""An engine without processes, for commands that measure or check one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from outrider.cluster.api import GenerationRequest
from outrider.cluster.bench.identity import Question
from outrider.workers.answer import Completion
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from support.fake_answerer import FakeAnswerer


@dataclass
class AnsweringEngine:
    """Answers with a `FakeAnswerer`; refuses what `error` says."""

    answerer: FakeAnswerer = field(default_factory=FakeAnswerer)
    error: str = ""
    requests: list[GenerationRequest] = field(default_factory=list)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self.requests += requests
        failed = Completion(finish_reason="error", error=self.error)
        return [failed if self.error else self._complete(asked) for asked in requests]

    def stats(self) -> dict[str, dict[str, Any]]:
        busy = {"forward": 0.001 * len(self.requests), "wait": 1.0}
        return {
            "draft": {"busy_s": busy, "peak_memory_bytes": 2**20},
            "target 0": {"busy_s": busy, "peak_memory_bytes": 2**21},
            "coordinator": {"num_open_requests": 0, "num_restarts": 0},
        }

    def trace(self) -> dict[str, list[dict[str, Any]]]:
        return {"draft": [], "target 0": []}

    def _complete(self, asked: GenerationRequest) -> Completion:
        sampling = SamplingParams(**asked.sampling)  # type: ignore[arg-type]
        prompt = tuple(token for token in asked.prompt if isinstance(token, int))
        speculative = asked.draft.get("max_nodes") != 0
        (answer,) = self.answerer.answer([Question(prompt, sampling, speculative)])
        times = tuple(0.01 * (index + 1) for index in range(len(answer.tokens)))
        depths = {"depth_drafted": (2, 1), "depth_accepted": (1, 1)} if speculative else {}
        return replace(
            answer,
            origins=(Origin.TARGET,) * len(answer.tokens),
            token_times_s=times,
            num_prompt_tokens=len(prompt),
            stats=replace(answer.stats, **depths),
            total_s=times[-1] if times else 0.0,
        )
