"""What answers must be, as grammars: which texts match, what is refused, and that calls are read back."""

import json
from typing import Any

import pytest

from outrider.cluster.serving.parsing import AnswerParser, CallArguments, CallBegins
from outrider.cluster.structured import CALL_FORMS, MAX_CHARACTERS, grammar_of
from outrider.workers.sampling.grammars import GrammarState
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from support.confined import TINY_GRAMMARS, TINY_VOCABULARY

NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTIONS = [{"name": "weather", "parameters": NAMED}, {"name": 'the "time"'}]


def matches(asked: object, text: str) -> bool:
    """Whether a text is one that an answer may be."""
    grammar = grammar_of(asked)
    TINY_GRAMMARS.check(grammar)
    tokens = tokenizer_of_size(TINY_VOCABULARY).encode(text, add_special_tokens=False)
    return GrammarState(TINY_GRAMMARS, grammar).may_end(tokens)


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"json": NAMED}, '{"a": 1}', '{"a": "x"}'),
        ({"json": json.dumps(NAMED)}, '{ "a" : 1 }', "{}"),
        ({"json": NAMED, "disable_any_whitespace": True}, '{"a":1}', '{"a": 1}'),
        ({"json": NAMED, "whitespace_pattern": "_*"}, '{_"a":1}', '{ "a":1}'),
        ({"json_object": True}, '{"x": [null]}', "[1]"),
        ({"regex": r"a/b\d+"}, "a/b12", "a/b"),
        ({"choice": ["yes", 'qu"o\nte/\\']}, 'qu"o\nte/\\', "ye"),
        ({"grammar": 'start: "a" b\nb: "x" | "y"'}, "ay", "a"),
        ({"grammar": 'root ::= "a" b\nb ::= [xy]+'}, "axyx", "xa"),
    ],
)
def test_texts_match_or_do_not(asked: object, good: str, bad: str) -> None:
    assert matches(asked, good)
    assert not matches(asked, bad)


REFERRING = {f"a{n}": {"properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(300)}
CHAIN = "start: r0\n" + "".join(f'r{n}: r{n + 1} "a"\n' for n in range(600)) + 'r600: "b"'
BAD = [
    (5, "structured_outputs must be an object with one of json, regex"),
    ({}, "exactly one of"),
    ({"json": {}, "regex": "a"}, "exactly one of"),
    ({"xml": "a"}, "unknown key sampling.structured_outputs.xml"),
    ({"json": "{"}, "json must be a JSON schema"),
    ({"json": {"type": "thing"}}, "thing"),
    ({"json": {"uniqueItems": True, "type": "array"}}, "uniqueItems"),
    ({"json_object": False}, "json_object must be true"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": ""}, "regex must be a text"),
    ({"choice": []}, "choice must be a list of texts"),
    ({"choice": ["x" * MAX_CHARACTERS]}, "must be at most 65536 characters"),
    ({"grammar": "start: x"}, 'unknown name: "x"'),
    ({"grammar": 'root ::= "'}, "grammar of Lark or GBNF"),
    ({"grammar": "x\nstart[temperature=0.5]: /a/"}, "without temperature"),
    ({"grammar": 'start: a::0\na::_: a::incr(_) "x" | "y"'}, "parametric"),
    ({"regex": "a", "disable_any_whitespace": True}, "left out unless"),
    ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern must be a text"),
    ({"calls": {"form": "hermes", "functions": [], "parallel": True}}, "a function at least"),
    # The library calls itself for each of these, until its stack is full.
    (
        {"json": {"$ref": "#/$defs/a0", "$defs": {**REFERRING, "a300": {}}}},
        "levels with those of what it refers",
    ),
    ({"grammar": CHAIN}, "at most 500 rules"),
]


@pytest.mark.parametrize(("asked", "reason"), BAD)
def test_what_cannot_be_followed_is_refused(asked: object, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        TINY_GRAMMARS.check(grammar_of(asked))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("form", CALL_FORMS)
def test_forced_calls_are_read_back(form: Any) -> None:
    key = "arguments" if form == "hermes" else "parameters"
    calls = [f'{{"name": "weather", "{key}": {{"a": 1}}}}', f'{{"name": "the \\"time\\"", "{key}": {{}}}}']
    if form == "hermes":
        calls = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    asked = {"calls": {"form": form, "functions": FUNCTIONS, "parallel": True}}
    both = ("\n" if form == "hermes" else "; ").join(calls)
    assert matches(asked, both)
    assert matches(asked, calls[0])
    assert not matches(asked, "")
    assert not matches(asked, calls[0].replace("weather", "rain"))
    assert not matches(asked, calls[0].replace("1", "true"))
    one = {"calls": {**asked["calls"], "parallel": False}}
    assert matches(one, calls[0])
    assert not matches(one, both)
    parser = AnswerParser(thoughts=True, in_thoughts=False, calls=form)
    events = [*parser.feed(calls[0]), *parser.finish()]
    begins = [event.name for event in events if isinstance(event, CallBegins)]
    said = "".join(event.text for event in events if isinstance(event, CallArguments))
    assert (begins, said) == (["weather"], '{"a": 1}')
