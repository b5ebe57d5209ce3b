"""What the target hears of a sequence before its first step, as whole numbers and floats."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np

from outrider.workers.sequences.grammar import THOUGHTS, Grammar
from outrider.workers.sequences.params import SamplingParams

_INTS_PER_START = 15
_FLOATS_PER_START = 6


@dataclass(frozen=True)
class ScoreNeeds:
    """What a sequence's rule needs besides the sampled tokens."""

    child_logprobs: bool = False
    """Log-probabilities of the drafted tokens, under the model's own law and under the request's."""
    entropy: bool = False
    """Entropy of the request's law at every sampled node."""


@dataclass(frozen=True)
class SequenceStart:
    """A sequence takes a slot of the target. Its first `num_shared_tokens` KV rows are in its pages already."""

    slot: int
    prompt_length: int  # tokens; what follows them counts as output for the penalties
    num_shared_tokens: int
    sampling: SamplingParams
    needs: ScoreNeeds = ScoreNeeds()


def encode_starts(starts: SequenceABC[SequenceStart]) -> tuple[list[int], list[float]]:
    """All of them, one behind the other."""
    ints: list[int] = []
    floats: list[float] = []
    for start in starts:
        p, needs = start.sampling, start.needs
        # Tokens that end a text matter to the law where there is a least length only.
        stops = p.stop_token_ids if p.min_tokens else ()
        text = p.grammar.text.encode()
        ints += [start.slot, start.prompt_length, start.num_shared_tokens, p.top_k, *halves(p.seed)]
        ints += [p.logprobs, p.top_logprobs, needs.child_logprobs, needs.entropy, len(p.logit_bias)]
        ints += [p.min_tokens, len(stops), THOUGHTS.index(p.grammar.thoughts), len(text)]
        ints += [token for token, _ in p.logit_bias]
        ints += stops
        ints += np.frombuffer(text.ljust(_padded(len(text)), b"\0"), dtype=np.int32).tolist()
        floats += [p.temperature, p.top_p, p.min_p, p.repetition_penalty]
        floats += [p.presence_penalty, p.frequency_penalty]
        floats += [bias for _, bias in p.logit_bias]
    return ints, floats


def decode_starts(ints: list[int], floats: list[float]) -> tuple[SequenceStart, ...]:
    """Read what `encode_starts` wrote."""
    starts = []
    i = f = 0
    while i < len(ints):
        (
            slot,
            prompt_length,
            num_shared,
            top_k,
            seed_low,
            seed_high,
            logprobs,
            top_n,
            child,
            entropy,
            num_bias,
            min_tokens,
            num_stops,
            thoughts,
            num_bytes,
        ) = ints[i : i + _INTS_PER_START]
        temperature, top_p, min_p, repetition, presence, frequency = floats[f : f + _FLOATS_PER_START]
        i += _INTS_PER_START
        f += _FLOATS_PER_START
        bias = tuple(zip(ints[i : i + num_bias], floats[f : f + num_bias], strict=True))
        i += num_bias
        f += num_bias
        stops = tuple(ints[i : i + num_stops])
        i += num_stops
        num_words = _padded(num_bytes) // 4
        text = np.array(ints[i : i + num_words], dtype=np.int32).tobytes()[:num_bytes].decode()
        i += num_words
        starts.append(
            SequenceStart(
                slot=slot,
                prompt_length=prompt_length,
                num_shared_tokens=num_shared,
                sampling=SamplingParams(
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    repetition_penalty=repetition,
                    presence_penalty=presence,
                    frequency_penalty=frequency,
                    logit_bias=bias,
                    seed=joined(seed_low, seed_high),
                    min_tokens=min_tokens,
                    stop_token_ids=stops,
                    logprobs=bool(logprobs),
                    top_logprobs=top_n,
                    grammar=Grammar(text, THOUGHTS[thoughts]),
                ),
                needs=ScoreNeeds(bool(child), bool(entropy)),
            )
        )
    return tuple(starts)


def halves(number: int) -> tuple[int, int]:
    """64 bits as two signed integers of 32."""
    low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000


def joined(low: int, high: int) -> int:
    """What `halves` parted."""
    return (low & 0xFFFFFFFF) | ((high & 0xFFFFFFFF) << 32)


def _padded(num_bytes: int) -> int:
    """As many bytes in whole words of four."""
    return -(-num_bytes // 4) * 4
