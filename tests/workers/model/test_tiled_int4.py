"""Matrices of 4 bits on a GPU: by our kernel where it is in use, else by torch's product or dequantised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from outrider.kernels.int4_matmul import dequantised_tiles, packed_in_tiles
from outrider.kernels.narrow_matmul import MAX_ROWS
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.first_gpu.narrow import LAYOUTS, NarrowSource
from outrider.workers.first_gpu.small_model import build_of, logits_of
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model import tiled_int4
from outrider.workers.model.linear import ProductKernels
from outrider.workers.model.quantized import DequantisingLinear, make_scaled_linear
from outrider.workers.model.tiled_int4 import TiledInt4Linear, tinygemm_works
from outrider.workers.weights.integers import IntegerFormat, in_four_bits
from outrider.workers.weights.packed_format import PackedFormat
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.scaled import ScaledMatrix
from support.counted_gpu import CountedGpu, counted_gpu

IN_USE = ProductKernels(KernelSelection.of(["int4_matmul"]))
ROWS, COLUMNS = 44, 384
pytestmark = pytest.mark.filterwarnings("ignore:torch does not multiply int4")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def stored(group: int, zeros: str) -> ScaledMatrix:
    """[44, 384] with zero points in the middle, at whole steps or anywhere."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    scales = torch.rand(ROWS, COLUMNS // group, generator=generator) / 100 + 1e-3
    steps = {
        "middle": torch.full(scales.shape, 8.0),
        "whole": torch.randint(0, 16, scales.shape, generator=generator).float(),
        "anywhere": 16 * torch.rand(scales.shape, generator=generator),
    }
    return ScaledMatrix(values, scales, group, -steps[zeros] * scales)


def with_rounded_scales(matrix: ScaledMatrix) -> ScaledMatrix:
    """As it is kept: scales, and the values of an 8, in bfloat16."""
    assert matrix.shifts is not None
    scales, centres = (part.bfloat16().float() for part in (matrix.scales, matrix.shifts + 8 * matrix.scales))
    return replace(matrix, scales=scales, shifts=centres - 8 * scales)


class Launched:
    """Kernels of the product in the order of their launches."""

    def __init__(self, gpu: CountedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        launch = gpu.launch

        def recorded(plans):  # type: ignore[no-untyped-def]
            self.kernels += [plan.kernel for plan in plans if plan.source == "int4_matmul"]
            launch(plans)

        monkeypatch.setattr(gpu, "launch", recorded)

    def tiles(self) -> list[int]:
        taken, self.kernels = self.kernels, []
        return [int(kernel.removeprefix("int4_matmul_rows")) for kernel in taken]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "matrix",
    [
        stored(32, "middle"),  # Q4_0
        stored(128, "middle"),  # compressed-tensors, symmetric
        stored(128, "whole"),  # GPTQ, AWQ
        stored(32, "anywhere"),  # Q4_1, Q4_K
        stored(384, "whole"),  # multiplied as groups of 128
        stored(64, "anywhere"),
    ],
    ids=lambda matrix: f"{matrix.group}",
)
def test_rows_are_multiplied_by_the_kernel_where_it_is_in_use(
    matrix: ScaledMatrix, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(ROWS if has_bias else 0, generator=generator).bfloat16()
    x = torch.randn(6 * MAX_ROWS + 1, COLUMNS, generator=generator).bfloat16()
    unrounded = make_scaled_linear(matrix, bias.float(), torch.float32, packed=False)(x.float())
    weight = with_rounded_scales(matrix).dequantised(torch.bfloat16).float()
    exact = x.float() @ weight.T + (bias.float() if has_bias else 0)
    assert (exact - unrounded).norm() < 4e-3 * unrounded.norm()
    tinygemm_works.cache_clear()
    with counted_gpu(monkeypatch) as gpu:
        launched = Launched(gpu, monkeypatch)
        there = (matrix.to(gpu.device), bias.to(gpu.device), torch.bfloat16, False)
        linear, without = make_scaled_linear(*there, IN_USE), make_scaled_linear(*there, ProductKernels())
        assert isinstance(linear, TiledInt4Linear)
        assert (linear.out_features, linear.in_features, linear.pads) == (ROWS, COLUMNS, False)
        assert linear.most_rows == 6 * MAX_ROWS
        for num_rows, tiles in (
            (1, [8]),
            (8, [8]),
            (9, [16]),
            (33, [40]),
            (MAX_ROWS, [64]),
            (MAX_ROWS + 1, [64, 8]),
            (256, [64] * 4),
            (len(x), []),
        ):
            got = linear(x[:num_rows].to(gpu.device)).cpu().float()
            assert launched.tiles() == tiles
            # The product is rounded to bfloat16.
            assert (got - exact[:num_rows]).norm() < 3e-3 * exact[:num_rows].norm()
            plain = without(x[:num_rows].to(gpu.device)).cpu().float()
            assert (plain - got).norm() < 4e-3 * got.norm()  # the same matrix; each sum is rounded once
        assert launched.tiles() == []
    tinygemm_works.cache_clear()


def test_torchs_product_takes_rows_while_the_kernel_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, calls = stored(128, "whole"), []

    def multiplied(x: Tensor, packed: Tensor, of_groups: Tensor, group: int) -> Tensor:
        calls.append(len(x))
        return x @ dequantised_tiles(packed, of_groups, group).T

    monkeypatch.setattr(tiled_int4, "_by_tinygemm", multiplied)
    tinygemm_works.cache_clear()
    with counted_gpu(monkeypatch) as gpu:
        kernels = ProductKernels()
        bias = torch.ones(ROWS).bfloat16().to(gpu.device)
        linear = make_scaled_linear(matrix.to(gpu.device), bias, torch.bfloat16, False, kernels)
        assert isinstance(linear, TiledInt4Linear)
        x = torch.randn(MAX_ROWS + 1, COLUMNS).bfloat16()
        calls.clear()
        exact = x.float() @ matrix.dequantised(torch.float32).T + 1
        for num_rows in (1, MAX_ROWS, MAX_ROWS + 1):
            got = linear(x[:num_rows].to(gpu.device)).cpu().float()
            assert (got - exact[:num_rows]).norm() < 5e-3 * exact.norm()
        assert calls == [1, MAX_ROWS]
        kernels.selection = IN_USE.selection
        linear(x[:1].to(gpu.device))
        assert calls == [1, MAX_ROWS]
    tinygemm_works.cache_clear()


def test_a_product_of_torchs_that_reads_another_layout_is_told_of_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def multiplied(x: Tensor, packed: Tensor, of_groups: Tensor, group: int) -> Tensor:
        return x @ dequantised_tiles(packed.flip(3), of_groups, group).T

    monkeypatch.setattr(tiled_int4, "_by_tinygemm", multiplied)
    tinygemm_works.cache_clear()
    with pytest.warns(UserWarning, match="does not multiply int4 on cpu: its products are wrong"):
        assert not tinygemm_works(torch.device("cpu"))
    tinygemm_works.cache_clear()


@pytest.mark.parametrize(
    ("matrix", "form"),
    [
        (in_four_bits(torch.randn(ROWS, COLUMNS)), IntegerFormat(4)),
        (stored(128, "whole"), PackedFormat("gptq", 4, 128, True)),
        (stored(128, "middle"), PackedFormat("packed", 4, 128, False)),
    ],
)
def test_a_matrix_is_kept_once_in_the_bytes_that_are_planned(
    matrix: ScaledMatrix, form: IntegerFormat | PackedFormat
) -> None:
    linear = TiledInt4Linear(matrix, torch.empty(0), IN_USE)
    padded = -(-ROWS // 8) * 8
    kept = [value for value in vars(linear).values() if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in kept) == form.loaded_bytes(padded, COLUMNS)
    assert torch.equal(linear._packed, packed_in_tiles(matrix.values))


def test_what_has_no_tiles_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = in_four_bits(torch.randn(8, 192))
    with counted_gpu(monkeypatch) as gpu:
        nothing = torch.empty(0, device=gpu.device)
        for dtype, given in ((torch.bfloat16, matrix), (torch.float16, stored(128, "middle"))):
            linear = make_scaled_linear(given.to(gpu.device), nothing, dtype, False, IN_USE)
            assert isinstance(linear, DequantisingLinear)


@pytest.mark.parametrize("layout", LAYOUTS[-2:], ids=lambda layout: layout.name)
def test_a_model_multiplies_4_bits_by_the_kernel_where_it_was_selected(
    layout, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    spec = "random:llama?hidden_size=128&intermediate_size=256&num_layers=2&num_heads=2&num_kv_heads=1&head_dim=64"
    source, solo = NarrowSource(RandomSource(spec), layout), SoloCommunicator()
    exact = logits_of(*build_of(source, torch.device("cpu"), torch.float32, REFERENCES, solo))
    tinygemm_works.cache_clear()
    with counted_gpu(monkeypatch) as gpu:
        launched = Launched(gpu, monkeypatch)
        for kernels in (REFERENCES, KernelSelection.of(["int4_matmul"]), KernelSelection.of(ENTRIES)):
            model, cache = build_of(source, gpu.device, torch.bfloat16, kernels, solo)
            launched.tiles()
            logits = logits_of(model, cache)
            # Three forwards of two layers, each of four products; a prompt of 40 tokens, a tree of 9, a token.
            tiles = launched.tiles()
            assert tiles == ([40] * 8 + [16] * 8 + [8] * 8 if kernels.int4_matmul else [])
            assert (logits - exact).norm() < 0.2 * exact.norm()
    tinygemm_works.cache_clear()
