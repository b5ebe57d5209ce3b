"""What a text forbids, found anew for every token: by matchers that see known text alone and never come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from llguidance import LLMatcher

from outrider.cluster.structured import grammar_of
from outrider.workers.sampling.grammars import Grammars
from outrider.workers.sequences.grammar import Grammar, Thoughts
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.token_texts import token_texts

TINY_VOCABULARY = 320
ENDS = (2, 0)
THINK, END_THINK = 40, 301  # of the tiny vocabulary, which has no such tokens

TINY_GRAMMARS = Grammars(
    TINY_VOCABULARY,
    lambda: replace(
        token_texts(tokenizer_of_size(TINY_VOCABULARY), TINY_VOCABULARY, ENDS),
        think=(THINK,),
        end_think=(END_THINK,),
    ),
)


def confined(sampling: SamplingParams, asked: object, thoughts: Thoughts = "none") -> SamplingParams:
    """The same, for answers that are as `structured_outputs` says."""
    return replace(sampling, grammar=Grammar(grammar_of(asked), thoughts), stop_token_ids=ENDS)


def forbidden(sampling: SamplingParams, output: Sequence[int], vocab_size: int) -> torch.Tensor:
    """bool [vocab_size], in the tiny vocabulary."""
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    if sampling.grammar.text:
        allowed = _allowed(sampling.grammar, list(output))
    if len(output) < sampling.min_tokens:
        longer = allowed.clone()
        longer[list(sampling.stop_token_ids)] = False
        allowed = longer if longer.any() else allowed
    return ~allowed


def _allowed(grammar: Grammar, output: list[int]) -> torch.Tensor:
    may_think = grammar.thoughts == "tags" and not output
    if grammar.thoughts == "open" or (grammar.thoughts == "tags" and output[:1] == [THINK]):
        if END_THINK not in output:
            allowed = torch.ones(TINY_VOCABULARY, dtype=torch.bool)
            allowed[list(ENDS)] = False
            return allowed
        output = output[output.index(END_THINK) + 1 :]
    matcher = LLMatcher(TINY_GRAMMARS._tokenizer, grammar.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    assert matcher.consume_tokens(output), (output, matcher.get_error())
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    allowed = torch.from_numpy(bits[:TINY_VOCABULARY].astype(bool))
    allowed[THINK] |= may_think
    return allowed
