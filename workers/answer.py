"""What comes out of an engine, ours or another: the fields of an answer stand here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import NO_TREE, RequestStats, RoundTree, TokenEvent, TokenLogprobs

PER_TOKEN = ("tokens", "origins", "logprobs")
"""Fields of `Output` with an entry per token."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What was said, in part or as a whole. By default nothing was."""

    tokens: tuple[int, ...] = ()
    origins: tuple[Origin, ...] = ()  # per token, or none where the engine does not tell
    logprobs: tuple[TokenLogprobs, ...] = ()  # per token, or none where the request did not ask
    finish_reason: str = ""  # "" while running, then "stop", "length", "cancelled" or "error"
    error: str = ""
    stats: RequestStats = field(default_factory=RequestStats)
    tree: RoundTree = NO_TREE  # of the last round of this, where the request asked for it


@dataclass(frozen=True, kw_only=True)
class Completion(Output):
    """A whole answer. Times are seconds since the request was admitted, or where it is streamed since it was sent."""

    text: str = ""  # empty where an engine gives tokens alone
    token_times_s: tuple[float, ...] = ()  # per token: when it could be read
    total_s: float = 0.0
    num_prompt_tokens: int = 0  # of a request that was admitted

    @property
    def num_decoded(self) -> int:
        """Tokens after those that came first."""
        return sum(time_s > self.token_times_s[0] for time_s in self.token_times_s)

    @property
    def decode_s(self) -> float:
        """From the first tokens to the last."""
        return self.token_times_s[-1] - self.token_times_s[0] if self.token_times_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """While decoding: the time to the first token is not in it. 0 for answers that came at once."""
        return self.num_decoded / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target step."""
        return len(self.tokens) / self.stats.num_rounds if self.stats.num_rounds else 0.0


def output_fields(said: Output | TokenEvent) -> dict[str, Any]:
    """By name, to make another kind of output of it."""
    return {entry.name: getattr(said, entry.name) for entry in fields(Output)}
