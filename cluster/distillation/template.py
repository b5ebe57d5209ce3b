"""The chat template as far as a target that writes its own prompts needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MARK = "USERMESSAGE"


@dataclass(frozen=True)
class UserTurn:
    """What stands around a user's message.

    Attributes:
        before: text from the beginning up to the message.
        end_text: what follows the message, up to the answer; without the space around it.
        end_token: the special token that it begins with, or -1 where it begins with none.
    """

    before: str
    end_text: str
    end_token: int


def user_turn(tokenizer: Any) -> UserTurn:
    """Reads it from the template by putting a known message in.

    Raises ValueError where there is no template, or one that does not take the message as it is.
    """
    if not tokenizer.chat_template:
        raise ValueError("target.tokenizer must have a chat template for --free and --begun, got one without")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
    )
    if rendered.count(_MARK) != 1:
        raise ValueError(
            "target.tokenizer must have a chat template that holds a user's message once, as it is"
        )
    before, after = rendered.split(_MARK)
    first = tokenizer.encode(after.strip(), add_special_tokens=False)[:1]
    is_special = bool(first) and first[0] in tokenizer.all_special_ids
    return UserTurn(before, after.strip(), first[0] if is_special else -1)
