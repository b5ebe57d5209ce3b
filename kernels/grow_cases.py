"""Cases of `grow_trees`: three steps of several sequences, of which some have known tokens before their nodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.grow_trees import grow_trees_op, plan_grow_trees
from outrider.kernels.growth import GROWN, FirstStep, Growth, GrowthShape, NextStep, Places
from outrider.kernels.prepared import Check, Guards, PreparedCase
from outrider.kernels.proposals import NUM_KINDS_OF_LAW
from outrider.kernels.sample_shard import SUMS, WINNER, AskedRows

_PAGE_SIZE, _NUM_PAGES = 4, 40
_VOCAB_SIZE = 500
_TOLERANCE = 1e-5  # of exponentials and logarithms in float32


class _Exponentials(Check):
    """Of logarithms, among them -inf, of which there is no relative error."""

    def error(self) -> float:
        return Check(self.name, self.actual.cpu().exp(), self.expected.exp(), self.tolerance).error()


def prepare_grow_trees(
    num_sequences: int,
    num_each: int,
    num_best: int,
    device: torch.device,
    has_table: bool = False,
    seed: int = 9,
) -> PreparedCase:
    """A first step and two later ones. The last sequence may grow little; some tokens are none of the target's."""
    random = np.random.default_rng(seed)
    shape = GrowthShape(num_sequences * num_each + 5, num_sequences + 2, num_best, 3, 3)
    first = _first_step(random, shape, num_sequences, num_each)
    table = torch.from_numpy(np.sort(random.permutation(3 * _VOCAB_SIZE)[:_VOCAB_SIZE]))
    table = table if has_table else table[:0]
    num_target_tokens = 2 * _VOCAB_SIZE if has_table else 7 + _VOCAB_SIZE // 2
    places = Places(_PAGE_SIZE, 7, num_target_tokens, 1000, 5000)
    pages = torch.from_numpy(random.integers(0, 99, (shape.num_sequences, _NUM_PAGES + 3))).int()
    answers = [_answers(random, shape, num_each) for _ in range(shape.num_steps)]
    expected = (list(Growth.empty(shape, torch.device("cpu"))), _next_step(shape))
    guards = Guards(device)
    there = [[guards.copy(x) for x in each] for each in expected]
    fixed = [x.to(device) for x in (*first, table, pages)]
    plans = []
    for step, given in enumerate(answers):
        numbers = [*shape, *places, int(step == 0)]
        grow_trees_op(list(first), *given, table, pages, *expected, numbers)
        moved = [x.to(device) for x in given]
        plans.append(
            plan_grow_trees(
                fixed[:6], moved[0], moved[1], fixed[6], fixed[7][:, :_NUM_PAGES], there[0], there[1], numbers
            )
        )
    return PreparedCase(
        f"grow_trees: {num_sequences} sequences, {num_each} rows, {num_best} proposals"
        f"{', with a table' if has_table else ''}, {seed}",
        "grow_trees",
        tuple(plans),
        tuple(_checks(there, expected, shape)),
        tuple(guards.buffers),
        sum(x.nbytes for x in (*there[0], *there[1])),
        0,
    )


def _first_step(
    random: np.random.Generator, shape: GrowthShape, num_sequences: int, num_each: int
) -> FirstStep:
    grown = np.zeros(shape.num_sequences, dtype=GROWN)
    rows = grown["row"]
    rows[:] = AskedRows.nothing(1).rows
    rows["temperature"] = np.where(np.arange(len(grown)) % 3 == 1, 0.0, 0.8)
    rows["num_best"], rows["wants_sum"] = shape.num_best, 1
    grown["is_greedy"] = rows["temperature"] == 0.0
    grown["seed"] = random.integers(0, 2**63, len(grown), dtype=np.uint64) * 2 + 1
    grown["least_value"] = 0.02
    grown["num_rows"][:num_sequences] = 1 + (np.arange(num_sequences) + 2) % num_each
    grown["first_row"] = np.concatenate([[0], grown["num_rows"].cumsum()[:-1]])
    grown["num_known"][:num_sequences] = np.where(grown["num_rows"][:num_sequences] > 1, 1, 0)
    grown["context_len"] = 3 + 5 * np.arange(len(grown))
    grown["tree_len"] = grown["num_rows"] + 60
    grown["max_depth"] = 4 - np.arange(len(grown)) % 3
    grown["most_rows"] = 2 * num_each
    grown["most_rows"][num_sequences - 1] = 2
    grown["root_position"] = grown["context_len"] + 17
    values = random.uniform(0.2, 1.0, shape.max_rows).astype(np.float32)
    depths = random.integers(0, 2, shape.max_rows).astype(np.int32)
    for each in grown[:num_sequences]:
        values[each["first_row"] : each["first_row"] + each["num_known"]] = 0.0
    masks = random.integers(-(2**63), 2**63, (shape.max_rows, shape.mask_words), dtype=np.int64)
    seen = random.uniform(0.0, 50.0, (shape.num_sequences, NUM_KINDS_OF_LAW, 2)).astype(np.float32)
    seen[..., 0] *= 0.5
    return FirstStep(
        torch.tensor([num_sequences, num_each], dtype=torch.int32),
        torch.from_numpy(grown.view(np.uint8).reshape(len(grown), -1)),
        torch.from_numpy(seen),
        torch.from_numpy(values),
        torch.from_numpy(depths),
        torch.from_numpy(masks),
    )


def _answers(random: np.random.Generator, shape: GrowthShape, num_each: int) -> tuple[Tensor, ...]:
    """Of rows at all confidences; in some a proposal has run out, in one no logit is a number."""
    sums = np.zeros(shape.max_rows, dtype=SUMS)
    winners = np.zeros((shape.max_rows, shape.num_best), dtype=WINNER)
    sums["maximum"] = random.normal(3.0, 2.0, sums.shape)
    below = random.exponential(1.0, winners.shape).cumsum(axis=1) - 0.5 * random.random((len(winners), 1))
    winners["logit"] = sums["maximum"][:, None] - np.maximum(below, 0.0)
    winners["score"] = -np.arange(shape.num_best)
    winners["score"][random.random(winners.shape) < 0.1] = -np.inf
    winners["column"] = random.integers(0, _VOCAB_SIZE, winners.shape)
    sums["kept_sum"] = 1.0 + random.exponential(0.5, sums.shape)
    sums["maximum"][min(2, num_each - 1)] = np.nan
    return tuple(torch.from_numpy(x.view(np.uint8).reshape(*x.shape, -1)) for x in (sums, winners))


def _next_step(shape: GrowthShape) -> list[Tensor]:
    """With something in it that must go."""
    *arrays, rows = NextStep.empty(shape, torch.device("cpu"))
    return [*(x.fill_(77) for x in arrays), rows]


def _checks(
    there: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], shape: GrowthShape
) -> Iterator[Check]:
    names = (*Growth._fields, *NextStep._fields)
    size = shape.max_rows * shape.num_best
    for name, own, other in zip(names, chain(*there), chain(*expected), strict=True):
        if name == "history":
            for part, at in (("columns", slice(0, size)), ("what rows stand for", slice(2 * size, None))):
                yield Check(part, own[:, at], other[:, at], 0)
            own, other = (x[:, size : 2 * size].view(torch.float32) for x in (own, other))
            yield _Exponentials("p", own, other, _TOLERANCE)
        else:
            yield Check(name, own, other, _TOLERANCE if own.is_floating_point() else 0)
