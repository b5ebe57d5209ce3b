"""The two messages of a round and how they travel: a `Draft` to the target, `Scores` back.

Each message is one int32 buffer of fixed capacity: collectives, CUDA graphs and gloo all prefer a shape
that never changes. A buffer starts with the number of sections and their lengths; then the sections
follow, floats with their bits reinterpreted.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch

from outrider.workers.sequences.params import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

MAX_STARTS_PER_ROUND = 4

_INTS_PER_STEP = 8  # slot and section lengths, rounded up
_INTS_PER_START = 32 + 3 * MAX_LOGIT_BIAS
_INTS_PER_SCORE = 2 + 2 * MAX_TOP_LOGPROBS


@dataclass(frozen=True)
class SequenceStart:
    """A sequence takes a slot of the target. Its first `num_shared_tokens` KV rows are in its pages already."""

    slot: int
    prompt_length: int  # tokens; what follows them counts as output for the penalties
    num_shared_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True)
class SequenceStep:
    """What one sequence asks of one round.

    The nodes are a chain of tokens that are known but not in the KV cache yet (a prompt chunk, or just the
    last token), with a draft tree below the chain's last node. `parents[i] < i`, and node 0 is its own parent.
    """

    slot: int
    accepted: tuple[int, ...]  # nodes of the sequence's previous step whose KV rows are kept, root first
    new_pages: tuple[int, ...]  # page ids appended to the sequence's page table
    tokens: tuple[int, ...]  # [num_nodes]
    parents: tuple[int, ...]  # [num_nodes]
    first_sampled: int  # the target samples after this node and all later ones; num_nodes = after none


@dataclass(frozen=True)
class Draft:
    """DraftWorker to target: sequences that start, slots that are free again, and the work of this round."""

    round_id: int
    starts: tuple[SequenceStart, ...]
    released_slots: tuple[int, ...]
    steps: tuple[SequenceStep, ...]
    stop: bool = False  # the loop ends; everything else is empty


@dataclass(frozen=True)
class StepScores:
    """The target's answer for one `SequenceStep`, for its sampled nodes in order."""

    tokens: tuple[int, ...]  # [num_sampled] the target's own next token after each node
    logprobs: tuple[float, ...]  # [num_sampled], or empty when the request did not ask
    top_ids: tuple[tuple[int, ...], ...]  # [num_sampled][top_logprobs], or empty
    top_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Scores:
    """Target to DraftWorker: the sampled tokens, and where the target's time went (seconds)."""

    round_id: int
    steps: tuple[StepScores, ...]
    commit_s: float
    forward_s: float
    sample_s: float


@dataclass(frozen=True)
class MessageCapacity:
    """Sizes of the two buffers, equal on both sides of the link because both read the same configuration."""

    draft_ints: int
    scores_ints: int

    @staticmethod
    def for_limits(max_round_tokens: int, max_sequences: int, pages_per_sequence: int) -> MessageCapacity:
        """Room for a full round: `max_round_tokens` nodes (rows) spread over `max_sequences` sequences.

        Of each node the token, the parent and at most one new page travel. The sequences may have accepted two
        rounds' worth of nodes: when two lanes become one, it commits what both of them did last.
        """
        headers = 64 + max_sequences * _INTS_PER_STEP
        starts = MAX_STARTS_PER_ROUND * (_INTS_PER_START + pages_per_sequence)
        return MessageCapacity(
            draft_ints=headers + starts + max_sequences + 5 * max_round_tokens,
            scores_ints=headers + max_round_tokens * _INTS_PER_SCORE,
        )


def encode_draft(draft: Draft, buffer: torch.Tensor) -> None:
    """Write `draft` into `buffer` (int32 [capacity.draft_ints])."""
    head = [draft.round_id, int(draft.stop)]
    start_ints: list[int] = []
    start_floats: list[float] = []
    for start in draft.starts:
        p = start.sampling
        seed_low, seed_high = _split_seed(p.seed)
        start_ints += [start.slot, start.prompt_length, start.num_shared_tokens, p.top_k, seed_low, seed_high]
        start_ints += [int(p.logprobs), p.top_logprobs, len(p.logit_bias)]
        start_ints += [token for token, _ in p.logit_bias]
        start_floats += [p.temperature, p.top_p, p.min_p, p.repetition_penalty]
        start_floats += [p.presence_penalty, p.frequency_penalty]
        start_floats += [bias for _, bias in p.logit_bias]
    lengths: list[int] = []
    accepted: list[int] = []
    pages: list[int] = []
    tokens: list[int] = []
    parents: list[int] = []
    for step in draft.steps:
        lengths += [step.slot, len(step.accepted), len(step.new_pages), len(step.tokens), step.first_sampled]
        accepted += step.accepted
        pages += step.new_pages
        tokens += step.tokens
        parents += step.parents
    _pack(
        buffer,
        [
            _ints(head),
            _ints(start_ints),
            _doubles(start_floats),
            _ints(draft.released_slots),
            _ints(lengths),
            _ints(accepted),
            _ints(pages),
            _ints(tokens),
            _ints(parents),
        ],
    )


def decode_draft(buffer: torch.Tensor) -> Draft:
    """Read what `encode_draft` wrote."""
    head, start_ints, start_floats, released, lengths, accepted, pages, tokens, parents = _unpack(buffer)
    steps = []
    accepted_at = pages_at = nodes_at = 0
    length_list = lengths.tolist()
    accepted_list, pages_list = accepted.tolist(), pages.tolist()
    token_list, parent_list = tokens.tolist(), parents.tolist()
    for i in range(0, len(length_list), 5):
        slot, num_accepted, num_pages, num_nodes, first_sampled = length_list[i : i + 5]
        steps.append(
            SequenceStep(
                slot=slot,
                accepted=tuple(accepted_list[accepted_at : accepted_at + num_accepted]),
                new_pages=tuple(pages_list[pages_at : pages_at + num_pages]),
                tokens=tuple(token_list[nodes_at : nodes_at + num_nodes]),
                parents=tuple(parent_list[nodes_at : nodes_at + num_nodes]),
                first_sampled=first_sampled,
            )
        )
        accepted_at += num_accepted
        pages_at += num_pages
        nodes_at += num_nodes
    return Draft(
        round_id=int(head[0]),
        starts=_decode_starts(start_ints.tolist(), start_floats.view(np.float64).tolist()),
        released_slots=tuple(released.tolist()),
        steps=tuple(steps),
        stop=bool(head[1]),
    )


def _decode_starts(ints: list[int], floats: list[float]) -> tuple[SequenceStart, ...]:
    starts = []
    i = f = 0
    while i < len(ints):
        slot, prompt_length, num_shared, top_k, seed_low, seed_high, logprobs, top_n, num_bias = ints[
            i : i + 9
        ]
        bias_ids = ints[i + 9 : i + 9 + num_bias]
        temperature, top_p, min_p, repetition, presence, frequency = floats[f : f + 6]
        bias = floats[f + 6 : f + 6 + num_bias]
        i += 9 + num_bias
        f += 6 + num_bias
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
                    logit_bias=tuple(zip(bias_ids, bias, strict=True)),
                    seed=_join_seed(seed_low, seed_high),
                    logprobs=bool(logprobs),
                    top_logprobs=top_n,
                ),
            )
        )
    return tuple(starts)


def encode_scores(scores: Scores, buffer: torch.Tensor) -> None:
    """Write `scores` into `buffer` (int32 [capacity.scores_ints])."""
    lengths: list[int] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    top_ids: list[int] = []
    top_logprobs: list[float] = []
    for step in scores.steps:
        top_n = len(step.top_ids[0]) if step.top_ids else 0
        lengths += [len(step.tokens), len(step.logprobs), top_n]
        tokens += step.tokens
        logprobs += step.logprobs
        for row_ids, row_logprobs in zip(step.top_ids, step.top_logprobs, strict=True):
            top_ids += row_ids
            top_logprobs += row_logprobs
    times = [scores.commit_s, scores.forward_s, scores.sample_s]
    _pack(
        buffer,
        [
            _ints([scores.round_id]),
            _floats(times),
            _ints(lengths),
            _ints(tokens),
            _floats(logprobs),
            _ints(top_ids),
            _floats(top_logprobs),
        ],
    )


def decode_scores(buffer: torch.Tensor) -> Scores:
    """Read what `encode_scores` wrote."""
    head, times, lengths, token_array, logprob_array, top_id_array, top_logprob_array = _unpack(buffer)
    commit_s, forward_s, sample_s = times.view(np.float32).tolist()
    tokens, logprobs = token_array.tolist(), logprob_array.view(np.float32).tolist()
    top_ids, top_logprobs = top_id_array.tolist(), top_logprob_array.view(np.float32).tolist()
    steps = []
    token_at = logprob_at = top_at = 0
    length_list = lengths.tolist()
    for i in range(0, len(length_list), 3):
        num_sampled, num_logprobs, top_n = length_list[i : i + 3]
        num_top_rows = num_sampled if top_n else 0
        bounds = [(top_at + r * top_n, top_at + (r + 1) * top_n) for r in range(num_top_rows)]
        steps.append(
            StepScores(
                tokens=tuple(tokens[token_at : token_at + num_sampled]),
                logprobs=tuple(logprobs[logprob_at : logprob_at + num_logprobs]),
                top_ids=tuple(tuple(top_ids[a:b]) for a, b in bounds),
                top_logprobs=tuple(tuple(top_logprobs[a:b]) for a, b in bounds),
            )
        )
        token_at += num_sampled
        logprob_at += num_logprobs
        top_at += num_top_rows * top_n
    return Scores(int(head[0]), tuple(steps), commit_s, forward_s, sample_s)


def _ints(values: SequenceABC[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def _floats(values: SequenceABC[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.int32)


def _doubles(values: SequenceABC[float]) -> np.ndarray:
    """Sampling parameters keep all their bits: both sides must compute with the very same numbers."""
    return np.asarray(values, dtype=np.float64).view(np.int32)


def _pack(buffer: torch.Tensor, sections: list[np.ndarray]) -> None:
    flat = np.concatenate([_ints([len(sections)]), _ints([len(s) for s in sections]), *sections])
    assert len(flat) <= buffer.numel(), f"a message of {len(flat)} ints does not fit into {buffer.numel()}"
    buffer.numpy()[: len(flat)] = flat


def _unpack(buffer: torch.Tensor) -> list[np.ndarray]:
    flat = buffer.numpy()
    num_sections = int(flat[0])
    lengths = flat[1 : 1 + num_sections].tolist()
    sections, at = [], 1 + num_sections
    for length in lengths:
        sections.append(flat[at : at + length].copy())
        at += length
    return sections


def _split_seed(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two signed 32-bit halves."""
    halves = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32).view(np.int32)
    return int(halves[0]), int(halves[1])


def _join_seed(low: int, high: int) -> int:
    return (low & 0xFFFFFFFF) | ((high & 0xFFFFFFFF) << 32)
