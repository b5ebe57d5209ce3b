"""Grammars over a target's tokens: which tokens a text in a language may go on with.

llguidance (github.com/guidance-ai/llguidance) parses: an Earley parser over a lexer of derivatives walks a trie of
the vocabulary. A grammar never forces a way of tokenizing: p̃ is the model's own law over whatever spells a text
that matches. What a grammar may cost is bounded in counts, not in seconds, so that all who follow it agree.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from outrider.workers.weights.token_texts import TokenTexts

Words = npt.NDArray[np.int32]
"""Sets of tokens, int32 [num_sets, num_words]: token t is bit t % 32 of word t // 32."""

_NUM_REMEMBERED = 64  # compiled grammars
_MAX_REASON = 300  # characters of the library's message
# Under a tenth of what the library allows by itself where that would be half a gigabyte, its own bounds elsewhere: a
# mask takes 20 ms at most.
_MAX_LEXER_STATES = 20_000  # about 2 kB each
_MAX_GRAMMAR_SIZE = 100_000  # symbols


class Grammars:
    """The grammars of one target, and the words of sets of its tokens. May be used from several threads."""

    def __init__(self, vocab_size: int, read: Callable[[], TokenTexts]) -> None:
        """read: what the tokens say; called when the first grammar comes, which takes a second."""
        self.num_words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._read = read
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @cached_property
    def texts(self) -> TokenTexts:
        """What the tokens say."""
        texts = self._read()
        assert len(texts.tokens) == self._vocab_size
        return texts

    def check(self, text: str) -> None:
        """Raises ValueError, with the library's reason, for a grammar that it refuses or that nothing matches."""
        first = self.matcher(text)
        words = np.zeros(self.num_words, dtype=np.int32)
        first.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if first.is_error():
            raise ValueError(_reason(first.get_error()))

    def matcher(self, text: str) -> LLMatcher:
        """A matcher at the beginning of a text. One that cannot be compiled is in an error state."""
        with self._lock:
            found = self._compiled.get(text)
            if found is None:
                found = LLMatcher(self._tokenizer, text, log_level=0, limits=_limits())
                self._compiled[text] = found
                if len(self._compiled) > _NUM_REMEMBERED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            return found.deep_copy()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(_Tokens(self.texts), eos_token=list(self.texts.ends))  # type: ignore[arg-type]


def no_texts() -> TokenTexts:
    """Where grammars cannot come."""
    raise AssertionError("a grammar came where nobody has read what the tokens say")


NO_GRAMMARS = Grammars(0, no_texts)


class GrammarState:
    """Where a text stands in a grammar. Looks ahead along paths and comes back.

    Paths hold no end-of-text tokens.
    """

    def __init__(self, grammars: Grammars, text: str) -> None:
        self._grammars = grammars
        self._text = text
        self._known: list[int] = []
        self._path: list[int] = []  # behind the known tokens, as far as the matcher has gone
        self._matcher = grammars.matcher(text)
        self._is_dead = False  # what is known does not match

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens are known now. Where they do not match, nothing can follow."""
        self._is_dead |= not self._go(tokens)
        self._known += tokens
        self._path = self._path[len(tokens) :]

    def mask(self, path: Sequence[int], words: Words) -> None:
        """Into `words` [num_words]: which tokens may follow the known ones and `path`, the ends of a text where it
        may end here. None where the path does not match, or the grammar has become more than it may cost."""
        if self._go(path):
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if not self._matcher.is_error():
                return
            # What paths that nobody took have cost must not end the text.
            self._start_again()
            if self._go(path):
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                if not self._matcher.is_error():
                    return
            self._start_again()
        words[:] = 0

    def num_allowed(self, path: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first on, may follow the known ones and `path`."""
        if not self._go(path):
            return 0
        allowed: int = self._matcher.validate_tokens(list(tokens))
        if self._matcher.is_error():
            self._start_again()
            return 0
        return allowed

    def may_end(self, path: Sequence[int]) -> bool:
        """Whether the text may end behind `path`."""
        return self._go(path) and self._matcher.is_accepting()

    def _go(self, path: Sequence[int]) -> bool:
        """Put the matcher behind `path`; false where it does not match."""
        if self._is_dead:
            return False
        num_common = 0
        for ours, theirs in zip(self._path, path, strict=False):
            if ours != theirs:
                break
            num_common += 1
        if num_common < len(self._path):
            self._matcher.rollback(len(self._path) - num_common)
            self._path = self._path[:num_common]
        rest = list(path[num_common:])
        if rest:
            self._path += rest[: self._matcher.try_consume_tokens(rest)]
        if self._matcher.is_error():
            self._start_again()
            self._path = list(path)[: self._matcher.try_consume_tokens(list(path))]
        return len(self._path) == len(path) and not self._is_dead and not self._matcher.is_error()

    def _start_again(self) -> None:
        self._matcher = self._grammars.matcher(self._text)
        self._is_dead |= self._matcher.try_consume_tokens(self._known) < len(self._known)
        self._path = []


class _Tokens:
    """What llguidance asks of a tokenizer. It never tokenizes: no grammar forces tokens (`no_forcing`)."""

    is_tokenizer_wrapper = True

    def __init__(self, texts: TokenTexts) -> None:
        self.tokens = list(texts.tokens)
        self.special_token_ids = list(texts.special)
        self.eos_token_id = texts.ends[0]
        self.bos_token_id = texts.ends[0]  # unused

    def __call__(self, text: str) -> list[int]:
        raise AssertionError(f"a grammar forces tokens: {text[:100]!r}")


def _limits() -> LLParserLimits:
    return LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES, max_grammar_size=_MAX_GRAMMAR_SIZE, verbose_errors=False
    )


def _reason(message: str) -> str:
    """One line, without what goes with it: the grammar itself."""
    first, *rest = message.strip().splitlines() or ["no reason given"]
    causes = [line.strip() for line in rest if line.strip().startswith("error:")]
    return " ".join([first.strip(), *causes])[:_MAX_REASON]
