"""What goes into the engine and what comes out: plain data, the same for the Engine, the CLI and a server."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from outrider.workers.answer import PER_TOKEN, Completion, Output, output_fields
from outrider.workers.sequences.origin import Origin

CallForm = Literal["none", "hermes", "llama3"]
"""How a model writes calls of tools, see `serving/parsing.py`."""

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text that is continued as it stands; messages (`{"role": ..., "content": ...}`, see `chat.MESSAGE_FIELDS`) that
go through the model's chat template; or token ids."""


class EngineError(RuntimeError):
    """The deployment as a whole is unusable: a worker died or could not start."""


class OverloadedError(ValueError):
    """A request that is fine came at a time at which too much waits: it may come again later."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and what is special about it."""

    prompt: Prompt

    sampling: Mapping[str, object] = field(default_factory=dict)
    """Fields of `SamplingParams` that differ from the config's `sampling` section; instead of `grammar`
    `structured_outputs`, an object with one of `json` (a schema), `json_object` (true), `regex`, `choice` (texts) and
    `grammar` (Lark or GBNF), as vLLM has it."""

    draft: Mapping[str, object] = field(default_factory=dict)
    """Fields of `DraftOptions` that differ from the config: `methods`, `max_nodes` (0: plain), `max_depth`, and
    `tree`."""

    acceptance: Mapping[str, object] = field(default_factory=dict)
    """Fields of `AcceptanceOptions`: `rule`; with `typical` also `epsilon` and `delta`, with `judge` also `judge`
    (its name) and `threshold`. Nothing: `exact`."""

    template: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the model's chat template, as JSON has them: `tools`, `enable_thinking`, ... For messages only."""


@dataclass(frozen=True)
class Segment:
    """Text of one origin."""

    text: str
    origin: Origin  # of the token that completed the text


@dataclass(frozen=True, kw_only=True)
class Piece(Output):
    """What one round added to an answer. The last piece has a finish reason."""

    segments: tuple[Segment, ...] = ()
    num_prompt_tokens: int = 0  # of a request that was admitted

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class Collector:
    """Makes a whole answer of pieces; its times count from when this is made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._pieces: list[Piece] = []
        self._token_times_s: list[float] = []

    def add(self, piece: Piece) -> None:
        """The next piece has come."""
        self._pieces.append(piece)
        self._token_times_s += [time.monotonic() - self._start_s] * len(piece.tokens)

    def completion(self) -> Completion:
        """What has come so far; at least one piece has."""
        last = self._pieces[-1]
        joined = {
            name: tuple(entry for piece in self._pieces for entry in getattr(piece, name))
            for name in PER_TOKEN
        }
        return Completion(
            **(output_fields(last) | joined),
            text="".join(piece.text for piece in self._pieces),
            token_times_s=tuple(self._token_times_s),
            total_s=time.monotonic() - self._start_s,
            num_prompt_tokens=last.num_prompt_tokens,
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
    overloaded: bool = False  # it could be run later

    def raised(self) -> ValueError:
        """As an exception."""
        return OverloadedError(self.error) if self.overloaded else ValueError(self.error)


@dataclass(frozen=True)
class Notice:
    """What the sender of a request that runs should know."""

    text: str


Answer = Piece | Completion | Refusal | Notice
"""What the Coordinator says about a request. Whoever asked for the whole answer gets no pieces."""


@dataclass(frozen=True)
class ServedModel:
    """What a server tells of the target, and needs to write its tokens out."""

    max_context: int  # tokens, prompt and output together
    vocabulary: tuple[bytes, ...]  # by token id: UTF-8, or a part of a character
    calls: CallForm = "hermes"  # as its chat template has them


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
    restarting: str = ""  # why nothing comes for now: workers that were lost are started again
