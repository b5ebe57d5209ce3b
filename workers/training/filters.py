"""Which texts are worth keeping: no loops, no near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST_PERIOD = 48
MIN_REPEATS = 4
MIN_LOOP_TOKENS = 48
MIN_DISTINCT = 0.35
_NGRAM = 4
_SHINGLE = 5
_NUM_PERMUTATIONS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)


def degeneration(tokens: Sequence[int]) -> str:
    """How a text repeats itself over and over; empty where it does not.

    It does where a stretch of MIN_LOOP_TOKENS or more is one n-gram (of up to LONGEST_PERIOD tokens) MIN_REPEATS
    times or more; or where fewer than MIN_DISTINCT of its 4-grams are distinct (of a text of at least
    MIN_LOOP_TOKENS): loops that change a word each time, and stretches that come back.
    """
    row = np.asarray(tokens, dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, len(row) // MIN_REPEATS) + 1):
        stretch = _longest_run(row[period:] == row[:-period]) + period
        if stretch >= max(MIN_LOOP_TOKENS, MIN_REPEATS * period):
            return f"loop of {period} tokens"
    if len(row) >= MIN_LOOP_TOKENS:
        ngrams = np.lib.stride_tricks.sliding_window_view(row, _NGRAM)
        if len(np.unique(ngrams, axis=0)) < MIN_DISTINCT * len(ngrams):
            return "few distinct 4-grams"
    return ""


class NearDuplicates:
    """Remembers texts and recognises those that are nearly one of them.

    By MinHash over shingles of 5 tokens and locality-sensitive hashing (Broder 1997; Leskovec et al., "Mining of
    Massive Datasets", ch. 3; the library `datasketch`): texts whose sets of shingles have a Jaccard similarity of
    `threshold` or more are found with high probability, and hardly any far below it.
    """

    def __init__(self, threshold: float) -> None:
        """threshold: in (0, 1]. Raises ValueError where `datasketch` is not installed."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError("distill needs the package datasketch: pip install 'outrider[train]'") from error
        self._empty = MinHash(_NUM_PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(threshold, _NUM_PERMUTATIONS)

    def add(self, text_id: str, tokens: Sequence[int]) -> str:
        """Remembers a text, unless it is nearly one that is known: then the id of that one, else empty."""
        summary = self._empty.copy()
        summary.update_batch(_shingles(tokens).tolist())
        similar: list[str] = self._index.query(summary)
        if similar:
            return similar[0]
        self._index.insert(text_id, summary)
        return ""


def _shingles(tokens: Sequence[int]) -> npt.NDArray[np.uint64]:
    """32-bit hashes of all distinct runs of 5 tokens; a shorter text is one run."""
    row = np.asarray(tokens, dtype=np.uint64)
    if len(row) < _SHINGLE:
        row = np.concatenate([row, np.full(_SHINGLE - len(row), np.iinfo(np.uint32).max, dtype=np.uint64)])
    hashes = np.zeros(len(row) - _SHINGLE + 1, dtype=np.uint64)
    for offset in range(_SHINGLE):
        hashes = (hashes ^ row[offset : offset + len(hashes)]) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes >> np.uint64(32))


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return int((edges[1::2] - edges[::2]).max(initial=0))
