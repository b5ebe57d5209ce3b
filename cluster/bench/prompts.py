"""Prompts of a benchmark: public data sets, any JSON lines or text; chosen evenly, made chat turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from outrider.configs.loader import PRESETS_DIR

PromptStyle = Literal["chat", "raw"]

_CODE_REQUEST = "Complete this Python function. Answer with the complete function.\n```python\n{code}```"
_TEXT_KEYS = ("text", "instruction", "input")


@dataclass(frozen=True)
class Prompt:
    """What a user asks."""

    id: str
    category: str
    text: str
    is_code: bool = False
    """The text is code to continue: raw as it is, in a chat with a request around it."""


SHIPPED_PROMPTS = PRESETS_DIR / "prompts" / "demo.jsonl"
"""One of each kind that people try first, for a look without a data set."""


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads Spec-Bench (first turns), HumanEval, GSM8K, other JSON lines with a `prompt` (or `text`,
    `instruction`, `input`, `question`) field, or a text file with one prompt per line.

    Raises ValueError naming the file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"--data must be a .jsonl or .txt file, got {str(path)!r} (no such file)")
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(f"{path.stem}/{number}", path.stem, line.strip()))
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        prompts.append(_prompt(row, path, number))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def select(prompts: Sequence[Prompt], limit: int, categories: Sequence[str] = ()) -> list[Prompt]:
    """At most `limit` prompts (0: all) of `categories` (empty: all), spread evenly, in their order.

    Every category gets its share, and inside one the choice is spread over the file.
    """
    names = list(dict.fromkeys(prompt.category for prompt in prompts))
    unknown = [name for name in categories if name not in names]
    if unknown:
        raise ValueError(f"--category must be one of {', '.join(names)}; got {unknown[0]!r}")
    groups = [
        [index for index, prompt in enumerate(prompts) if prompt.category == name]
        for name in names
        if not categories or name in categories
    ]
    total = sum(len(group) for group in groups)
    if limit <= 0 or limit >= total:
        return [prompts[index] for index in sorted(index for group in groups for index in group)]
    if limit < len(groups):
        groups = [groups[index] for index in _spread(len(groups), limit)]
    shares = [0] * len(groups)
    while sum(shares) < limit:
        for index, group in enumerate(groups):
            if shares[index] < len(group) and sum(shares) < limit:
                shares[index] += 1
    chosen = [
        group[index]
        for group, share in zip(groups, shares, strict=True)
        for index in _spread(len(group), share)
    ]
    return [prompts[index] for index in sorted(chosen)]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> tuple[int, ...]:
    """Token ids of the prompt. A tokenizer without a chat template leaves only the raw style."""
    if style == "raw" or not tokenizer.chat_template:
        return tuple(tokenizer(prompt.text)["input_ids"])
    text = _CODE_REQUEST.format(code=prompt.text) if prompt.is_code else prompt.text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids)


def _prompt(row: Any, path: Path, number: int) -> Prompt:
    if isinstance(row, str):
        return Prompt(f"{path.stem}/{number}", path.stem, row)
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: must be an object or a string")
    category = str(row.get("category", path.stem))
    if isinstance(row.get("turns"), list) and row["turns"]:
        return Prompt(f"{path.stem}/{row.get('question_id', number)}", category, str(row["turns"][0]))
    if "prompt" in row and "entry_point" in row:
        return Prompt(str(row.get("task_id", number)), category, str(row["prompt"]), is_code=True)
    for key in ("prompt", *_TEXT_KEYS, "question"):
        if isinstance(row.get(key), str):
            return Prompt(str(row.get("id", f"{path.stem}/{number}")), category, row[key])
    fields = ", ".join(("turns", "prompt", *_TEXT_KEYS, "question"))
    raise ValueError(f"{path}, line {number}: must have one of the fields {fields}; has {', '.join(row)}")


def _spread(num_items: int, num_chosen: int) -> list[int]:
    """`num_chosen` evenly spaced indices of `num_items`."""
    return [index * num_items // num_chosen for index in range(num_chosen)]
