import torch

from outrider.kernels.kv_commit import kv_commit


def numbered_cache() -> torch.Tensor:
    """[2 layers, 2, 3 pages, 4 rows, 1 head, 2]: every row tells its layer, kind and slot."""
    rows = torch.arange(12.0).view(1, 1, 3, 4, 1, 1)
    layers = torch.tensor([100.0, 200.0]).view(2, 1, 1, 1, 1, 1)
    kinds = torch.tensor([0.0, 50.0]).view(1, 2, 1, 1, 1, 1)
    return (rows + layers + kinds).expand(2, 2, 3, 4, 1, 2).contiguous()


def slots_of(kv: torch.Tensor, layer: int, kind: int) -> list[float]:
    return (kv[layer, kind, ..., 0].flatten() - 100 * (layer + 1) - 50 * kind).tolist()


def test_an_accepted_path_moves_down_in_all_layers() -> None:
    # Context of 2 rows, tree rows 0..6 in slots 2..8; path 0 -> 2 -> 5 was accepted: slots 2, 4, 7 become
    # 2, 3, 4. The moves overlap: slot 4 is read before it is written.
    kv = numbered_cache()
    kv_commit(kv, torch.tensor([4, 7]), torch.tensor([3, 4]))
    for layer in (0, 1):
        for kind in (0, 1):
            assert slots_of(kv, layer, kind) == [0, 1, 2, 4, 7, 5, 6, 7, 8, 9, 10, 11]


def test_rows_may_trade_places() -> None:
    kv = numbered_cache()
    kv_commit(kv, torch.tensor([1, 9]), torch.tensor([9, 1]))
    assert slots_of(kv, 1, 1) == [0, 9, 2, 3, 4, 5, 6, 7, 8, 1, 10, 11]


def test_nothing_to_move() -> None:
    kv = numbered_cache()
    kv_commit(kv, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert torch.equal(kv, numbered_cache())
