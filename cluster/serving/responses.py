"""Answers of OpenAI's /v1/responses, stateless: items, whole or in events.

Source of the form: https://platform.openai.com/docs/api-reference/responses
"""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from outrider.cluster.api import Piece
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
from outrider.cluster.serving.protocol import TextFormat
from outrider.cluster.serving.responses_request import NamedFunctionTool, ResponsesRequest
from outrider.cluster.serving.usage import Tally
from outrider.cluster.serving.writers import Sent


class ResponsesWriter:
    """For /v1/responses. An item of the output begins with the first of its text, and ends when the next begins."""

    done = b""

    def __init__(self, body: ResponsesRequest, job: Job, model_name: str) -> None:
        self._body = body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_name = model_name
        self._parser = AnswerParser(job.thoughts != "none", job.thoughts == "open", job.calls)
        self._items: list[_Item] = []
        self._num_sent = 0
        self._reason = ""

    def events(self, index: int, piece: Piece, tally: Tally) -> list[Sent]:
        sent: list[Sent] = []
        if not self._num_sent:
            for name in ("response.created", "response.in_progress"):
                self._send(sent, name, {"response": self._response("in_progress", None)})
        self._take(piece, sent)
        return sent

    def ending(self, tally: Tally) -> list[Sent]:
        sent: list[Sent] = []
        status = self._status()
        self._send(sent, f"response.{status}", {"response": self._response(status, tally)})
        return sent

    def failed(self, error: ApiError) -> Sent:
        sent: list[Sent] = []
        said = {"code": error.code or None, "message": str(error), "param": error.param or None}
        self._send(sent, "error", said)
        return sent[0]

    def whole(self, pieces: Sequence[Sequence[Piece]], tally: Tally) -> dict[str, Any]:
        for piece in pieces[0]:
            self._take(piece, [])
        return self._response(self._status(), tally)

    def _take(self, piece: Piece, sent: list[Sent]) -> None:
        self._reason = piece.finish_reason
        events = self._parser.feed(piece.text)
        if piece.finish_reason:
            events += self._parser.finish()
        for event in events:
            self._add(event, sent)
        if piece.finish_reason:
            self._end_item(sent)

    def _add(self, event: Event, sent: list[Sent]) -> None:
        kind = _KINDS[type(event)]
        if isinstance(event, CallBegins) or not self._items or self._items[-1].kind is not kind:
            self._end_item(sent)
            self._items.append(_Item(kind, event))
            self._send_of_item(
                sent, "response.output_item.added", {"item": self._items[-1].said("in_progress")}
            )
            if kind.part:
                self._send_of_item(sent, "response.content_part.added", {"part": kind.part("")}, of_part=True)
        if isinstance(event, CallBegins):
            return
        self._items[-1].text += event.text
        self._send_of_item(
            sent, f"response.{kind.text_event}.delta", {"delta": event.text}, of_part=bool(kind.part)
        )

    def _end_item(self, sent: list[Sent]) -> None:
        if not self._items or self._items[-1].ended:
            return
        item, kind = self._items[-1], self._items[-1].kind
        item.ended = True
        text = {kind.text_field: item.text}
        self._send_of_item(sent, f"response.{kind.text_event}.done", text, of_part=bool(kind.part))
        if kind.part:
            self._send_of_item(
                sent, "response.content_part.done", {"part": kind.part(item.text)}, of_part=True
            )
        self._send_of_item(sent, "response.output_item.done", {"item": item.said("completed")})

    def _send_of_item(self, sent: list[Sent], name: str, said: dict[str, Any], of_part: bool = False) -> None:
        place: dict[str, Any] = {"output_index": len(self._items) - 1}
        if not name.startswith("response.output_item"):
            place["item_id"] = self._items[-1].id
        if of_part:
            place["content_index"] = 0
        if self._items[-1].kind.text_event == "output_text" and name.startswith("response.output_text"):
            place["logprobs"] = []
        self._send(sent, name, place | said)

    def _send(self, sent: list[Sent], name: str, said: dict[str, Any]) -> None:
        sent.append((name, {"type": name, "sequence_number": self._num_sent, **said}))
        self._num_sent += 1

    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _response(self, status: str, tally: Tally | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model_name,
            "output": [item.said("completed") for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": _choice(body),
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if tally is None else _usage(tally),
            "user": body.user,
        }


class _Kind:
    """A kind of items: what its events are called."""

    def __init__(
        self,
        prefix: str,
        text_event: str,
        text_field: str,
        part: Callable[[str], dict[str, Any]] | None,
        said: Callable[["_Item"], dict[str, Any]],
    ) -> None:
        self.prefix = prefix
        self.text_event = text_event
        self.text_field = text_field
        self.part = part
        self.said = said


class _Item:
    """An item of the output, as far as it has come."""

    def __init__(self, kind: _Kind, event: Event) -> None:
        self.kind = kind
        self.event = event
        self.id = f"{kind.prefix}_{uuid.uuid4().hex}"
        self.text = ""
        self.ended = False

    def said(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "status": status, **self.kind.said(self)}


def _format(body: ResponsesRequest) -> dict[str, Any]:
    """What the text had to be."""
    wanted = (body.text and body.text.format) or TextFormat(type="text")
    return wanted.model_dump(exclude_none=True, by_alias=True)


def _choice(body: ResponsesRequest) -> Any:
    """Which tool had to be called."""
    named = body.tool_choice
    return named.model_dump() if isinstance(named, NamedFunctionTool) else named or "auto"


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_text(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _message_said(item: _Item) -> dict[str, Any]:
    content = [_output_text(item.text)] if item.text else []
    return {"type": "message", "role": "assistant", "content": content}


def _thoughts_said(item: _Item) -> dict[str, Any]:
    content = [_reasoning_text(item.text)] if item.text else []
    return {"type": "reasoning", "summary": [], "content": content}


def _call_said(item: _Item) -> dict[str, Any]:
    begins = item.event
    assert isinstance(begins, CallBegins)
    return {"type": "function_call", "call_id": begins.id, "name": begins.name, "arguments": item.text}


_MESSAGE = _Kind("msg", "output_text", "text", _output_text, _message_said)
_THOUGHTS = _Kind("rs", "reasoning_text", "text", _reasoning_text, _thoughts_said)
_CALL = _Kind("fc", "function_call_arguments", "arguments", None, _call_said)
_KINDS: dict[type, _Kind] = {Content: _MESSAGE, Thought: _THOUGHTS, CallBegins: _CALL, CallArguments: _CALL}


def _usage(tally: Tally) -> dict[str, Any]:
    said = tally.usage()
    return {
        "input_tokens": said["prompt_tokens"],
        "input_tokens_details": said["prompt_tokens_details"],
        "output_tokens": said["completion_tokens"],
        "total_tokens": said["total_tokens"],
        "speculative": said["speculative"],
    }
