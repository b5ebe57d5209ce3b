"""Draft trees that grow on the device: of all that a drafting has proposed so far, the proposals that are worth most
become the rows of its next step. What a proposal is worth is worked out as the host does it (`proposals.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.growth import GROWN, FirstStep, Growth, GrowthShape, NextStep, Places, of_history
from outrider.kernels.launch_plans import LaunchPlan, launch
from outrider.kernels.noise import noise_key
from outrider.kernels.proposals import NUM_KINDS_OF_LAW, Floats, acceptances, priors_and_kinds
from outrider.kernels.sample_shard import MAX_LOGIT, ROW, SUMS, WINNER

_THREADS = 128
_WARPS = _THREADS // 32


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
    columns, log_probs, _ = of_history(kept.history[step], shape)
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
    stands_for = of_history(kept.history[step + 1], shape)[2]
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
            columns = of_history(kept.history[at_step], shape)[0]
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
