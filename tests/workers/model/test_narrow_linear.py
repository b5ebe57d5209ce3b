"""Matrices of 8-bit numbers on a GPU that has our kernel for few rows: which it multiplies, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from outrider.kernels.launch_plans import LaunchPlan
from outrider.kernels.narrow_matmul import MAX_ROWS
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.first_gpu.narrow import LAYOUTS, NarrowSource
from outrider.workers.first_gpu.small_model import build_of, logits_of
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.linear import ProductKernels
from outrider.workers.model.quantized import NarrowLinear, ScaledMmLinear, make_scaled_linear, scaled_mm_works
from outrider.workers.weights.inputs import DynamicInputs, Inputs, StaticInputs
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.scaled import FP8, ScaledMatrix
from support.counted_gpu import CountedGpu, counted_gpu

IN_USE = ProductKernels(KernelSelection.of(["narrow_matmul"]))


class Launched:
    """Kernels in the order of their launches."""

    def __init__(self, gpu: CountedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        launch = gpu.launch

        def recorded(plans: Sequence[LaunchPlan]) -> None:
            self.kernels += [plan.kernel for plan in plans]
            launch(plans)

        monkeypatch.setattr(gpu, "launch", recorded)

    def take(self) -> list[str]:
        taken, self.kernels = self.kernels, []
        return [kernel for kernel in taken if "narrow_matmul" in kernel or "column_splits" in kernel]


def stored(dtype: torch.dtype, group: int, inputs: Inputs | None) -> ScaledMatrix:
    """[48, 272], with `group` 0 a scale for each row."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(48, 272, generator=generator).mul(30).clamp(-127, 127).to(dtype)
    group = group or 272
    scales = torch.rand(48, -(-272 // group), generator=generator) / 100 + 1e-3
    return ScaledMatrix(values, scales, group, inputs=inputs)


@pytest.mark.filterwarnings("ignore:FP8 is not multiplied on cuda")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("matrix", "types"),
    [
        (stored(FP8, 0, DynamicInputs()), "fp8_fp8"),
        (stored(FP8, 0, StaticInputs(0.01)), "fp8_fp8"),
        (stored(FP8, 128, DynamicInputs(by_group=True)), "fp8_fp8"),
        (stored(FP8, 0, None), "bf16_fp8"),
        (stored(FP8, 128, None), "bf16_fp8"),
        (stored(torch.int8, 0, None), "bf16_int8"),
        (stored(torch.int8, 128, None), "bf16_int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.group}, {value.inputs}",
)
def test_few_rows_are_multiplied_by_the_kernel_and_many_as_without_it(
    matrix: ScaledMatrix, types: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(48 if has_bias else 0, generator=generator).bfloat16()
    x = torch.randn(6 * MAX_ROWS + 1, 272, generator=generator).bfloat16()
    exact = make_scaled_linear(matrix, bias.float(), torch.float32, packed=False)(x.float())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    scaled_mm_works.cache_clear()
    with counted_gpu(monkeypatch) as gpu:
        launched = Launched(gpu, monkeypatch)
        there = (matrix.to(gpu.device), bias.to(gpu.device), torch.bfloat16, False)
        linear = make_scaled_linear(*there, IN_USE)
        assert isinstance(linear, NarrowLinear)
        assert (linear.out_features, linear.in_features, linear.pads) == (48, 272, False)
        # Torch's products by group are not there on a pretended GPU: what is dequantised is slower than the kernel.
        assert linear.most_rows == (MAX_ROWS if isinstance(linear.inner, ScaledMmLinear) else 6 * MAX_ROWS)
        for num_rows, tiles in ((1, [8]), (9, [16]), (33, [40]), (MAX_ROWS, [64]), (MAX_ROWS + 1, [64, 8])):
            if num_rows > linear.most_rows:
                continue
            got = linear(x[:num_rows].to(gpu.device)).cpu().float()
            products = [name for name in launched.take() if name.startswith("narrow_matmul")]
            assert products == [f"narrow_matmul_{types}_rows{tile}" for tile in tiles]
            want = exact[:num_rows]
            assert (got - want).norm() < 3e-3 * want.norm()  # rounded once to bfloat16
        many = x[: linear.most_rows + 1].to(gpu.device)
        assert torch.equal(linear(many).cpu(), make_scaled_linear(*there)(many).cpu())
        assert torch.equal(
            make_scaled_linear(*there, ProductKernels())(x[:8].to(gpu.device)).cpu(),
            make_scaled_linear(*there)(x[:8].to(gpu.device)).cpu(),
        )
        assert launched.take() == []
    scaled_mm_works.cache_clear()


def test_what_the_kernel_does_not_take_is_kept_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row, in_groups = stored(torch.int8, 0, None), stored(FP8, 128, None)
    refused = {
        "int8 with rows in FP8": replace(row, inputs=DynamicInputs()),
        "shifts": replace(row, shifts=row.scales),
        "columns": ScaledMatrix(row.values[:, :264].contiguous(), row.scales, 264),
        "groups": in_groups.in_groups_of(32),
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with counted_gpu(monkeypatch) as gpu:
        for name, matrix in refused.items():
            assert not NarrowLinear.takes(matrix.to(gpu.device), torch.bfloat16), name
        assert NarrowLinear.takes(row.to(gpu.device), torch.bfloat16)
        assert not NarrowLinear.takes(row.to(gpu.device), torch.float16)
        nothing = torch.empty(0, device=gpu.device)
        linear = make_scaled_linear(row.to(gpu.device), nothing, torch.float16, False, IN_USE)
        assert not isinstance(linear, NarrowLinear)
    assert not NarrowLinear.takes(row, torch.bfloat16)  # on a CPU


@pytest.mark.filterwarnings("ignore:FP8 is not multiplied on cuda")
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=lambda layout: layout.name)
def test_a_model_multiplies_by_the_kernel_where_it_was_selected(
    layout, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    spec = "random:llama?hidden_size=64&num_layers=2&num_heads=2&num_kv_heads=1&head_dim=64&vocab_size=96"
    source, solo = NarrowSource(RandomSource(spec), layout), SoloCommunicator()
    exact = logits_of(*build_of(source, torch.device("cpu"), torch.float32, REFERENCES, solo))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    scaled_mm_works.cache_clear()
    with counted_gpu(monkeypatch) as gpu:
        launched = Launched(gpu, monkeypatch)
        for kernels in (REFERENCES, KernelSelection.of(["narrow_matmul"]), KernelSelection.of(ENTRIES)):
            model, cache = build_of(source, gpu.device, torch.bfloat16, kernels, solo)
            assert model.weights.product_kernels.selection == kernels
            launched.take()
            logits = logits_of(model, cache)
            products = [kernel for kernel in launched.take() if "narrow_matmul" in kernel]
            # Three forwards of two layers, each of four products; a prompt of 40 tokens, a tree of 9, a token.
            tiles = [int(kernel.rsplit("rows", 1)[1]) for kernel in products]
            assert tiles == ([40] * 8 + [16] * 8 + [8] * 8 if kernels.narrow_matmul else [])
            assert (logits - exact).norm() < 0.2 * exact.norm()
    scaled_mm_works.cache_clear()
