"""What a request's text so far forbids: a grammar, and a least length. Followed along every path of a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.workers.sampling.grammars import Grammars, GrammarState, Words
from outrider.workers.sequences.params import SamplingParams

NO_WORDS: Words = np.empty((0, 0), dtype=np.int32)
"""Of rows in which nothing is forbidden."""


class Confinement:
    """The tokens that may follow the output of one sequence, and that output with a path behind it."""

    def __init__(self, params: SamplingParams, grammars: Grammars) -> None:
        """Of an empty output."""
        assert params.is_confined
        self._params = params
        self._grammars = grammars
        self._num_known = 0
        self._text = _Phases(params, grammars) if params.grammar.text else None
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)

    def advance(self, tokens: Sequence[int]) -> None:
        """The output goes on with these."""
        self._num_known += len(tokens)
        if self._text is not None:
            self._text.advance(tokens)

    def words(self, paths: Sequence[Sequence[int]]) -> Words:
        """The tokens that may follow the output and each of these paths, a set for each; `NO_WORDS`: any may."""
        too_short = [self._is_too_short(len(path)) for path in paths]
        if self._text is None and not any(too_short):
            return NO_WORDS
        words = np.full((len(paths), self._grammars.num_words), -1, dtype=np.int32)
        for row, path in enumerate(paths):
            if self._text is not None:
                self._text.mask(path, words[row])
            if too_short[row]:
                longer = words[row].copy()
                remove(longer, self._stops)
                # Nothing but the end is left: the grammar is complete.
                words[row] = longer if longer.any() else words[row]
        return words

    def num_allowed(self, path: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, may follow the output and `path`."""
        num = len(tokens)
        if self._text is not None:
            num = self._text.num_allowed(path, tokens)
        for index, token in enumerate(tokens[:num]):
            ends = token in self._params.stop_token_ids
            if ends and self._text is None and self._is_too_short(len(path) + index):
                return index
        return num

    def _is_too_short(self, num_more: int) -> bool:
        return self._num_known + num_more < self._params.min_tokens


class _Phases:
    """A grammar and what may stand before a text that it is about: thoughts, which are free but for their end."""

    def __init__(self, params: SamplingParams, grammars: Grammars) -> None:
        self._texts = grammars.texts
        self._ends = np.array(self._texts.ends, dtype=np.int64)
        self._state = GrammarState(grammars, params.grammar.text)
        thoughts = params.grammar.thoughts if self._texts.think else "none"
        self._thinks = thoughts == "open"
        self._may_think = thoughts == "tags"  # nothing has been said yet

    def advance(self, tokens: Sequence[int]) -> None:
        """Known tokens; of those behind an end nothing is said."""
        own, self._thinks, self._may_think, _ = self._read(tokens)
        self._state.advance(own)

    def mask(self, path: Sequence[int], words: np.ndarray) -> None:
        """As `GrammarState.mask`."""
        own, thinks, may_think, has_ended = self._read(path)
        if has_ended:
            return  # nobody sees what follows
        if thinks:
            remove(words, self._ends)  # an answer that ends here would not match
            return
        self._state.mask(own, words)
        if may_think:
            add(words, np.array(self._texts.think))

    def num_allowed(self, path: Sequence[int], tokens: Sequence[int]) -> int:
        """As `GrammarState.num_allowed`, of tokens that may be an end."""
        own, thinks, may_think, has_ended = self._read(path)
        if has_ended:
            return 0
        first = 0  # of `tokens` that the grammar is about
        if may_think and tuple(tokens[:1]) == self._texts.think:
            thinks, first = True, 1
        if thinks:
            num_thought = _index_of(tokens, self._texts.end_think, first)
            num_thought = _index_of(tokens[:num_thought], self._texts.ends, first)
            if num_thought == len(tokens) or tokens[num_thought] in self._texts.ends:
                return num_thought
            first = num_thought + 1
        end = _index_of(tokens, self._texts.ends, first)
        num = first + self._state.num_allowed(own, tokens[first:end])
        if num == end < len(tokens) and self._state.may_end([*own, *tokens[first:end]]):
            return num + 1
        return num

    def _read(self, path: Sequence[int]) -> tuple[Sequence[int], bool, bool, bool]:
        """Of a path the tokens that the grammar is about; whether it ends in thoughts, at their possible beginning,
        or behind an end of the text."""
        thinks, may_think = self._thinks, self._may_think and not path
        if self._may_think and tuple(path[:1]) == self._texts.think:
            thinks, path = True, path[1:]
        if thinks:
            num_thought = _index_of(path, self._texts.end_think, 0)
            if num_thought == len(path):
                return (), True, False, False
            path = path[num_thought + 1 :]
        end = _index_of(path, self._texts.ends, 0)
        return path[:end], False, may_think, end < len(path)


def add(words: np.ndarray, tokens: np.ndarray) -> None:
    """Tokens join the set [num_words]."""
    np.bitwise_or.at(words, tokens // 32, _bits(tokens))


def remove(words: np.ndarray, tokens: np.ndarray) -> None:
    """Tokens leave the set [num_words]."""
    np.bitwise_and.at(words, tokens // 32, ~_bits(tokens))


def _bits(tokens: np.ndarray) -> np.ndarray:
    return (np.uint32(1) << (tokens % 32).astype(np.uint32)).view(np.int32)


def _index_of(tokens: Sequence[int], which: Sequence[int], first: int) -> int:
    """Of the first of `which`, from `first` on; the length where none is there."""
    return next((i for i in range(first, len(tokens)) if tokens[i] in which), len(tokens))
