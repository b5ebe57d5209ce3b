"""What an answer must be, as users say it, and the grammar that it comes to.

The fields are those of vLLM's `structured_outputs`; regular expressions, schemas and grammars are read as llguidance
reads them (https://github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md).
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

FIELD = "sampling.structured_outputs"
KINDS = ("json", "regex", "choice", "grammar", "json_object", "calls")
CALL_FORMS = ("hermes", "llama3")
_WHITESPACE = {"disable_any_whitespace": bool, "whitespace_pattern": str}

MAX_CHARACTERS = 2**16  # of a grammar: one that is as large as this is compiled in half a second
# llguidance calls itself for what a rule or a schema refers to. A stack of two megabytes holds twice as many.
MAX_RULES = 500
MAX_REFERENCED_LEVELS = 500
_MAX_REFERENCES_IN_GRAMMAR = 4  # of schemas inside of a grammar, each of them up to 128 levels deep

_RULE = re.compile(r"^[^\n:]*[\w\])}]\s*:", re.MULTILINE)
_PARAMETRIC = re.compile(r"^[ \t]*[?!]?[\w-]+::", re.MULTILINE)
_TEMPERATURE = re.compile(r"\[[^\]\n]*\btemperature\s*=")
# Any spelling of a text that matches is allowed: how text is cut into tokens is the model's choice.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


def grammar_of(asked: object) -> str:
    """Of `structured_outputs`, an object with exactly one of `KINDS`: a grammar in llguidance's form of Lark.

    Raises ValueError, one line that names the field. What only the library knows it says at the door.
    """
    if not isinstance(asked, Mapping):
        raise _error("", f"an object with one of {', '.join(KINDS)}", asked)
    given = {name: value for name, value in asked.items() if value is not None}
    unknown = [name for name in given if name not in (*KINDS, *_WHITESPACE)]
    if unknown:
        allowed = ", ".join((*KINDS, *_WHITESPACE))
        raise ValueError(f"unknown key {FIELD}.{unknown[0]}; allowed in {FIELD}: {allowed}")
    kinds = [name for name in KINDS if name in given]
    if len(kinds) != 1:
        raise _error("", f"an object with exactly one of {', '.join(KINDS)}", sorted(map(str, given)))
    (kind,) = kinds
    options = _whitespace(given, kind)
    value = given[kind]
    if kind == "json":
        text = _schema(value, options)
    elif kind == "json_object":
        if value is not True:
            raise _error("json_object", "true", value)
        text = _schema({"type": "object"}, options)
    elif kind == "regex":
        text = f"start: /{regex_to_lark(_text(kind, value))}/"
    elif kind == "choice":
        text = _choice(value)
    elif kind == "calls":
        text = _calls(value)
    else:
        text = _lark(_text(kind, value))
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{FIELD}.{kind} must be at most {MAX_CHARACTERS} characters as a grammar, got {len(text)}"
        )
    return text + _OPTIONS


def _schema(value: object, options: Mapping[str, Any]) -> str:
    """As vLLM, a schema may be a text of JSON, too."""
    allowed = "a JSON schema, an object or a text of one"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _error("json", allowed, value) from error
    if not isinstance(value, Mapping):
        raise _error("json", allowed, value)
    return "start: " + _json(value, "json", options)


def _json(value: Mapping[Any, Any], name: str, options: Mapping[str, Any]) -> str:
    """A schema as a part of a rule."""
    schema = dict(value)
    if options:
        own = schema.get("x-guidance", {})
        schema["x-guidance"] = {**own, **options} if isinstance(own, Mapping) else own
    levels, references = _size(schema)
    if (references + 1) * levels > MAX_REFERENCED_LEVELS and references:
        raise ValueError(
            f"{FIELD}.{name} must have at most {MAX_REFERENCED_LEVELS} levels with those of what it refers to, got "
            f"{levels} levels and {references} different $ref"
        )
    try:
        return "%json " + json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(name, "what JSON can say", value) from error


def _size(schema: object) -> tuple[int, int]:
    """How deep a schema is, and to how many places it refers."""
    deepest, references, left = 0, set(), [(schema, 1)]
    while left and deepest <= MAX_REFERENCED_LEVELS:
        value, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(value, Mapping):
            references |= {repr(value[key]) for key in ("$ref", "$dynamicRef") if key in value}
            left += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            left += [(item, depth + 1) for item in value]
    return deepest, len(references)


def _choice(value: object) -> str:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        raise _error("choice", "a list of texts, one at least", value)
    # One terminal, not as many rules: the lexer tells thousands apart at once.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value)


def _calls(value: object) -> str:
    """Calls of functions: `{"form": "hermes" or "llama3", "functions": [{"name": ..., "parameters": a schema}, ...],
    "parallel": whether there may be several}`, as `serving/parsing.py` reads them."""
    allowed = "an object with form, functions and parallel"
    if not isinstance(value, Mapping) or value.keys() != {"form", "functions", "parallel"}:
        raise _error("calls", allowed, value)
    form, functions = value["form"], value["functions"]
    if form not in CALL_FORMS or not isinstance(functions, list | tuple) or not functions:
        raise _error(
            "calls", f"{allowed}, of a form among {', '.join(CALL_FORMS)}, with a function at least", value
        )
    rules: list[str] = []
    for function in functions:
        name = function.get("name") if isinstance(function, Mapping) else None
        parameters = (function.get("parameters") or {}) if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not isinstance(parameters, Mapping):
            raise _error("calls.functions", "objects with a name and, perhaps, parameters", function)
        head = f'{{"name": {json.dumps(name)}, "{"arguments" if form == "hermes" else "parameters"}": '
        schema = _json({"type": "object", **parameters}, "calls", {})
        rules.append(f"function_{len(rules)}: {json.dumps(head)} {schema} {json.dumps('}')}")
    call, between = ("call", r"\n") if form == "hermes" else ("function", "; ")
    start = f'start: {call} ("{between}" {call})*' if value["parallel"] else f"start: {call}"
    wrapped = r'call: "<tool_call>\n" function "\n</tool_call>"'
    function = "function: " + " | ".join(f"function_{index}" for index in range(len(rules)))
    return "\n".join([start, *([wrapped] if form == "hermes" else ()), function, *rules])


def _lark(grammar: str) -> str:
    """Lark as it is; EBNF as llama.cpp has it (GBNF) is made to be Lark."""
    if len(grammar) > MAX_CHARACTERS:
        return grammar
    if _TEMPERATURE.search(grammar):
        raise ValueError(f"{FIELD}.grammar must be without temperature=: a request has one temperature")
    try:
        text: str = any_to_lark(grammar)
    except Exception as error:  # the converter's own, IndexError and RecursionError among them
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{FIELD}.grammar must be a grammar of Lark or GBNF: {reason[0][:300]}") from error
    num_rules = len(_RULE.findall(text))
    if num_rules > MAX_RULES:
        raise ValueError(f"{FIELD}.grammar must have at most {MAX_RULES} rules, got {num_rules}")
    num_references = text.count('Ref"') + text.count("$ref")
    if num_references > _MAX_REFERENCES_IN_GRAMMAR:
        raise ValueError(
            f"{FIELD}.grammar must have at most {_MAX_REFERENCES_IN_GRAMMAR} $ref in its schemas, "
            f"got {num_references}"
        )
    if _PARAMETRIC.search(text):  # they may have as many forms as there are numbers of 64 bits
        raise ValueError(f"{FIELD}.grammar must be without parametric rules (name::parameter)")
    return text


def _whitespace(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Options of the library for schemas."""
    for name, of_type in _WHITESPACE.items():
        if name in given and type(given[name]) is not of_type:
            raise _error(name, "true or false" if of_type is bool else "a text", given[name])
    options: dict[str, Any] = {}
    if given.get("disable_any_whitespace"):
        options["whitespace_flexible"] = False
    if "whitespace_pattern" in given:
        options["whitespace_pattern"] = given["whitespace_pattern"]
    if options and kind not in ("json", "json_object"):
        name = next(name for name in _WHITESPACE if name in given)
        raise _error(name, "left out unless there is json or json_object", given[name])
    return options


def _text(kind: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _error(kind, "a text", value)
    return value


def _error(name: str, allowed: str, value: object) -> ValueError:
    field = f"{FIELD}.{name}" if name else FIELD
    return ValueError(f"{field} must be {allowed}, got {reprlib.repr(value)}")
