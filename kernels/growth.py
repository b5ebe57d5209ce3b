"""What a draft that grows on the device is told, keeps, and leaves: the records and arrays of `grow_trees`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.proposals import NUM_KINDS_OF_LAW
from outrider.kernels.sample_shard import ROW
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
    """What is kept from step to step.

    `history` is int32 [S, words_per_step]: of each step columns [N, C], -1 where nothing was asked; log p [N, C] as
    bits, -inf where a law removed them; and the proposals that its rows stand for [N], by place
    (step * N + row) * C + rank, -1 where a row stands for none.
    """

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
    """The rows of the next step, as `ForwardBatch` and `sample_shard` take them.

    Rows and sequences that are not there write nothing, attend to nothing and ask for nothing.
    """

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


def of_history(words: Tensor, shape: GrowthShape) -> tuple[Tensor, Tensor, Tensor]:
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
    return [tuple(x.numpy() for x in of_history(words, shape)) for words in history]  # type: ignore[misc]
