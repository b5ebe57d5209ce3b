"""What goes over the wire and when it goes again, without doing it: the two clients share all of this."""

import json
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from outrider.cluster.client.answers import (
    Answer,
    Part,
    RefusedError,
    Segment,
    Token,
    UnavailableError,
    Usage,
    read_part,
    read_usage,
)
from outrider.cluster.client.options import INVALID, Options, Prompt, Speculation, checked, read_prompt

_AGAIN = (408, 429, 500, 502, 503, 504)
_FIRST_DELAY_S = 0.25
_MOST_DELAY_S = 8.0


@dataclass(frozen=True)
class Call:
    """One request of HTTP."""

    path: str
    body: Mapping[str, Any]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same for every attempt."""


def generation(prompt: Prompt, options: Options | None, model: str, stream: bool) -> Call:
    """The call that asks for one answer. Raises RefusedError for what no server would run."""
    (form, plain), asked = read_prompt(prompt), checked(options)
    body: dict[str, Any] = {name: value for name, value in asked.items() if name != "top_logprobs"}
    speculation = asked.get("speculative", Speculation())
    drafting: Speculation = {"budget": 0} if isinstance(speculation, str) else speculation
    body["speculative"] = {**drafting, "origins": True}
    if "logit_bias" in asked:
        body["logit_bias"] = {str(token): value for token, value in asked["logit_bias"].items()}
    if model:
        body["model"] = model
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    number = asked.get("top_logprobs")
    if form == "messages":
        reported = {} if number is None else {"logprobs": True, "top_logprobs": number}
        return Call("/v1/chat/completions", {**body, **reported, "messages": plain})
    reported = {} if number is None else {"logprobs": number}
    return Call("/v1/completions", {**body, **reported, "prompt": plain})


def tokenization(prompt: Prompt) -> Call:
    """The call that asks for the tokens of a text or of messages. Raises RefusedError for anything else."""
    form, plain = read_prompt(prompt)
    if form == "tokens":
        raise RefusedError(
            400, "prompt must be a text or a list of messages, got token ids", "prompt", INVALID
        )
    return Call("/tokenize", {"prompt" if form == "text" else "messages": plain})


def read_answer(body: Mapping[str, Any]) -> Answer:
    """A whole answer as the server writes it."""
    (choice,) = body["choices"]
    part = read_part(choice)
    usage = read_usage(body["usage"])
    return Answer(part.text, part.tokens, part.finish_reason, usage, body["model"], body["id"])


def error_of(status: int, content: bytes) -> Exception:
    """What an answer with this status says; UnavailableError where it may be tried again."""
    try:
        error = json.loads(content)["error"]
        message, param, code = error["message"], error["param"] or "", error["code"] or ""
    except (ValueError, KeyError, TypeError):  # somebody between the two answered
        message, param, code = content[:300].decode(errors="replace"), "", ""
    if status in _AGAIN:
        return UnavailableError(f"the server answered {status}: {message}")
    return RefusedError(status, message, param, code)


class Attempts:
    """How often a call is made, and how long it waits in between: longer each time, by chance, as the server says.

    max_retries: attempts after the first. timeout_s: from now, for all of them.
    """

    def __init__(self, max_retries: int, timeout_s: float) -> None:
        if max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {max_retries}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be a number of seconds above 0, got {timeout_s}")
        self._left = max_retries
        self._delay_s = _FIRST_DELAY_S
        self._limit_s = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Until the call must have ended; raises UnavailableError when it must."""
        remaining_s = self._limit_s - time.monotonic()
        if remaining_s <= 0:
            raise UnavailableError("the answer did not come in time (timeout_s)")
        return remaining_s

    def delay_s(self, error: Exception, retry_after: str) -> float:
        """Seconds to wait before the next attempt. Raises `error` where there is none.

        retry_after: what the server said, empty where it said nothing.
        """
        if not self._left or isinstance(error, RefusedError):
            raise error
        self._left -= 1
        wished_s = float(retry_after) if retry_after.isdecimal() else 0.0
        delay_s = max(wished_s, self._delay_s * random.uniform(0.5, 1.0))
        self._delay_s = min(2 * self._delay_s, _MOST_DELAY_S)
        if delay_s >= self._limit_s - time.monotonic():
            raise error
        return delay_s


class StreamReader:
    """Lines of a stream become parts. After a break the same call is made again, and its stream goes on here: what
    was given already is left out, since the same request gets the same tokens."""

    def __init__(self) -> None:
        self.model = self.id = self.finish_reason = ""
        self.usage = Usage()
        self.ended = False
        self._given: list[Token] = []
        self._texts: list[str] = []
        self._num_given = 0  # characters
        self._num_tokens = self._num_characters = 0  # of the present attempt

    def begin(self) -> None:
        """An attempt begins."""
        self._num_tokens = self._num_characters = 0

    def read(self, line: str) -> Iterator[Part]:
        """What a line gives: a part, or nothing. Raises RefusedError and UnavailableError for one that says so."""
        if not line.startswith("data:"):
            return
        content = line.removeprefix("data:").strip()
        if content == "[DONE]":
            self.ended = True
            return
        chunk = json.loads(content)
        if "error" in chunk:
            # After the first part nothing is wrong with the request.
            raise error_of(503, content.encode())
        self.model, self.id = chunk["model"], chunk["id"]
        if chunk.get("usage"):
            self.usage = read_usage(chunk["usage"])
        for choice in chunk["choices"]:
            part = self._unseen(read_part(choice))
            if part.segments or part.tokens or part.finish_reason:
                self._given += part.tokens
                self._texts.append(part.text)
                self._num_given += len(part.text)
                self.finish_reason = part.finish_reason
                yield part

    def answer(self) -> Answer:
        """All of it, so far."""
        return Answer(
            text="".join(self._texts),
            tokens=tuple(self._given),
            finish_reason=self.finish_reason,
            usage=self.usage,
            model=self.model,
            id=self.id,
        )

    def _unseen(self, part: Part) -> Part:
        known = self._given[self._num_tokens : self._num_tokens + len(part.tokens)]
        if [token.id for token in known] != [token.id for token in part.tokens[: len(known)]]:
            raise UnavailableError(
                "the stream broke, and the same request got other tokens than before: another model answers, or two "
                "candidates were closer than the rounding"
            )
        hidden = min(max(self._num_given - self._num_characters, 0), len(part.text))
        self._num_tokens += len(part.tokens)
        self._num_characters += len(part.text)
        segments = _without(part.segments, hidden)
        return replace(part, segments=segments, tokens=part.tokens[len(known) :])


def _without(segments: Sequence[Segment], hidden: int) -> tuple[Segment, ...]:
    """Without the first `hidden` characters."""
    rest = []
    for segment in segments:
        text = segment.text[hidden:]
        hidden = max(hidden - len(segment.text), 0)
        if text:
            rest.append(Segment(text, segment.origin))
    return tuple(rest)
