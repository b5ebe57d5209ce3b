"""What a client gets: plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class RefusedError(ValueError):
    """The server will not run this request, however often it comes: the text says why.

    status: of HTTP. param: the field that is to blame, empty where none is. code: for programs.
    """

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class UnavailableError(RuntimeError):
    """The server was not reached, had no place, or failed, also when it was tried again."""


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    origin: str
    """Whose choice it is: `target`, `draft`, or `kept` (a rule's, against the target)."""

    logprob: float | None = None
    """Under the target's own law, in nats; None unless `top_logprobs` was asked for."""

    top: Mapping[str, float] = field(default_factory=dict)
    """The likeliest tokens at its place with theirs, by their texts."""


@dataclass(frozen=True)
class Segment:
    """Text of one origin."""

    text: str
    origin: str


@dataclass(frozen=True)
class Tree:
    """What one round verified: drafted tokens below the text's last one, which is node 0."""

    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    """Their texts."""

    parents: tuple[int, ...] = ()
    """Of each node an earlier one; 0 of node 0 itself."""

    accepted: tuple[int, ...] = ()
    """The nodes that came out, in the order of the text."""


@dataclass(frozen=True)
class Part:
    """What came at a time."""

    segments: tuple[Segment, ...] = ()
    tokens: tuple[Token, ...] = ()
    finish_reason: str = ""  # of the last part: "stop" or "length"
    tree: Tree = field(default_factory=Tree)  # empty unless `speculative.tree` was asked for

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Usage:
    """Counts of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, from pages that earlier prompts left
    rounds: int = 0  # steps of the target
    drafted: int = 0
    accepted: int = 0
    kept: int = 0  # accepted although the target chose another token

    @property
    def acceptance_rate(self) -> float:
        """Accepted of drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per step of the target."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    usage: Usage
    model: str
    id: str


def read_usage(said: Mapping[str, Any]) -> Usage:
    """As the server writes it."""
    speculative = said.get("speculative") or {}
    return Usage(
        prompt_tokens=said["prompt_tokens"],
        completion_tokens=said["completion_tokens"],
        cached_tokens=(said.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        **{name: speculative.get(name, 0) for name in ("rounds", "drafted", "accepted", "kept")},
    )


def read_part(choice: Mapping[str, Any]) -> Part:
    """A choice of an answer or of a chunk, of either route."""
    said = choice.get("speculative") or {}
    ids, origins = said.get("token_ids", ()), said.get("token_origins", ())
    reported = _logprobs(choice.get("logprobs"), len(ids))
    tokens = tuple(
        Token(token, origin, logprob, top)
        for token, origin, (logprob, top) in zip(ids, origins, reported, strict=True)
    )
    segments = tuple(Segment(part["text"], part["origin"]) for part in said.get("segments", ()))
    tree = Tree(**{name: tuple(values) for name, values in said.get("tree", {}).items()})
    return Part(segments, tokens, choice.get("finish_reason") or "", tree)


def _logprobs(said: Mapping[str, Any] | None, count: int) -> list[tuple[float | None, dict[str, float]]]:
    if said is None:
        return [(None, {})] * count
    if "content" in said:
        return [
            (entry["logprob"], {top["token"]: top["logprob"] for top in entry["top_logprobs"]})
            for entry in said["content"]
        ]
    return list(zip(said["token_logprobs"], said["top_logprobs"], strict=True))
