"""Commit of an accepted path: its cache rows move down to directly behind the committed prefix."""

from torch import Tensor


def kv_commit(kv: Tensor, source_slots: Tensor, target_slots: Tensor) -> None:
    """Copies cache rows of all layers in place; sources are read before any target is written.

    Args:
        kv: [L, 2, P, PAGE, HK, D], keys and values of all layers, contiguous.
        source_slots, target_slots: int64 [M], slot = page * PAGE + offset; no target twice.
    """
    assert source_slots.shape == target_slots.shape, (source_slots.shape, target_slots.shape)
    if source_slots.numel() == 0:
        return
    L, two, P, PAGE, HK, D = kv.shape
    rows = kv.view(L * two, P * PAGE, HK * D)
    rows.index_copy_(1, target_slots, rows.index_select(1, source_slots))
