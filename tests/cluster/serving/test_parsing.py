"""Thoughts, content and calls of tools, however the text is cut."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cluster.api import CallForm
from outrider.cluster.serving.parsing import (
    AnswerParser,
    CallArguments,
    CallBegins,
    Content,
    Event,
    Thought,
)

WEATHER = (
    '<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "Z\\"}ü", "days": [1, {"a": "</tool_call>"}]}}\n</tool_call>'
)
TIME = '<tool_call>{"arguments": {}, "name": "time"}</tool_call>'


def joined(events: Sequence[Event]) -> dict[str, Any]:
    calls: list[dict[str, str]] = []
    for event in events:
        if isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append({"name": event.name, "arguments": ""})
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1]["arguments"] += event.text
    return {
        "thoughts": "".join(event.text for event in events if isinstance(event, Thought)),
        "content": "".join(event.text for event in events if isinstance(event, Content)),
        "calls": [(call["name"], json.loads(call["arguments"])) for call in calls],
    }


def parse(
    parts: Sequence[str], thoughts: bool = True, in_thoughts: bool = False, calls: CallForm = "hermes"
) -> list[Event]:
    parser = AnswerParser(thoughts, in_thoughts, calls)
    events = [event for part in parts for event in parser.feed(part)]
    return events + parser.finish()


CITY = ("weather", {"city": 'Z"}ü', "days": [1, {"a": "</tool_call>"}]})
CASES = [
    ("plain text", "", "plain text", []),
    ("\n<think>\nhm <b> </thin\n</think>\n\nyes", "hm <b> </thin\n", "yes", []),
    ("<think>never ends", "never ends", "", []),
    ("<thinking>", "", "<thinking>", []),
    ("a < b <tool", "", "a < b <tool", []),
    (f"<think>x</think>\n\nI look.\n{WEATHER}\n{TIME}", "x", "I look.\n", [CITY, ("time", {})]),
    (WEATHER + "\nthere", "", "there", [CITY]),
    ("<tool_call>not json</tool_call> so", "", "<tool_call>not json</tool_call> so", []),
    ('<tool_call>{"name": 5}</tool_call>', "", '<tool_call>{"name": 5}</tool_call>', []),
    (
        '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
        "",
        '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": "\\u0061", "arguments": {}}</tool_call>', "", "", [("a", {})]),
    ('<tool_call>{"name"', "", '<tool_call>{"name"', []),
]


BARE = '{"name": "weather", "parameters": {"city": "Ulm", "days": [{}]}}'
ULM = ("weather", {"city": "Ulm", "days": [{}]})
BARE_CASES = [
    (BARE, "", "", [ULM]),
    ("<think>x</think>\n\n" + BARE, "x", "", [ULM]),
    (f"<|python_tag|>{BARE}; {BARE}", "", "", [ULM, ULM]),
    ('{"type": "function", "name": "time", "parameters": {}}', "", "", [("time", {})]),
    (f"I call {BARE}", "", f"I call {BARE}", []),
    ('{"names": ["a"]}', "", '{"names": ["a"]}', []),
    ('{"name": "a"}', "", '{"name": "a"}', []),
    (BARE + "\nthere", "", "there", [ULM]),
    ("", "", "", []),
]


@pytest.mark.parametrize(("text", "thoughts", "content", "calls"), BARE_CASES)
@given(cuts=st.lists(st.integers(0, 90), max_size=9))
def test_calls_of_llama_are_read_however_they_are_cut(
    text: str, thoughts: str, content: str, calls: list[Any], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[begin:end] for begin, end in pairwise(places)]
    assert joined(parse(parts, calls="llama3")) == {"thoughts": thoughts, "content": content, "calls": calls}


def test_arguments_of_a_llama_are_streamed_as_they_come() -> None:
    parser = AnswerParser(thoughts=True, in_thoughts=False, calls="llama3")
    assert parser.feed('{"name": "f", "parameters"') == []
    assert isinstance(parser.feed(": {")[0], CallBegins)
    assert parser.feed('"a": "b') == [CallArguments(0, '"a": "b')]
    assert parser.feed('"}}') == [CallArguments(0, '"}')]


@pytest.mark.parametrize(("text", "thoughts", "content", "calls"), CASES)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_the_parts_do_not_depend_on_how_the_text_is_cut(
    text: str, thoughts: str, content: str, calls: list[Any], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[begin:end] for begin, end in pairwise(places)]
    assert joined(parse(parts)) == {"thoughts": thoughts, "content": content, "calls": calls}
    assert joined(parse(list(text))) == {"thoughts": thoughts, "content": content, "calls": calls}


def test_arguments_are_streamed_as_they_come() -> None:
    parser = AnswerParser(thoughts=False, in_thoughts=False, calls="hermes")
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    begins, bracket = parser.feed("{")
    assert isinstance(begins, CallBegins)
    assert bracket == CallArguments(0, "{")
    assert parser.feed('"a": "b') == [CallArguments(0, '"a": "b')]
    assert parser.feed('c"}}\n</tool_call>') == [CallArguments(0, 'c"}')]
    assert parser.finish() == []


def test_what_is_not_looked_for_is_content() -> None:
    text = f"<think>x</think>{TIME}"
    assert joined(parse([text], thoughts=False, calls=False))["content"] == text
    opened = joined(parse(["x</think>\n\ny"], in_thoughts=True))
    assert (opened["thoughts"], opened["content"]) == ("x", "y")
