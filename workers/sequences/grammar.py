"""What a text has to match, as it travels from the door to those who sample and draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Thoughts = Literal["none", "tags", "open"]
THOUGHTS: tuple[Thoughts, ...] = ("none", "tags", "open")


@dataclass(frozen=True)
class Grammar:
    """A language that an answer must be in; by default any text is.

    Attributes:
        text: llguidance's form of Lark (github.com/guidance-ai/llguidance, docs/syntax.md); empty: anything.
        thoughts: what stands before the text that must match: `none`; `tags`, thoughts if the answer begins with
            <think>; `open`, thoughts up to </think>, because the prompt ended with <think>. Thoughts are free.
    """

    text: str = ""
    thoughts: Thoughts = "none"


ANYTHING = Grammar()
