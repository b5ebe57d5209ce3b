"""Batches padded to a graph's capacity: what the kernels make of them on the CPU executors. No graph is captured."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.kernels.attention_cases import (
    AttentionCase,
    attention_in_float64,
    build_attention_inputs,
)
from outrider.kernels.attention_work import attention_shape
from outrider.kernels.rope_append import plan_rope_append
from outrider.kernels.selection import REFERENCES
from outrider.kernels.tree_attention import plan_tree_attention
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.model import cuda_graphs
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cuda_graphs import (
    GraphedForward,
    can_be_captured,
    draft_capacities,
    forward_of,
    target_capacities,
)
from outrider.workers.model.static_batch import GraphCapacity, StaticBatch
from outrider.workers.model.transformer import Hidden
from support.cuda_on_cpu.executor import SCHEDULES
from support.cuda_on_cpu.kernels import source_kernels
from support.rows import SequenceRows, batch_of, chain
from support.stand_in_cuda import StandInCuda
from support.thread_group import ThreadCommunicator, run_ranks

CPU = torch.device("cpu")
CASE = AttentionCase("graph", (40, 9), (5, 3), page_size=4)
CAPACITY = GraphCapacity(num_rows=16, num_sequences=4, max_pages=20, mask_words=2, max_keys=1024)


def filled(case: AttentionCase) -> tuple[StaticBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A static batch that held another batch before, and the queries (padded) and pages."""
    inputs = build_attention_inputs(case)
    num_rows = inputs.q.shape[0]
    static = StaticBatch(CAPACITY, case.page_size, CPU)
    before = [SequenceRows(list(range(8)), 3, chain(4), 0, [1] * 4) for _ in range(4)]
    static.fill(batch_of(before, case.page_size, CPU))
    rows = torch.arange(num_rows)
    static.fill(ForwardBatch(rows + 100, rows + 200, rows + 300, inputs.batch))
    q = torch.full((CAPACITY.num_rows, *inputs.q.shape[1:]), float("nan")).to(inputs.q.dtype)
    q[:num_rows] = inputs.q
    return static, q, inputs.k_pages, inputs.v_pages


def test_padding_writes_and_attends_to_nothing() -> None:
    static, *_ = filled(CASE)
    batch = static.batch
    assert batch.tokens.tolist() == [*range(100, 108)] + [0] * 8
    assert batch.kv_rows.tolist() == [*range(300, 308)] + [-1] * 8
    assert batch.tree.query_indptr.tolist() == [0, 5, 8, 8, 8]
    assert batch.tree.context_lens.tolist() == [40, 9, 0, 0]
    assert batch.tree.ancestors[8:].count_nonzero() == 0


@pytest.mark.parametrize("num_sms", [1, 132])
def test_attention_of_a_padded_batch_is_that_of_the_batch(num_sms: int) -> None:
    static, q, k_pages, v_pages = filled(CASE)
    tree = static.batch.tree
    heads = {"num_queries": CAPACITY.num_rows, "num_heads": 8, "num_kv_heads": 2, "num_sms": num_sms}
    shape = attention_shape(max(tree.host_query_lens), CAPACITY.max_keys, CAPACITY.num_sequences, **heads)
    out = torch.full(q.shape, float("nan")).to(q.dtype)
    partial = torch.full((shape.num_slots, shape.tile_rows, q.shape[2]), float("nan"))
    plans = plan_tree_attention(
        q, k_pages, v_pages, tree, CASE.scale, 0, 0.0, 1.0, shape, out, partial, partial[..., 0].contiguous()
    )
    expected = attention_in_float64(CASE, build_attention_inputs(CASE))
    for schedule in SCHEDULES:
        source_kernels().launch(plans, schedule)
        assert (out[:8].double() - expected).norm() / expected.norm() < 4e-3


def test_rope_writes_nothing_for_padding() -> None:
    slots = torch.tensor([2, -1, -1])
    q, k, v = (
        torch.ones(3, 2, 64).bfloat16(),
        torch.ones(3, 1, 64).bfloat16(),
        torch.ones(3, 1, 64).bfloat16(),
    )
    angles = torch.ones(3, 32).bfloat16()
    pages = torch.zeros(2, 2, 1, 64).bfloat16()
    plan = plan_rope_append(
        q, k, v, angles, angles, slots, pages, pages.clone(), 1.0, 1.0, torch.empty_like(q)
    )
    source_kernels().launch([plan])
    assert pages.view(4, 64).abs().sum(dim=1).nonzero().tolist() == [[2]]


def test_a_capacity_holds_what_fits() -> None:
    batch = batch_of([SequenceRows(list(range(5)), 10, chain(6), 0, [1] * 6)], 4, CPU)
    fits = GraphCapacity(num_rows=6, num_sequences=1, max_pages=5, mask_words=1, max_keys=16)
    assert fits.holds(batch)
    for change in (
        {"num_rows": 5},
        {"max_pages": 4},
        {"max_keys": 15},
        {"num_sequences": 0},
        {"mask_words": 0},
    ):
        assert not GraphCapacity(**{**vars(fits), **change}).holds(batch)


def test_capacities_cover_trees_of_every_row_count() -> None:
    model, cache = stand_ins(max_context=1000, num_pages=80, page_size=16)
    capacities = target_capacities(model, cache, 2000)
    assert [c.num_rows for c in capacities] == [8, 16, 32, 64, 128, 256]
    assert [c.mask_words for c in capacities] == [1, 1, 1, 1, 2, 4]
    assert [c.num_sequences for c in capacities] == [8, 16, 32, 64, 64, 64]
    assert {(c.max_pages, c.max_keys) for c in capacities} == {(63, 1000)}


def test_no_capacity_is_larger_than_the_cache() -> None:
    model, cache = stand_ins(max_context=131072, num_pages=80, page_size=16)
    for capacity in target_capacities(model, cache, 131072) + draft_capacities(model, cache):
        assert (capacity.max_pages, capacity.max_keys) == (80, 1280)


def test_a_target_has_room_for_the_longest_sequence_that_is_served_and_its_tree() -> None:
    capacities = target_capacities(*stand_ins(max_context=131072, num_pages=8192, page_size=16), 32768)
    assert {(c.max_pages, c.max_keys) for c in capacities} == {(2064, 32768 + 256)}


def test_a_drafter_adds_few_rows_to_large_trees() -> None:
    capacities = draft_capacities(*stand_ins(max_context=1000, num_pages=80, page_size=16))
    grown = SequenceRows(list(range(63)), 700, chain(206), 200, [1] * 6)
    assert capacities[0].holds(batch_of([grown], 16, CPU))
    prompt_chunk = SequenceRows(list(range(63)), 0, chain(65), 0, [1] * 65)
    assert not any(capacity.holds(batch_of([prompt_chunk], 16, CPU)) for capacity in capacities)


def test_graphs_share_one_pool_and_the_largest_is_captured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda(replay_ms=[1.0])
    cuda.install(monkeypatch)
    captured = []

    def forward(batch: ForwardBatch, cache: Any, taps: Any) -> Hidden:
        captured.append(batch.tokens.shape[0])
        return Hidden(torch.full((batch.tokens.shape[0], 2), float(batch.tokens.shape[0])), {})

    model: Any = SimpleNamespace(device=CPU, forward=forward, weights=None, kernels=None)
    monkeypatch.setattr(cuda_graphs, "Transformer", lambda *_: model)
    cache: Any = SimpleNamespace(page_size=4)
    capacities = [GraphCapacity(rows, 2, 8, 1, 32) for rows in (16, 8, 64)]
    graphed = GraphedForward(model, cache, capacities)
    graphed.rehearse()
    captured.clear()
    graphed.capture()
    assert captured == [64, 16, 8]
    assert cuda.pools == ["pool 1"] * 3
    nine = batch_of([SequenceRows([0, 1, 2], 0, chain(9), 0, [1] * 9)], 4, CPU)
    assert torch.equal(graphed(nine).last, torch.full((9, 2), 16.0))  # the smallest that holds it


def stand_ins(max_context: int, num_pages: int, page_size: int) -> tuple[Any, Any]:
    """A model and a cache, as far as capacities look at them."""
    model = SimpleNamespace(config=SimpleNamespace(max_context=max_context))
    return model, SimpleNamespace(num_pages=num_pages, page_size=page_size)


def test_on_a_cpu_the_forward_runs_without_graphs() -> None:
    class Model:
        device = CPU
        kernels = REFERENCES
        communicator = SoloCommunicator()

        def forward(self, batch: str, cache: str, taps: tuple[int, ...]) -> tuple[str, str, tuple[int, ...]]:
            return batch, cache, taps

    model: Any = Model()
    cache: Any = "cache"
    batch: Any = SimpleNamespace(along_with=lambda others, device: ("batch", []))
    assert not can_be_captured(model)
    assert forward_of(model, cache, [CAPACITY], [3])(batch) == ("batch", "cache", (3,))  # type: ignore[comparison-overlap]


ON_HOST: Any = SimpleNamespace(along_with=lambda others, device: ("on the device", []))


class ScriptedGraphs:
    """A `GraphedForward` in which one step of one rank fails; sums over ranks are real."""

    fails: tuple[str, int] = ("nothing", 0)

    def __init__(self, model: Any, *others: Any) -> None:
        self.communicator: Communicator = model.communicator
        self.warmed_up = False

    def __call__(self, batch: str) -> str:
        return "replayed"

    def rehearse(self) -> None:
        self._fail_if_scripted("rehearse")

    def warm_up(self) -> None:
        self._fail_if_scripted("warm_up")
        assert self.communicator.all_reduce(torch.ones(1)).item() == self.communicator.size
        self.warmed_up = True

    def capture(self) -> None:
        assert self.warmed_up
        self._fail_if_scripted("capture")

    def _fail_if_scripted(self, step: str) -> None:
        if self.fails == (step, self.communicator.rank):
            raise RuntimeError(f"{step} went wrong")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (("nothing", 0), "replayed"),
        (("selection", 2), "eager"),
        (("rehearse", 1), "eager"),
        (("capture", 0), "eager"),
        (("capture", 2), "eager"),
    ],
)
@pytest.mark.filterwarnings("ignore:the forward runs without CUDA graphs")
def test_all_ranks_replay_or_none(
    fails: tuple[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "GraphedForward", ScriptedGraphs)
    monkeypatch.setattr(ScriptedGraphs, "fails", fails)
    monkeypatch.setattr(
        cuda_graphs, "can_be_captured", lambda model: fails != ("selection", model.communicator.rank)
    )

    def work(communicator: ThreadCommunicator) -> Any:
        forward = forward_of(*on_gpu(communicator), [CAPACITY])
        assert communicator.all_reduce(torch.ones(1)).item() == 3  # all are where they were
        return forward(ON_HOST)

    assert run_ranks(3, work) == [expected] * 3


def test_a_replay_gives_the_rows_of_the_batch_and_the_taps_of_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With graphs that record nothing: what a replay returns is what the capture returned, cut to the batch."""
    asked = []

    def forward(batch: ForwardBatch, cache: object, taps: tuple[int, ...]) -> Hidden:
        asked.append(taps)
        rows = torch.arange(2.0 * len(batch.tokens)).view(-1, 2)
        return Hidden(rows, {layer: rows + layer for layer in taps})

    replays: list[None] = []
    graph = SimpleNamespace(replay=lambda: replays.append(None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(cuda_graphs, "Transformer", lambda weights, solo, kernels: model)
    model: Any = SimpleNamespace(device=CPU, forward=forward, weights=None, kernels=REFERENCES)
    cache: Any = SimpleNamespace(page_size=4)
    graphed = GraphedForward(model, cache, [CAPACITY], taps=(5, 1))
    graphed.rehearse()
    graphed.capture()
    assert asked == [(5, 1)] * 2
    hidden = graphed(batch_of([SequenceRows([0, 1], 0, chain(3), 0, [7] * 3)], 4, CPU))
    assert len(replays) == 1
    assert hidden.last.shape == (3, 2)
    assert {layer: rows.tolist() for layer, rows in hidden.taps.items()} == {
        layer: (hidden.last + layer).tolist() for layer in (5, 1)
    }
    large = graphed(batch_of([SequenceRows(list(range(5)), 0, chain(17), 0, [7] * 17)], 4, CPU))
    assert (len(large.last), len(replays), asked[-1]) == (17, 1, (5, 1))


def test_a_rank_that_cannot_capture_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "GraphedForward", ScriptedGraphs)
    monkeypatch.setattr(cuda_graphs, "can_be_captured", lambda model: True)
    for step in ("rehearse", "capture"):
        monkeypatch.setattr(ScriptedGraphs, "fails", (step, 0))
        with pytest.warns(UserWarning, match=f"runs without CUDA graphs: {step} went wrong"):
            forward_of(*on_gpu(SoloCommunicator()), [CAPACITY])


def test_a_sum_over_ranks_that_fails_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "GraphedForward", ScriptedGraphs)
    monkeypatch.setattr(cuda_graphs, "can_be_captured", lambda model: True)
    monkeypatch.setattr(ScriptedGraphs, "fails", ("warm_up", 1))
    with pytest.raises(RuntimeError, match="warm_up went wrong"):
        run_ranks(2, lambda communicator: forward_of(*on_gpu(communicator), [CAPACITY]))


def test_where_no_rank_can_capture_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "can_be_captured", lambda model: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward: Any = forward_of(*on_gpu(SoloCommunicator()), [CAPACITY])
    assert forward(ON_HOST) == "eager"


def on_gpu(communicator: Communicator) -> tuple[Any, Any]:
    """A model that says it is on a GPU, and its cache."""
    device = torch.device("cuda")
    model = SimpleNamespace(
        device=device, communicator=communicator, forward=lambda batch, cache, taps: "eager"
    )
    return model, "cache"
