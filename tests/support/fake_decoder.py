"""A decoder for benches: answers from a script, costs what the script says."""

import threading
from dataclasses import dataclass, field

from outrider.workers.answer import Completion
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import RequestStats


@dataclass
class FakeDecoder:
    """Counts up from the prompt's last token; `calls` is shared between decoders to see the order."""

    mode: str
    is_concurrent: bool = True
    tokens_per_step: int = 1
    calls: list[tuple[str, int]] = field(default_factory=list)  # (mode, first prompt token)
    in_flight: int = 0
    most_in_flight: int = 0
    busy: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "sample": 0.0, "wait": 0.0})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def generate(self, prompt_tokens: tuple[int, ...], sampling: SamplingParams) -> Completion:
        with self.lock:
            self.calls.append((self.mode, prompt_tokens[0]))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        tokens = tuple(prompt_tokens[-1] + 1 + index for index in range(sampling.max_tokens))
        steps = -(-len(tokens) // self.tokens_per_step)
        drafted = (self.tokens_per_step - 1) * steps
        with self.lock:
            self.in_flight -= 1
            self.busy["forward"] += 0.5
            self.busy["sample"] += 0.25
            self.busy["wait"] += 0.25
        stats = RequestStats(
            num_rounds=steps,
            num_drafted=drafted,
            num_accepted=len(tokens) - steps,
            depth_drafted=(steps,) * (self.tokens_per_step - 1),
            depth_accepted=(steps // 2,) * (self.tokens_per_step - 1),
        )
        return Completion(
            tokens=tokens,
            token_times_s=tuple(0.5 + 0.1 * index for index in range(len(tokens))),
            total_s=0.5 + 0.1 * len(tokens),
            stats=stats,
        )

    def busy_seconds(self) -> dict[str, dict[str, float]]:
        return {"target 0": dict(self.busy)}
