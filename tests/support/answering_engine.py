"""An engine without processes, for commands that measure or check one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.cluster.api import Completion, GenerationRequest, failed_completion
from outrider.cluster.bench.identity import Question
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import RequestStats
from support.fake_answerer import FakeAnswerer


@dataclass
class AnsweringEngine:
    """Answers with a `FakeAnswerer`; refuses what `error` says."""

    answerer: FakeAnswerer = field(default_factory=FakeAnswerer)
    error: str = ""
    requests: list[GenerationRequest] = field(default_factory=list)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self.requests += requests
        return [failed_completion(self.error) if self.error else self._complete(asked) for asked in requests]

    def stats(self) -> dict[str, dict[str, Any]]:
        busy = {"forward": 0.001 * len(self.requests), "wait": 1.0}
        return {
            "draft": {"busy_s": busy, "peak_memory_bytes": 2**20},
            "target 0": {"busy_s": busy, "peak_memory_bytes": 2**21},
            "coordinator": {"num_open_requests": 0},
        }

    def trace(self) -> dict[str, list[dict[str, Any]]]:
        return {"draft": [], "target 0": []}

    def _complete(self, asked: GenerationRequest) -> Completion:
        sampling = SamplingParams(**asked.sampling)  # type: ignore[arg-type]
        prompt = tuple(token for token in asked.prompt if isinstance(token, int))
        speculative = asked.draft.get("max_nodes") != 0
        (answer,) = self.answerer.answer([Question(prompt, sampling, speculative)])
        times = tuple(0.01 * (index + 1) for index in range(len(answer.tokens)))
        return Completion(
            text="",
            tokens=answer.tokens,
            origins=(Origin.TARGET,) * len(answer.tokens),
            logprobs=answer.logprobs,
            token_times_s=times,
            finish_reason="length",
            error="",
            num_prompt_tokens=len(prompt),
            stats=RequestStats(
                num_rounds=len(answer.tokens),
                num_drafted=answer.num_drafted,
                num_accepted=answer.num_accepted,
                depth_drafted=(2, 1) if speculative else (),
                depth_accepted=(1, 1) if speculative else (),
            ),
            total_s=times[-1] if times else 0.0,
        )
