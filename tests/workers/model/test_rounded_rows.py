"""Products of FP8 numbers on the kernel that rounds their rows, which the source executor runs on a pretended GPU.

Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.first_gpu.narrow import LAYOUTS, NarrowSource
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.linear import Linear, ProductKernels
from outrider.workers.model.loader import load_weights
from outrider.workers.model.quantized import (
    NarrowLinear,
    RoundedLinear,
    ScaledMmLinear,
    make_scaled_linear,
    scaled_mm_works,
)
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.inputs import DynamicInputs, Inputs, StaticInputs
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.scaled import FP8, ScaledMatrix, round_inputs
from support.counted_gpu import CountedGpu, counted_gpu
from support.rows import SequenceRows, batch_of, chain

ROUNDING = KernelSelection.of(["round_rows"])
INPUTS = (DynamicInputs(), DynamicInputs(bound=1.0, least_scale=1e-3), StaticInputs(0.01))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedGpu]:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    scaled_mm_works.cache_clear()
    with counted_gpu(monkeypatch) as counted:
        yield counted
    scaled_mm_works.cache_clear()


def matrix_of(inputs: Inputs, group: int = 256) -> ScaledMatrix:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(48, 256, generator=generator).mul(100).to(FP8)
    scales = torch.rand(48, 256 // group, generator=generator) / 1000 + 1e-4
    return ScaledMatrix(values, scales, group, inputs=inputs)


def product(gpu: CountedGpu, linear: Linear, num_rows: int) -> tuple[torch.Tensor, int]:
    """Of random rows, and the launches that it took."""
    x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(gpu.device)
    with gpu.counted() as counts:
        out = linear(x)
    assert counts.waits == 0
    return out.cpu(), counts.launches


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_a_product_is_two_launches_and_the_same_bits(gpu: CountedGpu, inputs: Inputs) -> None:
    matrix, no_bias = matrix_of(inputs).to(gpu.device), torch.empty(0, device=gpu.device)
    kernels = ProductKernels()
    linear = make_scaled_linear(matrix, no_bias, torch.bfloat16, False, kernels)
    assert isinstance(linear, NarrowLinear)  # which has its own kernel not in use here
    assert isinstance(linear.inner, ScaledMmLinear)
    want, num_before = product(gpu, linear, 5)
    kernels.selection = ROUNDING
    got, num_launches = product(gpu, linear, 5)
    assert torch.equal(got, want)
    assert num_launches == 2 < num_before


@pytest.mark.parametrize("num_rows", [1, 4, 7])
def test_rows_in_groups_come_as_torch_s_product_takes_them(gpu: CountedGpu, num_rows: int) -> None:
    x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs, padded = DynamicInputs(by_group=True), -(-num_rows // 4) * 4
    with gpu.counted() as counts:
        values, scales = round_inputs(x.to(gpu.device), inputs, 128, by_column=True, use_kernel=True)
    assert counts.launches == 1
    assert (values.shape, scales.shape, scales.stride()) == ((padded, 256), (padded, 2), (1, padded))
    want, want_scales = round_inputs(x, inputs, 128)
    assert torch.equal(values.cpu()[:num_rows].view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales.cpu()[:num_rows], want_scales)
    assert not values.cpu()[num_rows:].float().any()


def test_groups_are_laid_out_as_torch_wants_them_on_hopper() -> None:
    meta = torch.device("meta")  # where torch checks shapes and strides, and multiplies nothing
    matrix = matrix_of(DynamicInputs(by_group=True), 128).to(meta)
    linear = ScaledMmLinear(matrix, torch.empty(0), torch.bfloat16, ProductKernels(ROUNDING))
    assert linear(torch.empty(7, 256, dtype=torch.bfloat16, device=meta)).shape == (7, 48)


def test_rows_that_are_rounded_and_not_multiplied_as_such(gpu: CountedGpu) -> None:
    """The pretended GPU, like most, has no products by group."""
    matrix = matrix_of(DynamicInputs(by_group=True), 128).to(gpu.device)
    kernels, no_bias = ProductKernels(), torch.empty(0, device=gpu.device)
    with pytest.warns(UserWarning, match="FP8 is not multiplied"):
        linear = make_scaled_linear(matrix, no_bias, torch.bfloat16, False, kernels)
    assert isinstance(linear, NarrowLinear)
    assert isinstance(linear.inner, RoundedLinear)
    want, num_before = product(gpu, linear, 5)
    kernels.selection = ROUNDING
    got, num_launches = product(gpu, linear, 5)
    assert torch.equal(got, want)
    assert num_launches < num_before


def test_a_model_s_products_run_the_kernels_that_it_was_given(gpu: CountedGpu) -> None:
    """Whatever others were agreed upon before, for the same weights."""
    layout = next(layout for layout in LAYOUTS if layout.name.startswith("FP8 by row"))
    model = "random:llama?hidden_size=64&intermediate_size=64&num_layers=1&num_heads=4&vocab_size=96"
    source = NarrowSource(RandomSource(model), layout)
    plan = ShardPlan(source.config, 0, 1)
    weights = load_weights(plan, source, torch.bfloat16, gpu.device, packed=False)
    rows = SequenceRows(list(range(8)), 0, chain(40), 0, list(range(40)))

    def logits(kernels: KernelSelection) -> tuple[torch.Tensor, int]:
        model = Transformer(weights, SoloCommunicator(), kernels)
        cache = PagedCache(source.config, plan, 8, 8, torch.bfloat16, gpu.device)
        batch = batch_of([rows], 8, gpu.device)
        with gpu.counted() as counts:
            last = model.forward(batch, cache).last
        return last.cpu(), counts.launches

    want, num_before = logits(REFERENCES)
    got, num_launches = logits(ROUNDING)
    assert torch.equal(got, want)
    assert num_launches <= num_before - 4 * 5  # four products, each of which took half a dozen launches more
    assert logits(REFERENCES)[1] == num_before
