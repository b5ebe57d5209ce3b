import torch

from outrider.kernels.gather_rows import gather_rows


def test_rows_come_in_the_order_asked_for() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert gather_rows(rows, torch.tensor([2, 0, 2])).tolist() == [[4, 5], [0, 1], [4, 5]]
