"""Pieces of answers as OpenAI's objects: chunks of a stream, or one object at the end."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from outrider.cluster.api import Piece, ServedModel
from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.jobs import Job
from outrider.cluster.serving.parsing import (
    AnswerParser,
    CallArguments,
    CallBegins,
    Content,
    Event,
    Thought,
)
from outrider.cluster.serving.usage import Tally
from outrider.workers.sequences.sequence import RoundTree, TokenLogprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes the same


Sent = tuple[str, dict[str, Any]]
"""An event of a stream: its name, empty where it needs none, and what it says."""


class Writer(Protocol):
    """Makes objects of the pieces of one request."""

    done: bytes
    """What ends a stream, behind the last event."""

    def events(self, index: int, piece: Piece, tally: Tally) -> list[Sent]:
        """What a stream says of the next piece of a choice, which `tally` knows already."""

    def ending(self, tally: Tally) -> list[Sent]:
        """What a stream says when all choices have ended."""

    def failed(self, error: ApiError) -> Sent:
        """What a stream says that ends with an error."""

    def whole(self, pieces: Sequence[Sequence[Piece]], tally: Tally) -> dict[str, Any]:
        """The answer at its end; `pieces` by choice."""


class TokenNames:
    """Tokens as log-probabilities name them."""

    def __init__(self, model: ServedModel) -> None:
        self._vocabulary = model.vocabulary

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as one text; ids that are none are left out."""
        known = (self._vocabulary[token] for token in tokens if 0 <= token < len(self._vocabulary))
        return b"".join(known).decode(errors="replace")

    def name(self, token: int) -> str:
        """One token as a text; bytes that are no character become U+FFFD."""
        return self._vocabulary[token].decode(errors="replace")

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """A token in a chat's log-probabilities."""
        content = self._vocabulary[token]
        return {
            "token": content.decode(errors="replace"),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(content),
        }


class _Answer(ABC):
    """What both kinds of answers share."""

    done = b"data: [DONE]\n\n"
    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, job: Job, model_name: str, names: TokenNames) -> None:
        self._job = job
        self._names = names
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_name = model_name

    def events(self, index: int, piece: Piece, tally: Tally) -> list[Sent]:
        choice = self._chunk(index, piece)
        if choice is None:
            return []
        chunk = self._around([choice], self.chunk_kind)
        if self._job.stream_options.continuous_usage_stats:
            chunk["usage"] = tally.usage()
        elif self._job.stream_options.include_usage:
            chunk["usage"] = None
        return [("", chunk)]

    def ending(self, tally: Tally) -> list[Sent]:
        if not self._job.stream_options.include_usage:
            return []
        return [("", {**self._around([], self.chunk_kind), "usage": tally.usage()})]

    def failed(self, error: ApiError) -> Sent:
        return "", error.body()

    def whole(self, pieces: Sequence[Sequence[Piece]], tally: Tally) -> dict[str, Any]:
        choices = [self._choice(index, said) for index, said in enumerate(pieces)]
        return {**self._around(choices, self.kind), "usage": tally.usage()}

    @abstractmethod
    def _chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """What a stream says of the next piece of a choice; None where there is nothing to say."""

    @abstractmethod
    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice at its end."""

    def _around(self, choices: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_name,
            "choices": choices,
        }

    def _has_news(self, piece: Piece) -> bool:
        """Whether a stream must say something of it: text may be held back, and be said later."""
        return bool(
            piece.text
            or piece.finish_reason
            or piece.logprobs
            or piece.tree.tokens
            or (piece.tokens and self._job.origins)
        )

    def _speculative(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Who chose what, and the tree of the last round, as far as that is wanted."""
        said = self._origins(pieces) | self._tree(pieces[-1].tree)
        return {"speculative": said} if said else {}

    def _tree(self, tree: RoundTree) -> dict[str, Any]:
        if not tree.tokens:
            return {}
        return {
            "tree": {
                "token_ids": tree.tokens,
                "tokens": [self._names.name(token) for token in tree.tokens],
                "parents": tree.parents,
                "accepted": tree.accepted,
            }
        }

    def _origins(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if not self._job.origins:
            return {}
        segments = [
            {"text": part.text, "origin": part.origin.label} for piece in pieces for part in piece.segments
        ]
        return {
            "segments": segments,
            "token_ids": [token for piece in pieces for token in piece.tokens],
            "token_origins": [origin.label for piece in pieces for origin in piece.origins],
        }


class ChatWriter(_Answer):
    """For /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, job: Job, model_name: str, names: TokenNames) -> None:
        super().__init__(job, model_name, names)
        self._begun: set[int] = set()
        self._parsers = [
            AnswerParser(job.thoughts != "none", job.thoughts == "open", job.calls) for _ in job.requests
        ]

    def _chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        begins = index not in self._begun
        events = self._read(index, piece)
        if not begins and not events and not self._has_news(replace(piece, segments=())):
            return None
        self._begun.add(index)
        return {
            "index": index,
            "delta": _delta(events, begins),
            "logprobs": self._logprobs([piece]),
            "finish_reason": self._reason(index, piece),
            **self._speculative([piece]),
        }

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        events = [event for piece in pieces for event in self._read(index, piece)]
        return {
            "index": index,
            "message": _message(events),
            "logprobs": self._logprobs(pieces),
            "finish_reason": self._reason(index, pieces[-1]),
            **self._speculative(pieces),
        }

    def _read(self, index: int, piece: Piece) -> list[Event]:
        parser = self._parsers[index]
        return parser.feed(piece.text) + (parser.finish() if piece.finish_reason else [])

    def _reason(self, index: int, piece: Piece) -> str | None:
        calls = self._parsers[index].num_calls
        return "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason or None

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        reported = _reported(pieces)
        if not reported:
            return None
        content = []
        for token, said in reported:
            top = [self._names.entry(other, logprob) for other, logprob in said.top]
            content.append({**self._names.entry(token, said.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class CompletionWriter(_Answer):
    """For /v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, job: Job, model_name: str, names: TokenNames) -> None:
        super().__init__(job, model_name, names)
        self._begun: set[int] = set()
        self._offsets = [len(text) for text in job.echo] or [0] * len(job.requests)

    def _chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        begins = index not in self._begun and bool(self._job.echo)
        if not begins and not self._has_news(piece):
            return None
        return self._choice(index, [piece])

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        if self._job.echo and index not in self._begun:
            text = self._job.echo[index] + text
        self._begun.add(index)
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, pieces),
            "finish_reason": pieces[-1].finish_reason or None,
            **self._speculative(pieces),
        }

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        reported = _reported(pieces)
        if not reported:
            return None
        names = [self._names.name(token) for token, _ in reported]
        offsets = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        tops = []
        for (_, said), name in zip(reported, names, strict=True):
            top = {self._names.name(token): max(logprob, _LEAST_LOGPROB) for token, logprob in said.top}
            tops.append(top | {name: max(said.logprob, _LEAST_LOGPROB)})
        return {
            "tokens": names,
            "token_logprobs": [max(said.logprob, _LEAST_LOGPROB) for _, said in reported],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _delta(events: Sequence[Event], begins: bool) -> dict[str, Any]:
    """What a chunk adds to a message."""
    delta: dict[str, Any] = {"role": "assistant", "content": ""} if begins else {}
    calls: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Content(text):
                delta["content"] = delta.get("content", "") + text
            case Thought(text):
                delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + text
            case CallBegins(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls.append({"index": index, "id": call_id, "type": "function", "function": function})
            case CallArguments(index, text):
                if not calls or calls[-1]["index"] != index:
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += text
    return {**delta, "tool_calls": calls} if calls else delta


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """A whole message."""
    said = _delta(events, begins=True)
    calls = [{name: call[name] for name in ("id", "type", "function")} for call in said.pop("tool_calls", ())]
    content = said["content"] or (None if calls else "")
    return {**said, "content": content, "refusal": None, **({"tool_calls": calls} if calls else {})}


def _reported(pieces: Sequence[Piece]) -> list[tuple[int, TokenLogprobs]]:
    """Tokens with their log-probabilities, where the request asked for them."""
    return [
        pair for piece in pieces if piece.logprobs for pair in zip(piece.tokens, piece.logprobs, strict=True)
    ]
