"""Batches padded to a graph's capacity: what the kernels make of them on the CPU executors. No graph is captured."""

from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.kernels.attention_cases import (
    AttentionCase,
    attention_in_float64,
    build_attention_inputs,
)
from outrider.kernels.launch_plans import attention_shape, plan_rope_append, plan_tree_attention
from outrider.kernels.selection import REFERENCES
from outrider.workers.communicator import SoloCommunicator
from outrider.workers.model.batch import ForwardBatch, SequenceRows, build_batch, chain
from outrider.workers.model.cuda_graphs import (
    GraphCapacity,
    StaticBatch,
    can_be_captured,
    capacities_for,
    forward_of,
)
from support.cuda_on_cpu.executor import SCHEDULES
from support.cuda_on_cpu.kernels import source_kernels

CPU = torch.device("cpu")
CASE = AttentionCase("graph", (40, 9), (5, 3), page_size=4)
CAPACITY = GraphCapacity(num_rows=16, num_sequences=4, max_pages=20, mask_words=2, max_keys=1024)


def filled(case: AttentionCase) -> tuple[StaticBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A static batch that held another batch before, and the queries (padded) and pages."""
    inputs = build_attention_inputs(case)
    num_rows = inputs.q.shape[0]
    static = StaticBatch(CAPACITY, case.page_size, CPU)
    before = [SequenceRows(list(range(8)), 3, chain(4), 0, [1] * 4) for _ in range(4)]
    static.fill(build_batch(before, case.page_size, CPU))
    rows = torch.arange(num_rows)
    static.fill(ForwardBatch(rows + 100, rows + 200, rows + 300, inputs.batch))
    q = torch.full((CAPACITY.num_rows, *inputs.q.shape[1:]), float("nan")).to(inputs.q.dtype)
    q[:num_rows] = inputs.q
    return static, q, inputs.k_pages, inputs.v_pages


def test_padding_writes_and_attends_to_nothing() -> None:
    static, *_ = filled(CASE)
    batch = static.batch
    assert batch.tokens.tolist() == [*range(100, 108)] + [0] * 8
    assert batch.slots.tolist() == [*range(300, 308)] + [-1] * 8
    assert batch.tree.query_indptr.tolist() == [0, 5, 8, 8, 8]
    assert batch.tree.context_lens.tolist() == [40, 9, 0, 0]
    assert batch.tree.ancestors[8:].count_nonzero() == 0


@pytest.mark.parametrize("num_sms", [1, 132])
def test_attention_of_a_padded_batch_is_that_of_the_batch(num_sms: int) -> None:
    static, q, k_pages, v_pages = filled(CASE)
    tree = static.batch.tree
    shape = attention_shape(
        max(tree.host_query_lens), CAPACITY.max_keys, CAPACITY.num_sequences, 8, 2, num_sms
    )
    assert (shape.num_splits > 1) == (num_sms > 1)
    out = torch.full(q.shape, float("nan")).to(q.dtype)
    partial = torch.full((shape.num_splits, *q.shape), float("nan"))
    plans = plan_tree_attention(
        q, k_pages, v_pages, tree, CASE.scale, 0, 0.0, shape, out, partial, partial[..., 0].contiguous()
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
    plan = plan_rope_append(q, k, v, angles, angles, slots, pages, pages.clone(), torch.empty_like(q))
    source_kernels().launch([plan])
    assert pages.view(4, 64).abs().sum(dim=1).nonzero().tolist() == [[2]]


def test_a_capacity_holds_what_fits() -> None:
    batch = build_batch([SequenceRows(list(range(5)), 10, chain(6), 0, [1] * 6)], 4, CPU)
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
    capacities = capacities_for(num_sequences=16, max_context=1000, page_size=16)
    assert [c.num_rows for c in capacities] == [8, 16, 32, 64, 128, 256]
    assert [c.mask_words for c in capacities] == [1, 1, 1, 1, 2, 4]
    assert {c.max_pages for c in capacities} == {63}
    assert [c.num_sequences for c in capacities] == [8, 16, 16, 16, 16, 16]


def test_on_a_cpu_the_forward_runs_without_graphs() -> None:
    class Model:
        device = CPU
        kernels = REFERENCES
        communicator = SoloCommunicator()

        def forward(self, batch: str, cache: str) -> tuple[str, str]:
            return batch, cache

    model: Any = Model()
    cache: Any = "cache"
    batch: Any = "batch"
    assert not can_be_captured(model)
    assert forward_of(model, cache)(batch) == ("batch", "cache")  # type: ignore[comparison-overlap]
