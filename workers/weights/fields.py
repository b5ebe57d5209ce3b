"""Reads what a file says about a model field by field: typed, in range, and nothing overlooked.

A field that is misread or not read at all is worse than a file that does not load: the model runs and is wrong.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_NUMBER = sys.float_info.max
MAX_SHOWN = 80  # characters of a value in a message


class Fields:
    """The fields of one JSON object (or of GGUF metadata); `refuse_unread` names those that nobody has asked for.

    All readers raise ValueError, one line: the field, what it may be, what it is.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` stands before every key in messages, e.g. "rope_scaling."."""
        self._raw = raw
        self._prefix = prefix
        self._unread = set(raw)

    @property
    def prefix(self) -> str:
        """What stands before every key in messages."""
        return self._prefix

    def has(self, key: str) -> bool:
        """Whether the field is there, null included."""
        return key in self._raw

    def given(self, key: str) -> bool:
        """Whether the field is there and not null; a null counts as read."""
        if self._raw.get(key) is not None:
            return True
        self._unread.discard(key)
        return False

    def integer(self, key: str, low: int = 1, high: int = 2**63 - 1) -> int:
        """An integer in [low, high]."""
        value = self.value(key)
        if _is_integer(value) and low <= value <= high:
            return int(value)
        least = "a positive integer" if low == 1 else f"an integer of at least {low}"
        raise self.wrong(key, least if high == 2**63 - 1 else f"an integer from {low} to {high}")

    def number(self, key: str, allowed: str, holds: Callable[[float], bool]) -> float:
        """A finite number for which `holds` is true; `allowed` says which those are."""
        value = self.value(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= MAX_NUMBER or not holds(value):
            raise self.wrong(key, allowed)
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, allowed: Iterable[str]) -> str:
        """One of the words `allowed`."""
        value = self.value(key)
        choices = tuple(allowed)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        return value

    def string(self, key: str) -> str:
        """Any text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts")
        return value

    def integers(self, key: str) -> list[int]:
        """A list of integers."""
        value = self.value(key)
        if not isinstance(value, list) or not all(_is_integer(item) for item in value):
            raise self.wrong(key, "a list of integers")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them, each below `vocab_size`; () where the field is missing or null."""
        if not self.given(key):
            return ()
        value = self.value(key)
        ids = value if isinstance(value, list) else [value]
        if not all(_is_integer(item) and 0 <= item < vocab_size for item in ids):
            raise self.wrong(key, f"token ids (integers from 0 to {vocab_size - 1})")
        return tuple(ids)

    def object(self, key: str) -> dict[str, Any]:
        """An object of fields."""
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def value(self, key: str) -> Any:
        """What is there, of whatever type; None where nothing is."""
        self._unread.discard(key)
        return self._raw.get(key)

    def require_off(self, off: Mapping[str, tuple[Any, ...]]) -> None:
        """Features that a model does not have here: each field must be missing, null or one of its neutral values."""
        for key, neutral in off.items():
            if self.given(key) and not any(_same(self.value(key), value) for value in neutral):
                allowed = " or ".join(_shown(value) for value in (*neutral, None))
                raise self.wrong(key, f"{allowed} (what it asks for is not supported)")

    def ignore(self, keys: Iterable[str]) -> None:
        """These are known, and nothing that is computed depends on them."""
        self._unread.difference_update(keys)

    def unread(self) -> list[str]:
        """Keys of the fields that nobody has read and that are not null, sorted."""
        return sorted(key for key in self._unread if self._raw[key] is not None)

    def refuse_unread(self) -> None:
        """Raises ValueError for a field that nobody has read and that is not null."""
        unread = self.unread()
        if unread:
            more = f" ({len(unread)} such fields)" if len(unread) > 1 else ""
            raise ValueError(
                f"{self._prefix}{unread[0]} is not known here, so what it asks for would be left out{more}, "
                f"got {_shown(self._raw[unread[0]])}"
            )

    def wrong(self, key: str, allowed: str) -> ValueError:
        """The error for a field that is not what it may be."""
        got = _shown(self._raw[key]) if key in self._raw else "nothing"
        return ValueError(f"{self._prefix}{key} must be {allowed}, got {got}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, one line, when there is no file or something else in it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} has no {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return data


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: object, neutral: object) -> bool:
    """Equal, and not 0 for False or 1 for True."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
