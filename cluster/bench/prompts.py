"""Prompts of a benchmark: public data sets, any JSON lines or text; chosen evenly, made chat turns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from outrider.cluster.printable import printable
from outrider.configs.loader import PRESETS_DIR

PromptStyle = Literal["chat", "raw"]

_CODE_REQUEST = "Complete this Python function. Answer with the complete function.\n```python\n{code}```"
_TEXT_KEYS = ("prompt", "text", "instruction", "input", "question")


@dataclass(frozen=True)
class Prompt:
    """What a user asks."""

    id: str
    category: str  # id and category are shown: they have no control characters
    text: str
    is_code: bool = False
    """The text is code to continue: raw as it is, in a chat with a request around it."""


SHIPPED_PROMPTS = PRESETS_DIR / "prompts" / "demo.jsonl"
"""One of each kind that people try first, for a look without a data set."""


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads Spec-Bench (first turns), HumanEval, GSM8K, other JSON lines with a `prompt` (or `text`,
    `instruction`, `input`, `question`) field or with `messages` (the first one), or a text file with one prompt per
    line.

    Raises ValueError naming the file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"--data must be a .jsonl or .txt file, got {str(path)!r} (no such file)")
    prompts: list[Prompt] = []
    for number, line in enumerate(_lines(path), start=1):
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
    return [replace(p, id=printable(p.id), category=printable(p.category)) for p in prompts]


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


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, with or without a byte-order mark.

    Lines end with LF, CRLF or CR: U+2028, U+2029, U+0085 and others that `splitlines` knows may stand in a text.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {number}: must be UTF-8, got the byte 0x{content[error.start]:02x}"
        ) from error
    return iter(io.StringIO(text, newline=None))


def _prompt(row: Any, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    if isinstance(row, str):
        return Prompt(f"{path.stem}/{number}", path.stem, _text(row, where))
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object or a string, got {row!r}")
    category = str(row.get("category", path.stem))
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: turns must be a list of texts, got {turns!r}")
        name = f"{path.stem}/{row.get('question_id', number)}"
        return Prompt(name, category, _text(turns[0], f"{where}: turns[0]"))
    if "prompt" in row and "entry_point" in row:
        text = _text(row["prompt"], f"{where}: prompt")
        return Prompt(str(row.get("task_id", number)), category, text, is_code=True)
    # Data sets leave fields empty that a row does not use: null beside a text is no fault.
    present = sorted((key for key in _TEXT_KEYS if key in row), key=lambda key: row[key] is None)
    name = str(row.get("id", f"{path.stem}/{number}"))
    if present:
        return Prompt(name, category, _text(row[present[0]], f"{where}: {present[0]}"))
    if "messages" in row:
        return Prompt(name, category, _first_question(row["messages"], where))
    fields = ", ".join(("turns", *_TEXT_KEYS, "messages"))
    raise ValueError(f"{where}: must have one of the fields {fields}; has {', '.join(row) or 'none'}")


def _first_question(messages: object, where: str) -> str:
    """Of a conversation as chat models are trained on; what stands in front of it is not left out unseen."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict) or first.get("role") != "user":
        raise ValueError(f"{where}: messages must be a list that begins with a user's message, got {first!r}")
    return _text(first.get("content"), f"{where}: content of messages[0]")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must be valid Unicode, got {value[error.start]!r} in it") from error
    return value


def _spread(num_items: int, num_chosen: int) -> list[int]:
    """`num_chosen` evenly spaced indices of `num_items`."""
    return [index * num_items // num_chosen for index in range(num_chosen)]
