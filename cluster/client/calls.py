"""What goes over the wire and when it goes again, without doing it: the two clients share all of this."""

import json
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

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

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text that is continued as it stands, token ids, or messages that go through the model's chat template."""

_AGAIN = (408, 429, 500, 502, 503, 504)
_FIRST_DELAY_S = 0.25
_MOST_DELAY_S = 8.0


class Speculation(TypedDict, total=False):
    """How one answer is drafted, and by which rule drafted tokens are accepted."""

    method: str | list[str]
    """Draft methods, some of the deployment's."""

    budget: int
    """Most drafted tokens per round; 0: plain decoding."""

    depth: int
    """Longest drafted path, in tokens."""

    rule: str
    """`exact`, `typical` or `judge`, as far as the deployment allows it; all but `exact` change the text."""

    epsilon: float
    delta: float
    """Of rule `typical`."""

    judge: str
    threshold: float
    """Of rule `judge`."""

    tree: bool
    """Whether each part of a stream says which tree its round verified."""


class StructuredOutputs(TypedDict, total=False):
    """What an answer must be: one of the first five, as vLLM has it."""

    json: Mapping[str, Any] | str
    """A JSON schema."""

    json_object: bool
    regex: str
    choice: Sequence[str]

    grammar: str
    """Lark, or EBNF as llama.cpp has it (GBNF)."""

    disable_any_whitespace: bool
    whitespace_pattern: str
    """Of JSON: none between its parts, or what this matches."""


class Options(TypedDict, total=False):
    """What a request asks besides its prompt. What is left out is as the server's configuration says."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    """By token id: added to the token's logit."""
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    structured_outputs: StructuredOutputs
    """What the answer must be."""
    response_format: Mapping[str, Any]
    """The same as OpenAI has it."""
    top_logprobs: int
    """Report each token's log-probability, and the likeliest tokens at its place, this many."""
    speculative: Speculation | Literal["off"]
    """How the answer is drafted; `off`: not at all."""


class BatchEntry(TypedDict, total=False):
    """One request of a batch."""

    prompt: Prompt
    options: Options


@dataclass(frozen=True)
class Call:
    """One request of HTTP."""

    path: str
    body: Mapping[str, Any]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The same for every attempt."""


def generation(prompt: Prompt, options: Options, model: str, stream: bool) -> Call:
    """The call that asks for one answer. Raises ValueError for an option that there is not."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        allowed = ", ".join(Options.__annotations__)
        raise ValueError(f"options must be among {allowed}, got {', '.join(sorted(unknown))}")
    body: dict[str, Any] = {name: value for name, value in options.items() if name != "top_logprobs"}
    asked = options.get("speculative", Speculation())
    drafting: Speculation = {"budget": 0} if isinstance(asked, str) else asked
    body["speculative"] = {**drafting, "origins": True}
    if "logit_bias" in options:
        body["logit_bias"] = {str(token): value for token, value in options["logit_bias"].items()}
    for name in ("stop", "stop_token_ids"):
        if name in body and not isinstance(body[name], str):
            body[name] = list(body[name])
    if model:
        body["model"] = model
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    number = options.get("top_logprobs")
    if is_chat:
        reported = {} if number is None else {"logprobs": True, "top_logprobs": number}
        return Call("/v1/chat/completions", {**body, **reported, "messages": prompt})
    reported = {} if number is None else {"logprobs": number}
    plain = prompt if isinstance(prompt, str) else list(prompt)
    return Call("/v1/completions", {**body, **reported, "prompt": plain})


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
