"""OpenAI's /v1/responses, stateless: items in, items out.

Source of the form: https://platform.openai.com/docs/api-reference/responses
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from outrider.cluster.api import Piece
from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.jobs import Job, chat_job
from outrider.cluster.serving.parsing import (
    AnswerParser,
    CallArguments,
    CallBegins,
    Content,
    Event,
    Thought,
)
from outrider.cluster.serving.protocol import (
    ChatRequest,
    Function,
    FunctionCall,
    Message,
    Only,
    Speculative,
    TextPart,
    Tool,
    ToolCall,
    Wire,
)
from outrider.cluster.serving.usage import Tally
from outrider.cluster.serving.writers import Sent
from outrider.configs.schema import Config


class InputText(Wire):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    # As an answer comes back.
    annotations: Annotated[Any, Only([])] = None
    logprobs: Annotated[Any, Only([])] = None


class InputMessage(Wire):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    # As an answer comes back.
    id: str | None = None
    status: str | None = None


class CallItem(Wire):
    """A call of a tool that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    # As an answer comes back.
    id: str | None = None
    status: str | None = None


class CallOutput(Wire):
    """What a tool said."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class ThoughtText(Wire):
    """A part of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtsItem(Wire):
    """Thoughts of the model."""

    type: Literal["reasoning"]
    content: list[ThoughtText]
    summary: Annotated[Any, Only([])] = None
    encrypted_content: Annotated[Any, Only()] = None
    id: str | None = None
    status: str | None = None


class FunctionTool(Wire):
    """What a model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, Only(False)] = None


InputItem = InputMessage | CallItem | CallOutput | ThoughtsItem


class ResponsesRequest(Wire):
    """Body of /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    """Comes back in the answer."""
    seed: int | None = None
    speculative: Literal["off"] | Speculative | None = None

    store: Annotated[Any, Only(False)] = None
    previous_response_id: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    background: Annotated[Any, Only(False)] = None
    include: Annotated[Any, Only([])] = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    max_tool_calls: Annotated[Any, Only()] = None
    text: Annotated[Any, Only({}, {"format": {"type": "text"}})] = None
    reasoning: Annotated[Any, Only({})] = None
    truncation: Annotated[Any, Only("disabled")] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    stream_options: Annotated[Any, Only({}, {"include_obfuscation": False})] = None


def responses_job(body: ResponsesRequest, config: Config) -> Job:
    """Raises ApiError for what is wrong with the body alone."""
    items: Sequence[InputItem] = (
        [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    )
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages += _messages(items)
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)))
        for tool in body.tools or ()
    ]
    chat = ChatRequest(
        messages=messages,
        stream=body.stream,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        user=body.user,
        speculative=body.speculative,
        tools=tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )
    return replace(chat_job(chat, config), prompt_field="input")


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """Thoughts, text and calls of the model that follow each other are one message, as chat templates have it."""
    messages: list[Message] = []
    for item in items:
        match item:
            case CallOutput():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case InputMessage() if item.role != "assistant":
                messages.append(Message(role=item.role, content=_content(item.content)))
            case _:
                said = (
                    messages[-1]
                    if messages and messages[-1].role == "assistant"
                    else Message(role="assistant")
                )
                if not messages or said is not messages[-1]:
                    messages.append(said)
                _add_to(said, item)
    return messages


def _add_to(said: Message, item: InputItem) -> None:
    if isinstance(item, CallItem):
        function = FunctionCall(name=item.name, arguments=item.arguments)
        said.tool_calls = [*(said.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
    elif isinstance(item, ThoughtsItem):
        thoughts = "".join(part.text for part in item.content)
        said.reasoning_content = (said.reasoning_content or "") + thoughts
    elif isinstance(item, InputMessage):
        added = _content(item.content)
        texts = [part.text for part in added] if isinstance(added, list) else [added]
        before = [said.content] if isinstance(said.content, str) else []
        said.content = "\n".join([*before, *texts])


def _content(content: str | list[InputText]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=part.text) for part in content]


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
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
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
