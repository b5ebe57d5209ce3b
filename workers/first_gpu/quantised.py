"""Part 11: matrices of narrow numbers and a KV cache in FP8, against the CPU; what each takes beside bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from outrider.kernels.selection import REFERENCES
from outrider.workers.first_gpu.large_model import layer_shapes, median_product_s
from outrider.workers.first_gpu.narrow import LAYOUTS, Layout, NarrowSource, RememberedSource
from outrider.workers.first_gpu.report import Row, not_run, passed_or_failed
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.small_model import (
    ALL_KERNELS,
    BFLOAT16_FACTOR,
    CPU,
    GRAPH_LIMIT,
    build_of,
    graphs_against_eager,
    logits_of,
)
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import CacheScales
from outrider.workers.model.integer_linear import multiplies_int4
from outrider.workers.model.linear import DenseLinear, Linear, ProductKernels
from outrider.workers.model.loader import NO_BIAS
from outrider.workers.model.quantized import (
    NarrowLinear,
    ScaledMmLinear,
    make_scaled_linear,
    multiplies_fp8,
)
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.tiled_int4 import TiledInt4Linear
from outrider.workers.weights.config import DenseMlp
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.scaled import ScaledMatrix, round_inputs
from outrider.workers.weights.source import WeightSource

DTYPE = torch.bfloat16
# Relative errors of a product beside that in float32 with the same narrow numbers, rows rounded alike. What is
# rounded to bfloat16 (the product, and where a matrix is dequantised its values and the rows) is up to 2^-9 = 0.2 %
# off each time, 0.16 % on average, and FP8's tensor cores keep some 14 bits of a sum: 0.3 % in all.
LIMIT = 5e-3
# Beside the product with rows as they are: FP8 has 3 bits behind the first, which is 2.6 % of a row.
ROUNDED_INPUTS_LIMIT = 5e-2
CACHE_SCALES = CacheScales(keys=0.02, values=0.03)  # up to 9 and 13
NUM_REPLAYS = 3
TILE_ROWS = 256  # of a timed matrix, which repeats so many rows
MAX_COPIES = 32  # of a timed matrix: even the smallest are then more than a GPU's cache


def quantised(setting: Setting) -> list[Row]:
    rows = []
    source = RememberedSource(RandomSource(setting.model_spec()))
    ours, torch_alone = product_kernels(setting), ProductKernels()
    for layout in LAYOUTS:
        narrow = NarrowSource(source, layout)
        rows += attempted(f"{layout.name}: products", partial(products_beside_cpu, setting, layout, ours))
        if layout.bits == 4:
            name = f"{layout.name} by torch: products"
            rows += attempted(name, partial(products_beside_cpu, setting, layout, torch_alone))
        rows += attempted(f"{layout.name}: model", partial(whole_model, setting, narrow, None))
    rows += attempted("FP8 cache: model", partial(whole_model, setting, source, CACHE_SCALES))
    plain = dict.fromkeys(setting.sizes.trees, 0.0)
    rows += attempted("bfloat16: times", partial(times, setting, None, ours, plain))
    for layout in LAYOUTS:
        rows += attempted(f"{layout.name}: times", partial(times, setting, layout, ours, plain))
        if layout.bits == 4:
            name = f"{layout.name} by torch: times"
            rows += attempted(name, partial(times, setting, layout, torch_alone, plain))
    return rows


def attempted(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """Its rows, each called by its name; an exception is one that failed, and a warning is told of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            rows = [replace(row, what=f"{name}, {row.what}") for row in check()]
        except Exception as error:  # of torch or the driver: the other layouts must not go without
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            rows = [Row(name, said, "FAILED")]
    told = dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught)
    return [*rows, *(Row(f"{name}, warning", text) for text in told)]


def products_beside_cpu(setting: Setting, layout: Layout, kernels: ProductKernels) -> list[Row]:
    """One matrix by rows, eagerly and from a graph, beside the product on the CPU in float32."""
    config, device = RandomSource(setting.model_spec()).config, setting.device
    mlp = config.layers[0].mlp
    assert isinstance(mlp, DenseMlp)
    generator = torch.Generator().manual_seed(0)
    hidden = config.hidden_size
    weight = torch.randn(2 * mlp.intermediate_size, hidden, generator=generator) / hidden**0.5
    matrix = layout.matrix(weight)
    plain = matrix.dequantised(torch.float32)
    exact = make_scaled_linear(matrix, NO_BIAS, torch.float32, packed=False)
    linear = make_scaled_linear(matrix.to(device), NO_BIAS, DTYPE, False, kernels)
    rows = [kept_as(setting, layout, matrix, linear)]
    for num_rows in setting.sizes.trees:
        x = torch.randn(num_rows, hidden, generator=generator).to(DTYPE)
        want, unrounded = exact(x.float()), x.float() @ plain.T
        there = x.to(device)
        got = linear(there).float().cpu()
        off, off_plain = relative(got, want), relative(got, unrounded)
        plain_limit = ROUNDED_INPUTS_LIMIT if layout.rounds_inputs else LIMIT
        said = f"{off:.2e} off; {off_plain:.2e} off rows as they are"
        problems = [] if off <= LIMIT and off_plain <= plain_limit else [said]
        limits = f"at most {LIMIT:.0e} and {plain_limit:.0e}"
        rows.append(passed_or_failed(f"{num_rows} rows", problems, said, limits))
        if setting.on_gpu:
            rows.append(from_a_graph(linear, there, want))
    return rows


def kept_as(setting: Setting, layout: Layout, matrix: ScaledMatrix, linear: Linear) -> Row:
    """In which class a matrix is kept, and in which for many rows where our kernel multiplies few; a failure where
    torch could multiply the narrow numbers on a GPU and does not."""
    named, wanted = "", ""
    if isinstance(linear, NarrowLinear):
        named = f"{NarrowLinear.__name__}, from {linear.most_rows + 1} rows on "
        linear = linear.inner
    kept = type(linear).__name__
    if setting.on_gpu:
        capability = torch.cuda.get_device_capability(setting.device)
        if multiplies_fp8(matrix, DTYPE, capability):
            wanted = ScaledMmLinear.__name__
        elif multiplies_int4(matrix, DTYPE, setting.device.type) and capability >= (8, 0):
            wanted = TiledInt4Linear.__name__
    problems = [f"{kept} in place of {wanted}"] if wanted not in ("", kept) else []
    if isinstance(linear, TiledInt4Linear):
        named = f"int4_matmul up to {linear.most_rows} rows, or torch's up to {linear.most_rows_of_torch}, "
        problems += [] if linear.most_rows_of_torch else ["torch's product does not take the layout"]
    return passed_or_failed("kept as", problems, named + kept)


def from_a_graph(linear: Linear, x: Tensor, want: Tensor) -> Row:
    """Captured with rows of zeros, replayed with x [rows, in] of the GPU; `want` [rows, out] is on the CPU."""
    static = torch.zeros_like(x)
    linear(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(static)
    static.copy_(x)
    replayed = []
    for _ in range(NUM_REPLAYS):
        graph.replay()
        replayed.append(out.float().cpu())
    off = relative(replayed[0], want)
    problems = [] if off <= LIMIT else [f"{off:.2e} off"]
    problems += [] if all(torch.equal(x, replayed[0]) for x in replayed) else ["replays gave other bits"]
    return passed_or_failed(f"{len(x)} rows, graph", problems, f"{off:.2e} off", f"at most {LIMIT:.0e}")


def whole_model(setting: Setting, source: WeightSource, scales: CacheScales | None) -> list[Row]:
    """Logits with torch's operations and with kernels, no further off float32 on the CPU than bfloat16 there is:
    what lies between two narrow numbers may become either, there as here. Then graphs. `scales`: of a cache
    in FP8."""
    solo, device = SoloCommunicator(), setting.device
    exact = logits_of(*build_of(source, CPU, torch.float32, REFERENCES, solo, scales))
    on_cpu = relative(logits_of(*build_of(source, CPU, DTYPE, REFERENCES, solo, scales)), exact)
    limit = BFLOAT16_FACTOR * on_cpu
    rows = [Row("bfloat16 on the CPU", f"{on_cpu:.2e} off", beside="float32 on the CPU")]
    for name, kernels in (("SDPA", REFERENCES), ("kernels", ALL_KERNELS)):
        if kernels is ALL_KERNELS and not setting.has_kernels:
            rows.append(not_run(name, "there is no GPU"))
            continue
        model, cache = build_of(source, device, DTYPE, kernels, solo, scales)
        off = relative(logits_of(model, cache), exact)
        said = f"{off:.2e} off"
        rows.append(passed_or_failed(name, [] if off <= limit else [said], said, f"at most {limit:.2e}"))
    # One more rounding to narrow numbers between: a sum in another order shows as much as bfloat16 does.
    return rows + graphs_against_eager(setting, model, cache, max(GRAPH_LIMIT, limit))


def times(
    setting: Setting, layout: Layout | None, kernels: ProductKernels, plain: dict[int, float]
) -> list[Row]:
    """All products of a round's layers at the shapes of rank 0 of the large model; head and sums are left out.

    Args:
        layout: None: bfloat16 as it is, which fills `plain`.
        kernels: that products may run.
        plain: by rows, seconds of bfloat16; 0 where they are not known.
    """
    sizes = setting.sizes
    of_shapes: dict[int, dict[str, float]] = {num_rows: {} for num_rows in sizes.trees}
    rounding = dict.fromkeys(sizes.trees, 0.0)
    for name, (out_features, in_features) in layer_shapes(ShardPlan(sizes.large, 0, sizes.num_ranks)).items():
        linears, round_rows = timed_linears(setting, layout, kernels, out_features, in_features)
        for num_rows in sizes.trees:
            x = torch.randn(num_rows, in_features, dtype=DTYPE, device=setting.device)
            of_shapes[num_rows][name] = median_product_s(setting, linears, x)
            if round_rows is not None:
                rounding[num_rows] += median_product_s(setting, [round_rows] * len(linears), x)
    rows = []
    for num_rows, of_shape in of_shapes.items():
        seconds = sum(of_shape.values()) * sizes.large.num_layers
        if layout is None:
            plain[num_rows] = seconds
        ratio = seconds / plain[num_rows] if plain[num_rows] else 0.0
        values = [("time_ms", seconds * 1e3)]
        values += [(f"{name}_ms", each * 1e3) for name, each in of_shape.items()]
        said = f"{seconds * 1e3:.3f} ms"
        if rounding[num_rows]:
            in_them = rounding[num_rows] * sizes.large.num_layers * 1e3
            values.append(("rounding_ms", in_them))
            said += f", {in_them:.3f} of them to round rows"
        beside = f"{ratio:.2f} of bfloat16" if ratio and layout is not None else ""
        rows.append(
            Row(f"layers' products of a round, {num_rows} rows", said, "measured", beside, tuple(values))
        )
    return rows


def timed_linears(
    setting: Setting, layout: Layout | None, kernels: ProductKernels, out_features: int, in_features: int
) -> tuple[Sequence[Linear], Callable[[Tensor], object] | None]:
    """Copies of one matrix, more than a GPU's cache; and what rounds the rows that come in, where that is part of the
    products."""
    sizes, device = setting.sizes, setting.device
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(min(out_features, TILE_ROWS), in_features, generator=generator) / in_features**0.5
    times_over = -(-out_features // len(tile))

    def in_full(part: Tensor) -> Tensor:
        # torch need not move FP8, but bytes.
        moved = part.to(device)
        moved = moved.view(torch.uint8) if moved.dtype.itemsize == 1 else moved
        return moved.repeat(times_over, 1)[:out_features].view(part.dtype)

    if layout is None:
        copies = num_copies(sizes.weight_bytes, out_features * in_features * DTYPE.itemsize)
        plain = tile.to(DTYPE)
        return [DenseLinear(in_full(plain), NO_BIAS) for _ in range(copies)], None
    small = layout.matrix(tile)
    copies = num_copies(sizes.weight_bytes, small.num_bytes * times_over)
    linears = []
    for _ in range(copies):
        shifts = None if small.shifts is None else in_full(small.shifts)
        matrix = replace(small, values=in_full(small.values), scales=in_full(small.scales), shifts=shifts)
        linears.append(make_scaled_linear(matrix, NO_BIAS, DTYPE, False, kernels))
    inputs = small.inputs
    if inputs is None:
        return linears, None
    by_column = isinstance(linears[0], ScaledMmLinear) and small.scales.shape[1] > 1
    use_kernel = kernels.selection.round_rows
    return linears, lambda x: round_inputs(x, inputs, small.group, by_column, use_kernel)


def product_kernels(setting: Setting) -> ProductKernels:
    """All, where they can be launched."""
    return ProductKernels(ALL_KERNELS if setting.has_kernels else REFERENCES)


def num_copies(weight_bytes: int, matrix_bytes: int) -> int:
    return min(MAX_COPIES, max(2, weight_bytes // matrix_bytes))


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over that of `want`, both float32 on the CPU."""
    return ((got - want).norm() / want.norm()).item()
