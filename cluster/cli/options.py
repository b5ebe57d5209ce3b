"""Options that several commands share, and what they come to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file or preset name (quickstart, ...).")
]
Overrides = Annotated[
    list[str],
    typer.Argument(metavar="[a.b=c ...]", help="Configuration to change.", show_default=False),
]

# None means "not on the command line": the value of the config's `sampling` section holds.
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0: all.", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="Keep this much probability.", show_default=False)]
MinP = Annotated[
    float | None, typer.Option(help="Keep tokens this likely, relative to the likeliest.", show_default=False)
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="On tokens of prompt and output; 1: off.", show_default=False)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="On tokens that occurred in the output.", show_default=False)
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="As presence, for each occurrence.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", show_default=False)]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)]
Stop = Annotated[list[str], typer.Option(help="End before this text; may be repeated.", show_default=False)]

MinTokens = Annotated[int | None, typer.Option(help="Shortest answer, in tokens.", show_default=False)]
JsonSchema = Annotated[
    str | None, typer.Option(metavar="FILE", help="Answer with JSON of this schema.", show_default=False)
]
Regex = Annotated[
    str | None, typer.Option(help="Answer with what this expression matches.", show_default=False)
]
Choice = Annotated[list[str], typer.Option(help="Answer with this or another --choice.", show_default=False)]
GrammarFile = Annotated[
    str | None,
    typer.Option(
        "--grammar", metavar="FILE", help="Answer in this language: Lark, or GBNF.", show_default=False
    ),
]

Plain = Annotated[bool, typer.Option("--plain", help="Decode without drafting.")]
DraftMethods = Annotated[
    list[str],
    typer.Option("--draft-method", help="Draft with this method only; may be repeated.", show_default=False),
]
DraftNodes = Annotated[int | None, typer.Option(help="Most drafted tokens per round.", show_default=False)]
DraftDepth = Annotated[int | None, typer.Option(help="Longest drafted path, in tokens.", show_default=False)]

Rule = Annotated[
    str | None,
    typer.Option("--rule", help="Accept drafted tokens by: exact, typical, judge.", show_default=False),
]
JudgeName = Annotated[
    str | None, typer.Option("--judge", help="With --rule judge: which one.", show_default=False)
]
Threshold = Annotated[
    float | None, typer.Option(help="With --rule judge: keep above this score.", show_default=False)
]
Epsilon = Annotated[float | None, typer.Option(help="With --rule typical.", show_default=False)]
Delta = Annotated[float | None, typer.Option(help="With --rule typical.", show_default=False)]

Instruction = Annotated[
    str,
    typer.Option(
        help="Below each word problem; default: to think step by step and name the answer last.",
        show_default=False,
    ),
]

TemplateArguments = Annotated[
    list[str],
    typer.Option(
        "--template",
        metavar="NAME=VALUE",
        help="Argument of the chat template, e.g. enable_thinking=false; may be repeated.",
        show_default=False,
    ),
]


def template_arguments(given: list[str]) -> dict[str, object]:
    """The `template` part of a GenerationRequest, of texts "name=value"; a value that is not JSON is a text."""
    arguments: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--template must be NAME=VALUE, got {text!r}")
        try:
            arguments[name] = json.loads(value)
        except json.JSONDecodeError:
            arguments[name] = value
    return arguments


def structured_outputs(
    json_schema: str | None, regex: str | None, choice: list[str], grammar: str | None
) -> dict[str, object] | None:
    """The `structured_outputs` of a request's sampling; None where any answer will do."""
    asked = {
        "json": None if json_schema is None else _read("--json-schema", json_schema),
        "regex": regex,
        "choice": choice,
        "grammar": None if grammar is None else _read("--grammar", grammar),
    }
    return given(asked) or None


def _read(option: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} must be a file of text, got {file!r}: {error}") from error


def given(options: Mapping[str, object]) -> dict[str, object]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def draft_options(plain: bool, methods: list[str], nodes: int | None, depth: int | None) -> dict[str, object]:
    """The `draft` part of a GenerationRequest."""
    if plain and (methods or nodes is not None or depth is not None):
        raise ValueError("--plain must stand alone: without drafting there is no method, size or depth")
    return given({"methods": methods, "max_nodes": 0 if plain else nodes, "max_depth": depth})


def acceptance_options(
    rule: str | None, judge: str | None, threshold: float | None, epsilon: float | None, delta: float | None
) -> dict[str, object]:
    """The `acceptance` part of a GenerationRequest."""
    return given({"rule": rule, "judge": judge, "threshold": threshold, "epsilon": epsilon, "delta": delta})
