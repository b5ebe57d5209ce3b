"""What the tokens of a model say, as a grammar reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenTexts:
    """By token id what each says, and those that say something else.

    Attributes:
        tokens: what each says in the middle of a text; nothing for ids that are no tokens.
        special: those that are no text.
        ends: those that end a text.
        think, end_think: the tokens <think> and </think>, one each, or none where the tokenizer has not both.
    """

    tokens: tuple[bytes, ...]
    special: tuple[int, ...]
    ends: tuple[int, ...]
    think: tuple[int, ...] = ()
    end_think: tuple[int, ...] = ()


def token_texts(tokenizer: PreTrainedTokenizerFast, vocab_size: int, ends: tuple[int, ...]) -> TokenTexts:
    """`ends`: as `end_token_ids` gives them. Raises ValueError, one line, where nothing ends a text: what has to
    match must be able to end."""
    # A second of a processor to import, in every worker, for answers that have to match something.
    from outrider.workers.weights.tokenizer import ANSWER_TAGS, vocabulary_bytes

    if not ends:
        raise ValueError("the model must have an end-of-text token where answers have to match something")
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special and token.content not in ANSWER_TAGS}
    special = {i for i in special if i < vocab_size} | set(ends)
    ids = [backend.token_to_id(text) for text in ANSWER_TAGS[:2]]
    tags = [(i,) for i in ids if i is not None and i < vocab_size]
    think, end_think = tags if len(tags) == 2 else ((), ())
    return TokenTexts(vocabulary_bytes(tokenizer, vocab_size), tuple(sorted(special)), ends, think, end_think)
