"""Rows of a matrix, packed."""

from torch import Tensor


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [N, ...] picked by index int64 [M]: a new tensor [M, ...]."""
    return rows.index_select(0, index)
