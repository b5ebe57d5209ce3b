"""The two messages of a round and how they are written down: a `Draft` to the target, `Scores` back.

Everything of one kind, of all sequences, is one flat array. A message is an int32 buffer as long as what it says:
the number of sections, their lengths, then the sections, floats with their bits reinterpreted. Hidden rows are
tensors and travel behind the scores, which tell their shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.workers.link.starts import SequenceStart, decode_starts, encode_starts, halves, joined
from outrider.workers.sequences.segments import Int64Array, places_in

MAX_STARTS_PER_ROUND = 4

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SequenceStep(NamedTuple):
    """What one sequence asks of one round; see `Steps`."""

    slot: int
    accepted: SequenceABC[int] = ()
    new_pages: SequenceABC[int] = ()
    tokens: SequenceABC[int] = ()
    parents: SequenceABC[int] = ()
    first_sampled: int = 0
    first_hidden: int | None = None  # none

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)


@dataclass(eq=False)
class Steps:
    """What B sequences ask of one round. All arrays are int64; flat ones hold a segment per sequence.

    A sequence's nodes are a chain of tokens that are known but not in the KV cache yet (a prompt chunk, or just the
    last token), with a draft tree below the chain's last node. A node's parent comes before it.
    """

    slots: Int64Array  # [B]
    num_accepted: Int64Array  # [B]
    accepted: Int64Array  # flat: nodes of the sequence's previous step whose KV rows are kept, root first
    num_new_pages: Int64Array  # [B]
    new_pages: Int64Array  # flat: page ids appended to the sequence's page table
    num_nodes: Int64Array  # [B]
    tokens: Int64Array  # flat
    parents: Int64Array  # flat; nodes of the same step, node 0 is its own parent
    first_sampled: (
        Int64Array  # [B]; the target samples after this node and all later ones; num_nodes = after none
    )
    first_hidden: (
        Int64Array  # [B]; hidden rows are wanted of this node and all later ones; num_nodes = of none
    )

    @staticmethod
    def of(parts: SequenceABC[SequenceStep]) -> Steps:
        """All steps of a round, in this order."""
        slots, accepted, new_pages, tokens, parents, first_sampled, first_hidden = (
            zip(*parts, strict=True) if parts else ((),) * 7
        )
        num_nodes = _lengths(tokens)
        wanted = [n if first is None else first for first, n in zip(first_hidden, num_nodes, strict=True)]
        return Steps(
            slots=_int64(slots),
            num_accepted=_lengths(accepted),
            accepted=_int64([*chain.from_iterable(accepted)]),
            num_new_pages=_lengths(new_pages),
            new_pages=_int64([*chain.from_iterable(new_pages)]),
            num_nodes=num_nodes,
            tokens=_int64([*chain.from_iterable(tokens)]),
            parents=_int64([*chain.from_iterable(parents)]),
            first_sampled=_int64(first_sampled),
            first_hidden=_int64(wanted),
        )

    def __len__(self) -> int:
        """Sequences that take part."""
        return len(self.slots)

    @property
    def num_rows(self) -> int:
        """Nodes of all sequences."""
        return len(self.tokens)

    @property
    def num_sampled(self) -> Int64Array:
        """[B]: nodes after which the target samples."""
        return self.num_nodes - self.first_sampled

    @cached_property
    def places(self) -> Int64Array:
        """Of every node its index in its step, int64 [num_rows]."""
        return places_in(self.num_nodes)

    @cached_property
    def sampled_rows(self) -> Int64Array:
        """The nodes after which the target samples, as indices of `tokens`."""
        return (self.places >= self.first_sampled.repeat(self.num_nodes)).nonzero()[0]

    @cached_property
    def hidden_rows(self) -> Int64Array:
        """The nodes whose hidden rows are wanted, as indices of `tokens`."""
        return (self.places >= self.first_hidden.repeat(self.num_nodes)).nonzero()[0]


class Draft(NamedTuple):
    """DraftWorker to target: sequences that start, slots that are free again, and the work of this round."""

    round_id: int
    starts: tuple[SequenceStart, ...]
    released_slots: tuple[int, ...]
    steps: Steps
    layers: tuple[int, ...] = ()
    """Whose inputs come back as hidden rows; the number of layers stands for what leaves the last one."""
    stop: bool = False  # the loop ends; everything else is empty
    pause: bool = False  # likewise, but the group stays together: rank 0 has lost its DraftWorker

    @property
    def ends(self) -> bool:
        """Whether no round is asked for, nor any after it."""
        return self.stop or self.pause


class Scores(NamedTuple):
    """Target to DraftWorker: what the target knows after the nodes that it was asked about, and its times.

    Rows are the sampled nodes of all steps in order (M), or those of them whose sequences asked.
    """

    round_id: int
    tokens: Int64Array  # [M] the target's own next token after each sampled node
    failed: npt.NDArray[np.bool_]  # [M] the law there is none: its logits are NaN or all removed
    logprobs: Float32Array  # [num that ask] of `tokens`, nats under the model's own law
    top_ids: Int64Array  # [num that ask, k] likeliest first; k is the most that anybody asks for
    top_logprobs: Float32Array  # [num that ask, k]
    child_logprobs: Float32Array  # [num that ask] of drafted nodes: of their own token after their parent
    child_laws: Float32Array  # likewise, under the request's law: -inf where it removes the token
    is_pushed_down: npt.NDArray[np.bool_]  # likewise, whether the request makes the token less likely
    entropies: Float32Array  # [num that ask] nats, of the request's law after each sampled node
    commit_s: float
    forward_s: float
    sample_s: float
    hidden: torch.Tensor | None = None
    """[num_layers, num_hidden_rows, hidden_size]: rows of `Steps.hidden_rows` of the layers that were asked for."""


def encode_draft(draft: Draft) -> torch.Tensor:
    """`draft` as int32 [length]."""
    start_ints, start_floats = encode_starts(draft.starts)
    steps = draft.steps
    return _pack(
        [
            np.array([*halves(draft.round_id), draft.stop, draft.pause]),
            np.array(start_ints, dtype=np.int64),
            # Both sides must compute with the very same numbers: all their bits travel.
            np.array(start_floats, dtype=np.float64).view(np.int32),
            np.array(draft.released_slots, dtype=np.int64),
            np.array(draft.layers, dtype=np.int64),
            steps.slots,
            steps.num_accepted,
            steps.accepted,
            steps.num_new_pages,
            steps.new_pages,
            steps.num_nodes,
            steps.tokens,
            steps.parents,
            steps.first_sampled,
            steps.first_hidden,
        ]
    )


def decode_draft(buffer: torch.Tensor) -> Draft:
    """Read what `encode_draft` wrote."""
    head, start_ints, start_floats, released, layers, *step_arrays = _unpack(buffer)
    low, high, stop, pause = head.tolist()
    return Draft(
        round_id=joined(low, high),
        starts=decode_starts(start_ints.tolist(), start_floats.view(np.float64).tolist()),
        released_slots=tuple(released.tolist()),
        steps=Steps(*[array.astype(np.int64) for array in step_arrays]),
        layers=tuple(layers.tolist()),
        stop=bool(stop),
        pause=bool(pause),
    )


class HiddenShape(NamedTuple):
    """What of a tensor of hidden rows the scores tell before it comes; no rows: it does not come."""

    num_layers: int
    num_rows: int
    hidden_size: int
    dtype: torch.dtype

    @staticmethod
    def of(hidden: torch.Tensor | None) -> HiddenShape:
        if hidden is None:
            return HiddenShape(0, 0, 0, torch.float32)
        num_layers, num_rows, hidden_size = hidden.shape
        return HiddenShape(num_layers, num_rows, hidden_size, hidden.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod((self.num_layers, self.num_rows, self.hidden_size, self.dtype.itemsize))

    def tensor(self, payload: torch.Tensor) -> torch.Tensor | None:
        """The rows, from the uint8 [num_bytes] that came."""
        if not self.num_bytes:
            return None
        return payload.view(self.dtype).view(self.num_layers, self.num_rows, self.hidden_size)


def encode_scores(scores: Scores) -> torch.Tensor:
    """`scores` as int32 [length], without the hidden rows."""
    shape = HiddenShape.of(scores.hidden)
    dtype = _HIDDEN_DTYPES.index(shape.dtype)
    return _pack(
        [
            np.array([*halves(scores.round_id), scores.top_ids.shape[1]]),
            np.array([shape.num_layers, shape.num_rows, shape.hidden_size, dtype]),
            _bits([scores.commit_s, scores.forward_s, scores.sample_s]),
            scores.tokens,
            np.flatnonzero(scores.failed),
            _bits(scores.logprobs),
            scores.top_ids.ravel(),
            _bits(scores.top_logprobs.ravel()),
            _bits(scores.child_logprobs),
            _bits(scores.child_laws),
            np.flatnonzero(scores.is_pushed_down),
            _bits(scores.entropies),
        ]
    )


def decode_scores(buffer: torch.Tensor, payload: torch.Tensor) -> Scores:
    """Read what `encode_scores` wrote, with the bytes of the hidden rows that came behind it, uint8 [num_bytes]."""
    head, shape, times, tokens, failed_rows, logprobs, top_ids, top_logprobs, *rest = _unpack(buffer)
    child, child_laws, pushed, entropies = rest
    low, high, num_top = head.tolist()
    num_layers, num_hidden, hidden_size, dtype = shape.tolist()
    commit_s, forward_s, sample_s = times.view(np.float32).tolist()
    failed = np.zeros(len(tokens), dtype=bool)
    failed[failed_rows] = True
    is_pushed_down = np.zeros(len(child), dtype=bool)
    is_pushed_down[pushed] = True
    return Scores(
        round_id=joined(low, high),
        tokens=tokens.astype(np.int64),
        failed=failed,
        logprobs=logprobs.view(np.float32),
        top_ids=top_ids.astype(np.int64).reshape(len(logprobs), num_top),
        top_logprobs=top_logprobs.view(np.float32).reshape(len(logprobs), num_top),
        child_logprobs=child.view(np.float32),
        child_laws=child_laws.view(np.float32),
        is_pushed_down=is_pushed_down,
        entropies=entropies.view(np.float32),
        commit_s=commit_s,
        forward_s=forward_s,
        sample_s=sample_s,
        hidden=HiddenShape(num_layers, num_hidden, hidden_size, _HIDDEN_DTYPES[dtype]).tensor(payload),
    )


def _int64(values: SequenceABC[int] | Int64Array) -> Int64Array:
    return np.asarray(values, dtype=np.int64)


def _lengths(parts: SequenceABC[SequenceABC[int]]) -> Int64Array:
    return _int64([len(part) for part in parts])


def _bits(values: SequenceABC[float] | Float32Array) -> Int32Array:
    return np.asarray(values, dtype=np.float32).view(np.int32)


def _pack(sections: SequenceABC[npt.NDArray[np.integer]]) -> torch.Tensor:
    lengths = [len(section) for section in sections]
    flat = np.concatenate([[len(sections), *lengths], *sections], dtype=np.int32, casting="same_kind")
    return torch.from_numpy(flat)


def _unpack(buffer: torch.Tensor) -> list[Int32Array]:
    flat = buffer.numpy()
    first = 1 + int(flat[0])
    sections, begin = [], first
    for length in flat[1:first].tolist():
        sections.append(flat[begin : begin + length])
        begin += length
    return sections
