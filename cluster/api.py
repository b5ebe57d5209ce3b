"""What goes into the engine and what comes out: plain data, the same for the Engine, the CLI and a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import RequestStats, TokenLogprobs

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A text that is continued as it stands; messages (`{"role": ..., "content": ...}`) that go through the
model's chat template; or token ids."""


class EngineError(RuntimeError):
    """The deployment as a whole is unusable: a worker died or could not start."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and what is special about it."""

    prompt: Prompt

    sampling: Mapping[str, object] = field(default_factory=dict)
    """Fields of `SamplingParams` that differ from the config's `sampling` section."""

    draft: Mapping[str, object] = field(default_factory=dict)
    """Fields of `DraftOptions` that differ from the config: `methods`, `max_nodes` (0: plain) and
    `max_depth`."""


@dataclass(frozen=True)
class Segment:
    """Text of one origin."""

    text: str
    origin: Origin  # of the token that completed the text


@dataclass(frozen=True)
class Piece:
    """What one round added to an answer. The last piece has a finish reason."""

    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]  # per token
    logprobs: tuple[TokenLogprobs, ...]  # per token, or none where the request did not ask
    finish_reason: str  # "" while running, then "stop", "length", "cancelled" or "error"
    error: str
    stats: RequestStats

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Completion:
    """A whole answer. Times are seconds since the Coordinator admitted the request."""

    text: str
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]  # per token
    logprobs: tuple[TokenLogprobs, ...]  # per token, or none where the request did not ask
    token_times_s: tuple[float, ...]  # per token: when it was at the Coordinator
    finish_reason: str  # "stop", "length", "cancelled" or "error"
    error: str
    num_prompt_tokens: int
    stats: RequestStats
    total_s: float


def failed_completion(error: str, finish_reason: str = "error") -> Completion:
    """The answer of a request that never ran: it was refused, or cancelled before."""
    return Completion(
        text="",
        tokens=(),
        origins=(),
        logprobs=(),
        token_times_s=(),
        finish_reason=finish_reason,
        error=error,
        num_prompt_tokens=0,
        stats=RequestStats(),
        total_s=0.0,
    )


@dataclass(frozen=True)
class Progress:
    """How far a start-up stage of one worker is."""

    worker: str  # "target 0", "draft", "coordinator"
    stage: str  # "download", "load", "profile"
    done: int
    total: int  # bytes for download and load, measurements for profile; 0 where unknown


@dataclass(frozen=True)
class Refusal:
    """A request that cannot be run, and why: one line."""

    error: str


@dataclass(frozen=True)
class Notice:
    """What the sender of a request that runs should know."""

    text: str


Answer = Piece | Completion | Refusal | Notice
"""What the Coordinator says about a request. Whoever asked for the whole answer gets no pieces."""


@dataclass(frozen=True)
class Ticket:
    """A request on its way to the door: its turn is taken, its contents are not looked at yet."""

    request_id: str
    contents: bytes  # a pickled GenerationRequest
    whole: bool  # one Completion at the end, instead of Pieces as they come


@dataclass(frozen=True)
class Delivery:
    """What the Coordinator hands over at a time."""

    answers: tuple[tuple[str, Answer], ...]  # with request ids, in order
    failure: str  # why the deployment is unusable; empty while it works
