"""Text of a model, as it comes, into what it is: thoughts, content, calls of tools.

Thoughts stand between <think> and </think> at the beginning. Calls have one of two forms:

- `hermes`, of Hermes 2 Pro, which Qwen's models and Mellum 2 write, too:
  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere, any number
  (https://github.com/NousResearch/Hermes-Function-Calling);
- `llama3`, of Llama 3.1 and later: {"name": ..., "parameters": {...}} as the whole answer, <|python_tag|> before it
  or not; several are parted by semicolons (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1).
"""

import json
import re
import uuid
from dataclasses import dataclass

from outrider.cluster.api import CallForm

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
# How calls of Llama's begin, without blanks.
_BARE_HEADS = ('{"name":"', '{"type":"function","name":"')
# A name with escapes is read with the whole call.
_NAMED = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BARE_NAMED = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)'
)
_MAX_HEAD = 4096  # characters of a call before its arguments; more is no call


@dataclass(frozen=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """The model calls a tool; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """Text of the arguments of the call that began last: JSON, in parts."""

    index: int
    text: str


Event = Thought | Content | CallBegins | CallArguments


class AnswerParser:
    """Reads one answer. Text that may be the beginning of a tag is held back until it is known.

    Nothing is lost: what looks like a call and is none comes out as content.

    thoughts: whether there may be thoughts. in_thoughts: the prompt ended with <think>. calls: their form, or
    none where there are none.
    """

    def __init__(self, thoughts: bool, in_thoughts: bool, calls: CallForm) -> None:
        self.num_calls = 0
        self._calls = calls == "hermes"
        self._held = ""
        self._behind_thoughts = self._bare_call if calls == "llama3" else self._content
        self._behind_call = self._bare_tail if calls == "llama3" else self._tail
        self._read = self._begin if thoughts and not in_thoughts else self._behind_thoughts
        if thoughts and in_thoughts:
            self._read = self._think
        self._trims = in_thoughts  # whether line feeds at the beginning are left out
        self._depth = 0  # of brackets in arguments
        self._in_string = self._escaped = False

    def feed(self, text: str) -> list[Event]:
        """What is known after more text."""
        self._held += text
        return self._events(last=False)

    def finish(self) -> list[Event]:
        """What is left at the end."""
        return self._events(last=True)

    def _events(self, last: bool) -> list[Event]:
        events: list[Event] = []
        before = None
        # A reader takes what it can from the held text and may hand over to another.
        while (self._held, self._read) != before:
            before = (self._held, self._read)
            self._read(events, last)
        return events

    def _begin(self, events: list[Event], last: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(_THINK):
            self._held, self._read, self._trims = text[len(_THINK) :], self._think, True
        elif last or not _THINK.startswith(text):
            self._read = self._behind_thoughts

    def _think(self, events: list[Event], last: bool) -> None:
        text, closed = self._until(_END_THINK, last)
        if text:
            events.append(Thought(text))
        if closed:
            self._read, self._trims = self._behind_thoughts, True

    def _content(self, events: list[Event], last: bool) -> None:
        if self._calls:
            text, called = self._until(_CALL, last)
        else:
            (text, self._held), called = (self._trimmed(self._held), ""), False
        if text:
            events.append(Content(text))
        if called:
            self._read = self._head

    def _head(self, events: list[Event], last: bool) -> None:
        """Behind <tool_call>, before the arguments."""
        found = _NAMED.match(self._held)
        if found:
            self._begin_call(found[1], events)
            self._held, self._read, self._depth = self._held[found.end() :], self._arguments, 0
            return
        block, closed, rest = self._held.partition(_END_CALL)
        if closed:
            self._held = rest
            self._whole(block, events)
            self._read, self._trims = self._content, True
        elif last or len(self._held) > _MAX_HEAD:
            events.append(Content(_CALL + self._held))
            self._held, self._read = "", self._content

    def _whole(self, block: str, events: list[Event]) -> None:
        """A call in another order of fields, or none."""
        try:
            call = json.loads(block)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            name = arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            events.append(Content(_CALL + block + _END_CALL))
            return
        self._begin_call(name, events)
        events.append(CallArguments(self.num_calls - 1, json.dumps(arguments, ensure_ascii=False)))

    def _arguments(self, events: list[Event], last: bool) -> None:
        end = self._end_of_arguments()
        if end:
            events.append(CallArguments(self.num_calls - 1, self._held[:end]))
            self._held = self._held[end:]
        if end and not self._depth:
            self._read = self._behind_call

    def _end_of_arguments(self) -> int:
        """How many of the held characters belong to the arguments, which end where their bracket closes."""
        for position, char in enumerate(self._held, 1):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return position
        return len(self._held)

    def _tail(self, events: list[Event], last: bool) -> None:
        """Behind the arguments: a bracket and the closing tag, which say nothing."""
        text = self._held.lstrip().removeprefix("}").lstrip()
        if text.startswith(_END_CALL):
            self._held, self._read, self._trims = text[len(_END_CALL) :], self._content, True
        elif last or not _END_CALL.startswith(text):
            self._held, self._read, self._trims = text, self._content, True

    def _bare_call(self, events: list[Event], last: bool) -> None:
        """Where a call of Llama's may begin."""
        text = self._held.lstrip()
        if _PYTHON_TAG.startswith(text) and not last:
            return
        text = text.removeprefix(_PYTHON_TAG)
        found = _BARE_NAMED.match(text)
        if found:
            self._begin_call(found[1], events)
            self._held, self._read, self._depth = text[found.end() :], self._arguments, 0
            return
        seen = "".join(text.split())
        may_be_call = any(head.startswith(seen) or seen.startswith(head) for head in _BARE_HEADS)
        if last or not may_be_call or len(text) > _MAX_HEAD:
            self._read = self._content

    def _bare_tail(self, events: list[Event], last: bool) -> None:
        """Behind the arguments of a call of Llama's: a bracket, and perhaps another call."""
        text = self._held.lstrip().removeprefix("}").lstrip()
        if text.startswith(";"):
            self._held, self._read = text[1:], self._bare_call
        elif text or last:
            self._held, self._read, self._trims = text, self._content, True

    def _begin_call(self, name: str, events: list[Event]) -> None:
        events.append(CallBegins(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.num_calls += 1

    def _until(self, tag: str, last: bool) -> tuple[str, bool]:
        """Takes the held text up to a tag, and the tag, if it is there; else what is surely no part of one."""
        text, found, rest = self._held.partition(tag)
        if found:
            self._held = rest
            return self._trimmed(text), True
        num_doubtful = 0 if last else _beginning_at_end(text, tag)
        self._held = text[len(text) - num_doubtful :]
        return self._trimmed(text[: len(text) - num_doubtful]), False

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text


def _beginning_at_end(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((size for size in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:size])), 0)
