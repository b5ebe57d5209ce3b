"""A target's round as one graph, on a pretended GPU: it does what the host would have launched around it."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.kernels.sample_shard import EDIT, AskedRows, sample_shard
from outrider.kernels.shard_ids import ShardIds
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import GraphedForward
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.static_batch import GraphCapacity
from outrider.workers.model.transformer import Transformer
from outrider.workers.model.whole_rounds import Around, WholeRounds
from outrider.workers.sampling.candidates import usual_list_size
from outrider.workers.weights.random_source import RandomSource
from support.counted_gpu import CountedGpu, counted_gpu
from support.round_counts import KERNELS, MODEL
from support.rows import SequenceRows, batch_of, chain

LIST_SIZE = 128
NO_MOVES = torch.empty(0, dtype=torch.int64)
ROWS = SequenceRows([0, 1, 2], 0, chain(5), 0, [605, 606, 607, 608, 609])  # tokens that this rank has


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedGpu]:
    torch.set_num_threads(1)
    with counted_gpu(monkeypatch) as gpu, torch.inference_mode():
        yield gpu


def half_of_a_model(gpu: CountedGpu) -> tuple[PagedCache, GraphedForward, WholeRounds]:
    """The second half of the vocabulary, with the rest of one of two ranks."""
    source = RandomSource(
        f"{MODEL.replace('num_heads=1&num_kv_heads=1', 'num_heads=2&num_kv_heads=2')}&num_layers=1"
    )
    plan = ShardPlan(source.config, 1, 2)
    model = Transformer(
        load_weights(plan, source, torch.bfloat16, gpu.device, packed=False), SoloCommunicator(), KERNELS
    )
    cache = PagedCache(source.config, plan, 24, 4, torch.bfloat16, gpu.device, use_kernel=True)
    ids = ShardIds(torch.arange(plan.vocab.start, plan.vocab.stop))
    assert usual_list_size(source.config.vocab_size, len(ids.all)) == LIST_SIZE
    whole = WholeRounds(cache, ids, LIST_SIZE)
    forward = GraphedForward(model, cache, [GraphCapacity(8, 8, 24, 1, 96)], (), True, whole)
    forward.rehearse()
    forward.capture()
    return cache, forward, whole


def asked_of(num_rows: int) -> AskedRows:
    """The best token of rows, greedy and not, and of every second one the likeliest tokens and its sum."""
    keys = np.arange(2 * num_rows, dtype=np.uint32).reshape(-1, 2)
    temperatures = np.where(np.arange(num_rows) % 3, 0.8, 0.0).astype(np.float32)
    asked = AskedRows.best(temperatures, keys, 1)
    chosen = np.arange(0, num_rows, 2)
    asked.rows["num_best"][chosen] = 0
    asked.rows["likeliest"][chosen] = np.arange(len(chosen))
    asked.rows["wants_raw"][0] = 1
    return replace(asked, list_size=LIST_SIZE)


@pytest.mark.parametrize("sampled", [[0, 1, 2, 3, 4], [4], [3, 1]])
def test_a_graph_answers_what_a_launch_behind_it_would_answer(gpu: CountedGpu, sampled: list[int]) -> None:
    _, forward, _ = half_of_a_model(gpu)
    batch, asked = batch_of([ROWS], 4, torch.device("cpu")), asked_of(len(sampled))
    around = Around(NO_MOVES, NO_MOVES, np.array(sampled), asked)
    staged = forward.stage(batch, [torch.tensor([7])], around)
    assert staged.is_whole
    (other,) = forward.send(staged)
    assert other.tolist() == [7]
    with gpu.counted() as counts:
        hidden = forward.run()
    assert (counts.replays, counts.launches) == (1, 0)
    assert hidden.sampled is not None
    assert hidden.logits is not None
    with gpu.counted() as counts:
        found = hidden.sampled.answers(asked)
    assert (counts.downloads, counts.launches) == (1, 0)
    there = torch.from_numpy(np.array(sampled)).to(gpu.device)
    expected = sample_shard(hidden.logits[there].contiguous(), asked, hidden.sampled.ids, use_kernel=True)
    wants_best, wants_sum = asked.rows["num_best"] > 0, asked.rows["wants_sum"] > 0
    assert found.winners[wants_best].tolist() == expected.winners[wants_best].tolist()
    assert (found.winners["column"][~wants_best] == -1).all()
    for name, rows in (("maximum", slice(None)), ("sum", wants_sum), ("raw_sum", [0]), ("raw_maximum", [0])):
        assert found.sums[name][rows].tolist() == expected.sums[name][rows].tolist()
    assert found.lists.tolist() == expected.lists.tolist()
    assert found.lists.shape == ((len(sampled) + 1) // 2, LIST_SIZE)


def test_rows_move_before_a_replay_and_what_was_asked_before_is_forgotten(gpu: CountedGpu) -> None:
    cache, forward, _ = half_of_a_model(gpu)
    batch, asked = batch_of([ROWS], 4, torch.device("cpu")), asked_of(5)
    forward.send(forward.stage(batch, (), Around(NO_MOVES, NO_MOVES, np.arange(5), asked)))
    first = forward.run().sampled
    assert first is not None
    before, answered = cache.kv.cpu().flatten(2, 3).clone(), first.buffer.cpu().clone()
    later = replace(ROWS, pages=[7, 8], tokens=[701, 702], parents=chain(2))
    moves = (torch.tensor([1, 2, 4]), torch.tensor([60, 1, 2]))
    around = Around(*moves, np.zeros(0, np.int64), None)
    forward.send(forward.stage(batch_of([later], 4, torch.device("cpu")), (), around))
    second = forward.run().sampled
    after = cache.kv.cpu().flatten(2, 3)
    assert before[:, :, [1, 2, 4]].any()
    assert torch.equal(after[:, :, [60, 1, 2]], before[:, :, [1, 2, 4]])
    assert after[:, :, 28:30].any()  # the rows that were computed
    untouched = [0, 3, *range(5, 28), *range(30, 60), *range(61, 96)]
    assert torch.equal(after[:, :, untouched], before[:, :, untouched])
    assert second is not None
    assert torch.equal(second.buffer.cpu(), answered)  # nothing was sampled


def test_what_a_graph_does_not_do_is_sent_for_launches_of_their_own(gpu: CountedGpu) -> None:
    cache, forward, whole = half_of_a_model(gpu)
    batch, sampled = batch_of([ROWS], 4, torch.device("cpu")), np.arange(5)
    usual = asked_of(5)
    edited = replace(usual, edits=np.zeros(3, dtype=EDIT))
    raw = replace(usual, raw_list_size=5, rows=usual.rows.copy())
    raw.rows["raw_likeliest"] = np.arange(5)
    many = torch.arange(65)
    for moves, asked in (
        ((NO_MOVES, NO_MOVES), edited),
        ((NO_MOVES, NO_MOVES), raw),
        ((NO_MOVES, NO_MOVES), replace(usual, list_size=LIST_SIZE + 1)),
        ((NO_MOVES, NO_MOVES), replace(usual, num_best=2)),
        ((many, many), usual),
    ):
        around = Around(*moves, sampled, asked)
        assert not whole.takes(around, 8)
        staged = forward.stage(batch, [torch.tensor([7])], around)
        assert not staged.is_whole
        other, sources, targets, rows, edits = forward.send(staged)
        assert other.tolist() == [7]
        assert [sources.tolist(), targets.tolist()] == [x.tolist() for x in moves]
        assert [rows.cpu().tolist(), edits.cpu().tolist()] == [x.tolist() for x in asked.on_host()]
        before = cache.kv.cpu().clone()
        forward.run()
        assert torch.equal(cache.kv.cpu()[:, :, 5:], before[:, :, 5:])  # nothing moved there
    assert whole.takes(Around(many[:64], many[:64], sampled, usual), 8)
    assert whole.takes(Around(many, many, sampled, usual), 128)  # the paths of a larger round
