"""What a host asks of a GPU in a round, on one that is pretended and counts; and that it counts and replays right."""

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.workers.model.cache import CacheScales
from outrider.workers.model.cuda_graphs import GraphedForward, can_be_captured
from outrider.workers.model.fp8_cache import Fp8PagedCache
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.static_batch import GraphCapacity
from support.counted_gpu import Counts, counted_gpu
from support.round_counts import counts_of_rounds, model_and_cache
from support.round_table import TABLE, document
from support.rows import SequenceRows, batch_of, chain


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_the_table_in_the_repository_is_the_counted_one() -> None:
    assert TABLE.read_text() == document(counts_of_rounds()), "run: python tests/support/round_table.py"


def test_launches_copies_and_waits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_gpu(monkeypatch) as gpu:
        pinned = torch.empty(4, pin_memory=True)
        there = torch.zeros(4, device=gpu.device)
        for work, expected in (
            (lambda: there.view(2, 2)[0], Counts()),
            (lambda: there + 1, Counts(launches=1)),
            (lambda: there[:2].add_(1), Counts(launches=1)),
            (lambda: there[there > 0], Counts(launches=2, waits=1)),
            (lambda: torch.nn.functional.rms_norm(there, (4,)), Counts(launches=1)),
            (lambda: torch.as_tensor([1.0], device=gpu.device), Counts(uploads=1, waits=1)),
            (lambda: torch.ones(4).to(gpu.device), Counts(uploads=1, waits=1)),
            (lambda: there.copy_(pinned, non_blocking=True), Counts(uploads=1)),
            (lambda: there.copy_(torch.ones(4), non_blocking=True), Counts(uploads=1, waits=1)),
            (lambda: there.to(torch.float64), Counts(launches=1)),
            (lambda: there.cpu(), Counts(downloads=1, waits=1)),
            (lambda: there[0].item(), Counts(downloads=1, waits=1)),
            (lambda: torch.cuda.synchronize(), Counts(waits=1)),
        ):
            with gpu.counted() as counts:
                work()
            assert counts == expected


@pytest.mark.parametrize("narrow", [False, True], ids=["bf16 cache", "FP8 cache"])
def test_a_replay_computes_what_was_captured_from_what_is_there_now(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_gpu(monkeypatch) as gpu, torch.inference_mode():
        model, cache = model_and_cache(gpu, 1)
        if narrow:
            plan = ShardPlan(model.config, 0, 1)
            cache = Fp8PagedCache(model.config, plan, 24, 4, gpu.device, [CacheScales(0.01, 0.02)])
        assert can_be_captured(model)
        graphed = GraphedForward(model, cache, [GraphCapacity(8, 8, 24, 1, 96)])
        graphed.rehearse()
        graphed.capture()
        for tokens in ([1, 2, 3], [4, 5]):
            chained = SequenceRows([0, 1, 2], 0, chain(len(tokens)), 0, tokens)
            batch = batch_of([chained], 4, torch.device("cpu"))
            with gpu.counted() as counts:
                replayed = graphed(batch).last.cpu()
            assert counts.replays == 1
            assert cache.kv.cpu().view(torch.uint8).any()
            assert torch.equal(replayed, model.forward(batch.to(gpu.device), cache).last.cpu())


def test_a_capture_refuses_what_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_gpu(monkeypatch) as gpu:
        there = torch.zeros(4, device=gpu.device)
        for work in (lambda: there.cpu(), lambda: torch.ones(4).to(gpu.device), lambda: there[there > 0]):
            with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                work()
