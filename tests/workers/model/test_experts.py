"""Experts of a layer: two ways to compute them, and how the released model's are shared out."""

from collections import Counter
from math import prod

import pytest
import torch
import torch.nn.functional as F

from outrider.workers.model.linear import make_linear
from outrider.workers.model.loader import load_weights
from outrider.workers.model.mlp import (
    ExpertLoop,
    GatedMlp,
    GroupedExperts,
    aligned_columns,
)
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.routing import route
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.tensors import tensor_shapes
from support.released_mellum import MELLUM_2
from support.tensor_source import TensorSource

NO_BIAS = torch.empty(0)
HIDDEN = 24


def random_experts(count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2 I, hidden] and down [E, hidden, I]."""
    generator = torch.Generator().manual_seed(4)
    gate_up = torch.randn(count, 2 * columns, HIDDEN, generator=generator) / HIDDEN**0.5
    return gate_up, torch.randn(count, HIDDEN, columns, generator=generator) / columns**0.5


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize("here", [range(7), range(3, 7), range(2), range(6, 7)], ids=str)
def test_the_loop_and_the_grouped_products_give_the_sum_over_a_rows_experts(
    num_rows: int, here: range
) -> None:
    gate_up, down = random_experts(7, 16)
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, HIDDEN, generator=generator)
    routes = route(rows, torch.randn(7, HIDDEN, generator=generator), 3, renormalised=True)
    want = torch.zeros_like(rows)
    for row, (experts, weights) in enumerate(zip(routes.experts.tolist(), routes.weights, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert in here:
                gate, up = (gate_up[expert] @ rows[row]).chunk(2)
                want[row] += weight * (down[expert] @ (F.silu(gate) * up))
    part = slice(here.start, here.stop)
    loop = ExpertLoop(
        here.start,
        [
            GatedMlp(make_linear(a, NO_BIAS, packed=True), make_linear(b, NO_BIAS, packed=True))
            for a, b in zip(gate_up[part], down[part], strict=True)
        ],
    )
    grouped = GroupedExperts(here.start, gate_up[part], down[part])
    torch.testing.assert_close(loop(rows, routes), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grouped(rows, routes), want, atol=1e-5, rtol=1e-5)


def test_routes_are_chosen_in_float32_and_may_be_renormalised() -> None:
    # In bfloat16 the second and third expert would be equally likely.
    router = torch.tensor([[5.0], [1.0], [1.001], [-2.0]])
    rows = torch.tensor([[1.0]], dtype=torch.bfloat16)
    probs = (router[:, 0]).softmax(0)
    routes = route(rows, router, 2, renormalised=True)
    assert routes.experts.tolist() == [[0, 2]]
    torch.testing.assert_close(routes.weights[0], probs[[0, 2]] / probs[[0, 2]].sum())
    torch.testing.assert_close(route(rows, router, 2, renormalised=False).weights[0], probs[[0, 2]])


def test_only_experts_that_rows_visit_are_computed() -> None:
    visited: list[tuple[int, int]] = []

    def expert(number: int):  # type: ignore[no-untyped-def]
        return lambda rows: visited.append((number, len(rows))) or rows

    router = torch.eye(4)[:, :2]
    rows = torch.tensor([[9.0, 0.0], [0.0, 9.0], [8.0, 0.0]])
    ExpertLoop(0, [expert(i) for i in range(4)])(rows, route(rows, router, 1, renormalised=True))
    assert visited == [(0, 2), (1, 1)]


def test_columns_are_added_so_that_rows_of_matrices_are_aligned() -> None:
    assert [aligned_columns(count) for count in (1, 8, 9, 896, 298)] == [8, 8, 16, 896, 304]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_tensor_of_the_released_12b_is_planned_and_shared_out(size: int) -> None:
    config = model_config_from_hf(MELLUM_2)
    shapes = tensor_shapes(config)
    assert len(shapes) == 28 * (64 * 3 + 9) + 3 == 5631
    meta = torch.device("meta")
    source = TensorSource(config, {name: torch.empty(shape, device=meta) for name, shape in shapes.items()})
    rank_bytes = []
    for rank in range(size):
        reported: list[int] = []
        weights = load_weights(
            ShardPlan(config, rank, size), source, torch.bfloat16, meta, False, reported.append
        )
        assert len(weights.layers) == 28
        rank_bytes.append(sum(reported))
    read = Counter[str]()
    for name, numel in source.reads:
        read[name] += numel
    assert read.keys() == shapes.keys()
    for name, shape in shapes.items():
        copies = read[name] / prod(shape)
        if "experts" in name or name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert copies == 1, name
        elif "k_proj" in name or "v_proj" in name:  # two ranks may need the same KV head
            assert 1 <= copies <= 2, name
        else:
            assert copies == (1 if "q_proj" in name or "o_proj" in name else size), name
    # 24.3 GB in bfloat16, evenly.
    assert sum(rank_bytes) == pytest.approx(24.3e9, rel=0.02)
    assert max(rank_bytes) < 1.08 * sum(rank_bytes) / size
    page = bytes_per_page(ShardPlan(config, 0, size), 2, 16)
    assert page == 28 * 2 * 16 * len(ShardPlan(config, 0, size).kv_heads) * 128 * 2
