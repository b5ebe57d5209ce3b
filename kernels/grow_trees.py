"""Draft trees that grow on the device: of all that a drafting has proposed so far, the proposals that are worth most
become the rows of its next step. What a proposal is worth is worked out as the host does it (`proposals.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import LaunchPlan, launch
from outrider.kernels.noise import noise_key
from outrider.kernels.proposals import NUM_KINDS_OF_LAW, Floats, acceptances, priors_and_kinds
from outrider.kernels.sample_shard import MAX_LOGIT, ROW, SUMS, WINNER
from outrider.kernels.transfers import Part

GROWN = np.dtype(
    [
        ("row", ROW),  # what its rows ask, but for key and source
        ("seed", "u8"),  # of the noise
        ("least_value", "f4"),  # up to which a node is not worth a row
        ("is_greedy", "i4"),
        ("first_row", "i4"),  # of the first step; those of known tokens come first
        ("num_rows", "i4"),
        ("context_len", "i4"),  # rows in the cache that are committed
        ("num_known", "i4"),  # rows of the first step that belong to known tokens
        ("tree_len", "i4"),  # rows behind the committed ones when the first step is computed
        ("max_depth", "i4"),  # nodes at it are not expanded
        ("most_rows", "i4"),  # of all steps after the first
        ("root_position", "i4"),  # of its token in the text
    ]
)
"""Of a sequence."""
_THREADS = 128
_WARPS = _THREADS // 32


class GrowthShape(NamedTuple):
    """Of the arrays: rows of a step, sequences, proposals of a row, steps, words of a mask."""

    max_rows: int
    num_sequences: int
    num_best: int
    num_steps: int
    mask_words: int

    @property
    def words_per_step(self) -> int:
        """int32 of the history: columns, log p, what a row stands for."""
        return self.max_rows * (2 * self.num_best + 1)


class FirstStep(NamedTuple):
    """What is known of the first step. What is behind the sequences and rows that there are is not looked at."""

    header: Tensor  # int32 [2]: sequences, and rows that each has in a later step
    sequences: Tensor  # uint8 [B, GROWN]
    seen: Tensor  # float32 [B, NUM_KINDS_OF_LAW, 2]: how many of each kind were accepted, of how many
    values: Tensor  # float32 [N]: probability that the node is accepted; 0: it is a known token
    depths: Tensor  # int32 [N], of nodes below their roots
    masks: Tensor  # int64 [N, W]: the rows behind the committed ones that each sees

    @staticmethod
    def parts(shape: GrowthShape) -> tuple[Part, ...]:
        """All but the masks."""
        rows, each = shape.max_rows, shape.num_sequences
        return (
            Part((2,), torch.int32),
            Part((each, GROWN.itemsize), torch.uint8),
            Part((each, NUM_KINDS_OF_LAW, 2), torch.float32),
            Part((rows,), torch.float32),
            Part((rows,), torch.int32),
        )


class Growth(NamedTuple):
    """What is kept from step to step. `history` [S, words_per_step]: of each step columns [N, C], -1 where nothing was
    asked, log p [N, C] as bits, -inf where a law removed them, and the proposals that its rows stand for [N], by
    place (step * N + row) * C + rank, -1 where a row stands for none."""

    num_done: Tensor  # int32 [B, 2]: steps, and rows of them, after the first
    values: Tensor  # float32 [S, N, C]: of proposals that may be expanded; 0 of others
    masks: Tensor  # int64 [S, N, W]
    depths: Tensor  # int32 [S, N]
    history: Tensor
    row_values: Tensor  # float32 [N], of the rows of the next step

    @staticmethod
    def empty(shape: GrowthShape, device: torch.device) -> Growth:
        """Of no steps."""
        rows, each, best, steps, words = shape

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return Growth(
            zeros(each, 2),
            zeros(steps, rows, best, dtype=torch.float32),
            zeros(steps, rows, words, dtype=torch.int64),
            zeros(steps, rows),
            zeros(steps, shape.words_per_step),
            zeros(rows, dtype=torch.float32),
        )


class NextStep(NamedTuple):
    """The rows of the next step, as `ForwardBatch` and `sample_shard` take them; rows and sequences that are not there
    write nothing, attend to nothing and ask for nothing."""

    tokens: Tensor  # int64 [N], as positions and kv_rows
    positions: Tensor
    kv_rows: Tensor
    masks: Tensor  # int64 [N, W]
    depths: Tensor  # int32 [N]
    tree_lens: Tensor  # int32 [B]
    query_indptr: Tensor  # int32 [B + 1]
    reads: Tensor  # int64 [N]: which features
    writes: Tensor  # int64 [N]
    rows: Tensor  # uint8 [N, ROW]

    @staticmethod
    def empty(shape: GrowthShape, device: torch.device) -> NextStep:
        """Of no rows, but that there is room for them."""
        rows, each = shape.max_rows, shape.num_sequences

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return NextStep(
            zeros(rows),
            zeros(rows),
            zeros(rows) - 1,
            zeros(rows, shape.mask_words),
            zeros(rows, dtype=torch.int32),
            zeros(each, dtype=torch.int32),
            zeros(each + 1, dtype=torch.int32),
            zeros(rows),
            zeros(rows),
            zeros(rows, ROW.itemsize, dtype=torch.uint8),
        )


class Places(NamedTuple):
    """Where things are.

    Attributes:
        page_size: rows of a page.
        first_id: token of column 0, if the columns' tokens have no table.
        num_target_tokens: ids from there on are no token of the target's.
        first_feature: of the first step's first row; others follow, N for each step.
        nobodys_feature: written by rows that stand for nothing.
    """

    page_size: int
    first_id: int
    num_target_tokens: int
    first_feature: int
    nobodys_feature: int


def grow_trees(
    first: FirstStep,
    sums: Tensor,
    winners: Tensor,
    table: Tensor,
    page_table: Tensor,
    growth: Growth,
    next_step: NextStep,
    shape: GrowthShape,
    places: Places,
    is_first: bool,
    use_kernel: bool = False,
) -> None:
    """Takes in what a step proposed, and fills the next one.

    Args:
        first: of the drafting's first step, also behind later ones.
        sums, winners: uint8 [N, SUMS], [N, C, WINNER]: what `sample_shard` answered to the rows of this step.
        table: int64, the token of each column, or no elements where they are consecutive.
        page_table: int32 [B, *].
        growth, next_step: written to.
        is_first: this step is the first.
        use_kernel: run `grow_trees.cu` (tensors on a GPU).
    """
    numbers = [*shape, *places, int(is_first)]
    arguments = (list(first), sums, winners, table, page_table, list(growth), list(next_step), numbers)
    if use_kernel:
        grow_trees_op(*arguments)
    else:
        _plain(*arguments)


def _plain(
    first: Sequence[Tensor],
    sums: Tensor,
    winners: Tensor,
    table: Tensor,
    page_table: Tensor,
    growth: Sequence[Tensor],
    next_step: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    given, kept, following = FirstStep(*first), Growth(*growth), NextStep(*next_step)
    shape, places, is_first = GrowthShape(*numbers[:5]), Places(*numbers[5:10]), bool(numbers[10])
    num_sequences, num_each = given.header.tolist()
    rows = following.rows.numpy().view(ROW)[:, 0]
    for tensor, padding in zip(following[:5], (0, 0, -1, 0, 0), strict=True):
        tensor[num_sequences * num_each :] = padding
    for tensor in (following.reads, following.writes):
        tensor[num_sequences * num_each :] = places.nobodys_feature
    rows["source"][num_sequences * num_each :] = -1
    kept.row_values[num_sequences * num_each :] = 0.0
    following.tree_lens[num_sequences:] = 0
    indptr = torch.arange(len(following.query_indptr)).clamp(max=num_sequences) * num_each
    following.query_indptr.copy_(indptr)
    for b, grown in enumerate(given.sequences.numpy().view(GROWN)[:num_sequences, 0]):
        step, num_before = (0, 0) if is_first else kept.num_done[b].tolist()
        begin, num = (grown["first_row"], grown["num_rows"]) if is_first else (b * num_each, num_each)
        own = slice(int(begin), int(begin + num))
        if is_first:
            kept.depths[0, own], kept.masks[0, own] = given.depths[own], given.masks[own]
        values = given.values if is_first else kept.row_values
        _take_in(
            grown,
            given.seen[b].numpy(),
            values[own].numpy(),
            sums[own].numpy().view(SUMS)[:, 0],
            winners[own].numpy().view(WINNER)[..., 0],
            table,
            kept,
            step,
            own,
            shape,
            places,
        )
        if step + 1 < shape.num_steps:
            num_chosen = _fill(
                grown, b, num_each, num_before, table, page_table[b], kept, following, step, shape, places
            )
            kept.num_done[b, 0], kept.num_done[b, 1] = step + 1, num_before + num_chosen


def _take_in(
    grown: np.void,
    seen: np.ndarray,
    values: np.ndarray,
    sums: np.ndarray,
    winners: np.ndarray,
    table: Tensor,
    kept: Growth,
    step: int,
    own: slice,
    shape: GrowthShape,
    places: Places,
) -> None:
    """The proposals of a sequence's rows `own`, whose nodes have these values."""
    columns, log_probs, _ = _of_history(kept.history[step], shape)
    divisor = grown["row"]["temperature"] or np.float32(1.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = (winners["logit"] - sums["maximum"][:, None]) / divisor
        found -= np.log(sums["kept_sum"]).astype(np.float32)[:, None]
    is_law = np.abs(sums["maximum"]) <= MAX_LOGIT
    found[~is_law | (values <= 0.0)] = -np.inf
    found[winners["score"] == -np.inf] = -np.inf
    log_probs[own] = torch.from_numpy(found.astype(np.float32))
    asked = np.where((values > 0.0)[:, None], winners["column"], -1)
    columns[own] = torch.from_numpy(asked.astype(np.int32))
    is_greedy = bool(grown["is_greedy"])
    exact: Floats = found.astype(np.float64)
    priors, kinds = priors_and_kinds(exact, np.full(len(found), is_greedy))
    kinds = kinds - NUM_KINDS_OF_LAW * is_greedy
    worth = values[:, None] * acceptances(priors, seen[kinds, 0].astype(np.float64), seen[kinds, 1])
    ids = table[torch.from_numpy(asked).long().clamp(min=0)] if len(table) else asked + places.first_id
    may_grow = (found > -np.inf) & (np.asarray(ids) < places.num_target_tokens)
    may_grow &= (kept.depths[step, own].numpy() + 1 < grown["max_depth"])[:, None]
    worth = np.where(may_grow & (worth > grown["least_value"]), worth, 0.0)
    kept.values[step, own] = torch.from_numpy(worth.astype(np.float32))


def _fill(
    grown: np.void,
    b: int,
    num_each: int,
    num_before: int,
    table: Tensor,
    pages: Tensor,
    kept: Growth,
    following: NextStep,
    step: int,
    shape: GrowthShape,
    places: Places,
) -> int:
    """The rows of the next step of sequence `b`; returns how many stand for a proposal."""
    first_row, C = int(grown["first_row"]), shape.num_best
    begins = [(0, first_row, int(grown["num_rows"]))]
    begins += [(s, b * num_each, num_each) for s in range(1, step + 1)]
    candidates = np.concatenate([(s * shape.max_rows + r) * C + np.arange(n * C) for s, r, n in begins])
    flat_values = kept.values.view(-1)
    own = flat_values[torch.from_numpy(candidates)].numpy()
    order = np.argsort(-own, kind="stable")[: max(0, min(num_each, int(grown["most_rows"]) - num_before))]
    chosen = candidates[order[own[order] > 0.0]]
    stands_for = _of_history(kept.history[step + 1], shape)[2]
    flat_depths, flat_masks = kept.depths.view(-1), kept.masks.view(-1, shape.mask_words)
    root = int(grown["context_len"] + grown["num_known"])
    for j in range(num_each):
        r, tree_row = b * num_each + j, int(grown["tree_len"]) + step * num_each + j
        index, next_row = int(grown["context_len"]) + tree_row, (step + 1) * shape.max_rows + r
        place = int(chosen[j]) if j < len(chosen) else -1
        is_node, parent = place >= 0, max(place, 0) // C
        depth = int(flat_depths[parent]) + 1 if is_node else 0
        mask = flat_masks[parent].clone() if is_node else torch.zeros_like(flat_masks[0])
        mask[tree_row // 64] |= int(np.uint64(1 << (tree_row % 64)).view(np.int64))
        token = 0
        if is_node:
            at_step = parent // shape.max_rows
            columns = _of_history(kept.history[at_step], shape)[0]
            column = int(columns.reshape(-1)[place - at_step * shape.max_rows * C])
            token = int(table[column]) if len(table) else places.first_id + column
        following.tokens[r], following.positions[r] = token, root + depth
        following.kv_rows[r] = (
            int(pages[index // places.page_size]) * places.page_size + index % places.page_size
        )
        following.masks[r] = flat_masks[next_row] = mask
        following.depths[r], flat_depths[next_row] = int(grown["num_known"]) + depth, depth
        kept.row_values[r] = flat_values[place] if is_node else 0.0
        stands_for[r] = place
        following.reads[r] = places.first_feature + (parent if is_node else first_row)
        following.writes[r] = places.first_feature + next_row if is_node else places.nobodys_feature
        row = following.rows[r : r + 1].numpy().view(ROW)[:, 0]
        row[0] = grown["row"]
        row["key"] = noise_key(int(grown["seed"]), int(grown["root_position"]) + depth + 1)
        row["source"] = r if is_node else -1
        if is_node:
            flat_values[place] = 0.0
    following.tree_lens[b] = int(grown["tree_len"]) + (step + 1) * num_each
    return len(chosen)


def _of_history(words: Tensor, shape: GrowthShape) -> tuple[Tensor, Tensor, Tensor]:
    """A step's columns int32 [N, C], log p float32 [N, C], and [N] what rows stand for."""
    size = shape.max_rows * shape.num_best
    columns, log_probs, stands_for = words.split([size, size, shape.max_rows])
    return (
        columns.view(-1, shape.num_best),
        log_probs.view(torch.float32).view(-1, shape.num_best),
        stands_for,
    )


def steps_of(history: Tensor, shape: GrowthShape) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each step of a history on the host: int32 [N, C] columns, float32 [N, C] log p, int32 [N] what rows stand
    for."""
    return [tuple(x.numpy() for x in _of_history(words, shape)) for words in history]  # type: ignore[misc]


@custom_op("outrider::grow_trees", mutates_args=("growth", "next_step"), device_types="cpu")
def grow_trees_op(
    first: list[Tensor],
    sums: Tensor,
    winners: Tensor,
    table: Tensor,
    page_table: Tensor,
    growth: list[Tensor],
    next_step: list[Tensor],
    numbers: list[int],
) -> None:
    """With shape, places and whether the step is the first as `numbers`; on a CPU the reference."""
    _plain(first, sums, winners, table, page_table, growth, next_step, numbers)


@grow_trees_op.register_kernel("cuda")
def grow_trees_on_gpu(
    first: list[Tensor],
    sums: Tensor,
    winners: Tensor,
    table: Tensor,
    page_table: Tensor,
    growth: list[Tensor],
    next_step: list[Tensor],
    numbers: list[int],
) -> None:
    plan = plan_grow_trees(first, sums, winners, table, page_table, growth, next_step, numbers)
    launch(sums.device, [plan])


def plan_grow_trees(
    first: Sequence[Tensor],
    sums: Tensor,
    winners: Tensor,
    table: Tensor,
    page_table: Tensor,
    growth: Sequence[Tensor],
    next_step: Sequence[Tensor],
    numbers: Sequence[int],
) -> LaunchPlan:
    """A block for each sequence; arguments as those of the operator."""
    shape, places, is_first = GrowthShape(*numbers[:5]), Places(*numbers[5:10]), numbers[10]
    return LaunchPlan(
        source="grow_trees",
        kernel="grow_trees",
        grid=(shape.num_sequences, 1, 1),
        block=_THREADS,
        shared_bytes=8 * _WARPS + 8 * shape.max_rows,
        arguments=(
            *first,
            sums,
            winners,
            table if len(table) else np.int64(0),
            page_table,
            *growth,
            *next_step,
            *map(
                np.int32,
                (
                    is_first,
                    shape.max_rows,
                    shape.num_best,
                    shape.num_steps,
                    shape.mask_words,
                    places.page_size,
                ),
            ),
            np.int32(page_table.stride(0)),
            *map(np.int64, places[1:]),
        ),
    )
