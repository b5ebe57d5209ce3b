"""What a request says: the types, and what is refused before it is sent."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from outrider.cluster.client.answers import RefusedError
from outrider.cluster.serving.errors import of_validation

Messages = Sequence[Mapping[str, Any]]
"""`{"role": ..., "content": ...}`, and what else a message may carry."""

Prompt = str | Sequence[int] | Messages
"""A text that is continued as it stands, token ids, or messages that go through the model's chat template."""

Form = Literal["text", "tokens", "messages"]

INVALID = "invalid_value"

# What a server has beside these it says itself. NaN is nothing that JSON can say.
_CONFIG = ConfigDict(extra="allow", allow_inf_nan=False)


@with_config(_CONFIG)
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


@with_config(_CONFIG)
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


@with_config(_CONFIG)
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


_OPTIONS: TypeAdapter[Options] = TypeAdapter(Options)


def read_prompt(prompt: Prompt) -> tuple[Form, Any]:
    """What kind of prompt this is, and the prompt as JSON has it. Raises RefusedError for what is none."""
    if isinstance(prompt, str):
        return "text", prompt
    # Arrays are no Sequence, but lists of numbers all the same.
    if hasattr(prompt, "__len__") and not isinstance(prompt, bytes | bytearray | Mapping):
        parts: list[Any] = list(prompt)
        if parts and all(isinstance(part, Mapping) for part in parts):
            return "messages", parts
        if all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts):
            return "tokens", [int(part) for part in parts]
    several = " (several prompts: batch)" if isinstance(prompt, list | tuple) else ""
    raise RefusedError(
        400,
        f"prompt must be a text, a list of messages or a list of token ids, got {type(prompt).__name__} "
        f"{repr(prompt)[:100]}{several}",
        "prompt",
        INVALID,
    )


def check_messages(messages: Messages) -> None:
    """Raises RefusedError for a prompt of another kind."""
    if read_prompt(messages)[0] != "messages":
        raise RefusedError(
            400, f"messages must be a list of messages, got {repr(messages)[:100]}", "messages", INVALID
        )


def checked(options: Options | None) -> Options:
    """The options as JSON has them. Raises RefusedError, naming the field, for one that there is not, and for a value
    that is nothing that it can be."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise RefusedError(400, f"options must be a mapping, got {options!r}", "options", INVALID)
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        allowed, names = ", ".join(Options.__annotations__), ", ".join(sorted(map(str, unknown)))
        raise RefusedError(
            400, f"options must be among {allowed}, got {names}", min(map(str, unknown)), "unknown_parameter"
        )
    try:
        return _OPTIONS.validate_python(options)
    except ValidationError as error:
        found = of_validation(error.errors())
        raise RefusedError(found.status, str(found), found.param, found.code) from error


def entry_parts(entry: BatchEntry) -> tuple[Prompt, Options | None]:
    """Of one request of a batch. Raises RefusedError for what is none."""
    if (
        not isinstance(entry, Mapping)
        or "prompt" not in entry
        or entry.keys() - BatchEntry.__annotations__.keys()
    ):
        allowed = ", ".join(BatchEntry.__annotations__)
        raise RefusedError(
            400,
            f"an entry must be a mapping of {allowed}, with a prompt, got {repr(entry)[:100]}",
            "prompt",
            INVALID,
        )
    return entry["prompt"], entry.get("options")
