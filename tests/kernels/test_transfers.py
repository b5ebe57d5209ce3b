"""Arrays of all types and sizes arrive as they were; on a device they are one copy."""

import pytest
import torch

from outrider.kernels.transfers import Part, download, num_bytes_of, upload, views_of
from support.counted_gpu import Counts, counted_gpu

ARRAYS = (
    torch.arange(3, dtype=torch.int32),
    torch.empty(0, dtype=torch.int64),
    torch.arange(10.0).view(2, 5),
    torch.tensor([1.5], dtype=torch.float64),
    torch.arange(12).view(3, 4)[:, ::2],
)


def test_all_go_there_and_back_in_a_copy_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_gpu(monkeypatch) as gpu:
        with gpu.counted() as counts:
            there = upload(ARRAYS, gpu.device)
        assert counts == Counts(uploads=1)
        assert {tensor.device for tensor in there} == {gpu.device}
        with gpu.counted() as counts:
            back = download(there)
        assert (counts.downloads, counts.waits) == (1, 1)
    for tensor, other in zip(ARRAYS, back, strict=True):
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert torch.equal(tensor, other)


def test_on_the_host_nothing_is_copied() -> None:
    cpu = torch.device("cpu")
    assert all(a is b for a, b in zip(upload(ARRAYS, cpu), ARRAYS, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(download(ARRAYS), ARRAYS, strict=True))
    assert download(()) == []


def test_parts_begin_where_kernels_can_read_16_bytes() -> None:
    parts = (Part((3,), torch.int32), Part((1, 2), torch.int64), Part((5,), torch.uint8))
    buffer = torch.zeros(num_bytes_of(parts), dtype=torch.uint8)
    views = views_of(buffer, parts)
    assert [view.data_ptr() - buffer.data_ptr() for view in views] == [0, 16, 32]
    assert len(buffer) == 48
