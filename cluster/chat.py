"""Messages and arguments of a chat template, checked, and the text that the model's own template makes of them."""

import inspect
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What templates read of a message besides its role: those of Mellum 2, Qwen3, SmolLM2 and Llama 3.
MESSAGE_FIELDS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
# Arguments of transformers' method that are given to the template, not to the method.
_OF_TEMPLATE = ("tools", "documents")


def read_messages(messages: Sequence[Mapping[object, object]]) -> list[dict[str, Any]]:
    """As templates take them. Raises ValueError, one line, for a message that is none."""
    return [_message(message) for message in messages]


def render(
    tokenizer: "PreTrainedTokenizerFast", conversation: list[dict[str, Any]], arguments: Mapping[str, object]
) -> str:
    """The text that begins the model's next turn, as transformers renders it.

    Args:
        conversation: of `read_messages`.
        arguments: of the template: `tools`, `documents`, and those that it names itself, e.g. `enable_thinking`.

    Raises:
        ValueError: the model has no template, an argument is none of a template's, or the template refuses what it
            gets.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages need a chat template, which this model lacks; send a text (--raw)")
    given = _arguments(tokenizer, arguments)
    try:
        text = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False, **given
        )
    except Exception as error:
        # A template is a program of the model's: it refuses messages, or fails at them, in its own ways.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the model's chat template refuses these messages: {reason[0]}") from error
    assert isinstance(text, str)
    return text


def require_unicode(field: str, text: str) -> None:
    """Raises ValueError for text that no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} must be valid Unicode, got half of a surrogate pair at character {error.start}"
        ) from error


def _message(asked: Mapping[object, object]) -> dict[str, Any]:
    message: dict[str, Any] = {}
    shown = reprlib.repr(dict(asked))
    for field, value in asked.items():
        if field not in MESSAGE_FIELDS:
            raise ValueError(f"a message may have the fields {', '.join(MESSAGE_FIELDS)}, got {shown}")
        assert isinstance(field, str)
        if isinstance(value, str):
            require_unicode(f"{field} of a message", value)
            message[field] = value
        else:
            message[field] = _plain(f"{field} of a message", value)
    # Who calls a tool may say nothing.
    says_nothing = message.get("content") is None and bool(message.get("tool_calls"))
    if not isinstance(message.get("role"), str) or not (
        says_nothing or isinstance(message.get("content"), str)
    ):
        raise ValueError(f"a message must have the texts role and content, got {shown}")
    calls = message.get("tool_calls")
    if calls is not None and not _are_objects(calls):
        raise ValueError(f"tool_calls of a message must be a list of objects, got {reprlib.repr(calls)}")
    for field in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(message.get(field, ""), str | None):
            raise ValueError(f"{field} of a message must be a text, got {reprlib.repr(message[field])}")
    return message


def _arguments(tokenizer: "PreTrainedTokenizerFast", asked: Mapping[str, object]) -> dict[str, Any]:
    if not isinstance(asked, Mapping):
        raise ValueError(f"template must be a mapping of names to values, got {reprlib.repr(asked)}")
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - set(_OF_TEMPLATE)
    given: dict[str, Any] = {}
    for name, value in asked.items():
        if not isinstance(name, str) or not name.isidentifier() or name in (*taken, "messages", "self"):
            raise ValueError(
                "template must name arguments of the model's chat template (tools, enable_thinking, ...), "
                f"got {reprlib.repr(name)}"
            )
        given[name] = _plain(f"template.{name}", value)
    for name in _OF_TEMPLATE:
        if given.get(name) is not None and not _are_objects(given[name]):
            raise ValueError(f"template.{name} must be a list of objects, got {reprlib.repr(given[name])}")
    return given


def _plain(field: str, value: object) -> Any:
    """The value as JSON has it: a template gets data, nothing that it could call."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{field} must be what JSON can say, got {reprlib.repr(value)}") from error
    require_unicode(field, text)
    return json.loads(text)


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
