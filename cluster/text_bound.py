"""How many tokens a text is at least, without tokenizing it: a text that no context holds is not read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK = 2**16  # characters
# A cut may part what the normalizer joins (up to four characters), and puts a prefix where none is.
_LOST_AT_A_CUT = 16
# For tokenizers that give no bound: characters per token of the context. Real texts have about four.
_GENEROUS = 64
# Nothing is dropped between the text and its tokens where all parts are of these kinds.
_KEEPING_SPLITTERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace", "Sequence"}
_SPACES = b" \t\n\r\v\f"
_METASPACE = "\u2581"  # stands for a space


class TextBound:
    """A lower bound on the number of tokens of a text.

    Every byte of a normalized text is in some token, and a byte b is never in a longer one than the longest
    that holds b. So if b counts 1 / (the length of that token), no token's bytes count more than 1 together,
    and all bytes of a text together count no more than it has tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer
        self._normalizer = backend.normalizer
        self._weights = _weights(json.loads(backend.to_str()))

    def exceeds(self, text: str, max_tokens: int) -> bool:
        """Whether `text` surely has more tokens than this. Reads no more of it than the answer needs.

        For tokenizers that may drop text, whether it is longer than any sensible one of so many tokens.
        """
        if not self._weights.any():
            return len(text) > _GENEROUS * max_tokens
        least = 0.0
        for begin in range(0, len(text), _CHUNK):
            chunk = text[begin : begin + _CHUNK]
            if self._normalizer is not None:
                chunk = self._normalizer.normalize_str(chunk)
            chunk_bytes = np.frombuffer(chunk.replace(_METASPACE, " ").encode(), dtype=np.uint8)
            least += float(np.bincount(chunk_bytes, minlength=256) @ self._weights) - _LOST_AT_A_CUT
            if least > max_tokens:
                return True
        return False


def _weights(tokenizer: dict[str, object]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each byte counts, float64 [256]; zeros where nothing can be said.

    tokenizer: the contents of a tokenizer.json.
    """
    from outrider.workers.weights.byte_alphabet import token_bytes

    model = tokenizer["model"]
    assert isinstance(model, dict)
    splitters = list(_parts(tokenizer.get("pre_tokenizer")))
    is_byte_level = any(part["type"] == "ByteLevel" for part in splitters)
    keeps_all = all(
        part["type"] in _KEEPING_SPLITTERS and part.get("behavior") != "Removed" for part in splitters
    )
    # Else characters without a token become one unknown token, however many they are.
    covers_all = model["type"] == "BPE" and (is_byte_level or bool(model.get("byte_fallback")))
    if not (keeps_all and covers_all):
        return np.zeros(256)
    longest = np.ones(256)
    for text in model["vocab"]:
        token = token_bytes(text) if is_byte_level else text.replace(_METASPACE, " ").encode()
        _raise_to(longest, token)
    added = tokenizer.get("added_tokens")
    assert isinstance(added, list)
    for entry in added:
        _raise_to(longest, entry["content"].replace(_METASPACE, " ").encode())
    weights = 1 / longest
    if any(entry["lstrip"] or entry["rstrip"] for entry in added):
        weights[list(_SPACES)] = 0.0  # such a token swallows the blanks beside it
    return weights


def _raise_to(longest: np.ndarray[tuple[int], np.dtype[np.float64]], token: bytes) -> None:
    for byte in set(token):
        longest[byte] = max(longest[byte], len(token))


def _parts(splitter: object) -> Iterable[dict[str, object]]:
    """A pre-tokenizer and those it is made of."""
    if not isinstance(splitter, dict):
        return
    yield splitter
    for part in splitter.get("pretokenizers", ()):
        yield from _parts(part)
