"""Parts 7 and 8: rank 0 of a 70B over seven ranks, alone on one GPU: replays, matrix products, sampling.

Sums over ranks are not in these times: there is nobody to sum with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.profiler import profile

from outrider.kernels.gpu_check import median_replay_s
from outrider.kernels.roofline import least_time_s, roofline_of
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.first_gpu.expected import MANY, ONE, ONE_LONG, Figure
from outrider.workers.first_gpu.report import Row, milliseconds, not_run
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.small_model import ALL_KERNELS
from outrider.workers.first_gpu.trees import PAGE_SIZE, chain, trees_of
from outrider.workers.first_gpu.two_lanes import two_lanes
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import ForwardBatch, TreeRows, lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import forward_of, target_capacities
from outrider.workers.model.linear import DenseLinear
from outrider.workers.model.loader import NO_BIAS, load_weights
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.timing import stopwatch_of
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.random_source import tensor_shapes
from outrider.workers.weights.source import Stored

DTYPE = torch.bfloat16
BLOCK_ELEMENTS = 1 << 20
# Kernels by words in their names, the first match counts; what is left are norms, sums and copies.
KINDS = (
    ("attention", ("tree_attention", "merge_splits", "scaled_dot", "flash")),
    (
        "matrix products",
        ("gemm", "gemv", "nvjet", "cutlass", "splitk", "xmma", "aten::mm", "addmm", "mkldnn"),
    ),
)
OTHER = "norms, adds, SiLU"


class RepeatedSource:
    """Weights of a model of any size that all repeat one block of random numbers: quick to make, and no two
    matrices share memory once they are loaded. A `WeightSource`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = tensor_shapes(config)
        random = torch.Generator().manual_seed(0)
        self._block = torch.randn(BLOCK_ELEMENTS, generator=random) / math.sqrt(config.hidden_size)

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        parts = [len(range(*part.indices(size))) for part, size in zip((rows, columns), shape, strict=False)]
        if len(shape) == 1:
            return torch.ones(parts[0], dtype=dtype)
        block = self._block.to(dtype)
        return block.repeat(-(-math.prod(parts) // len(block)))[: math.prod(parts)].view(parts)

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        return Stored(self.read(name, rows, columns, torch.float32), "F32", {})

    def read_rows(self, name: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.read(name, slice(len(ids)), slice(None), dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize


def sequences_of(
    num_rows: int, num_sequences: int, context: int, cache: PagedCache
) -> tuple[PageTables, TreeRows] | None:
    """Rows shared out evenly over sequences that have no page in common; None where the cache is too small."""
    each = num_rows // num_sequences
    pages_each = -(-(context + each) // PAGE_SIZE)
    if pages_each * num_sequences > cache.num_pages:
        return None
    pages = torch.randperm(cache.num_pages, generator=torch.Generator().manual_seed(1)).tolist()
    parts = [pages[b * pages_each : (b + 1) * pages_each] for b in range(num_sequences)]
    return trees_of(parts, context, chain(each), [1] * each)


def replays(setting: Setting) -> list[Row]:
    """A forward of rank 0 by rows, context and sequences; where its time goes; the host's part."""
    sizes, device = setting.sizes, setting.device
    plan = ShardPlan(sizes.large, 0, sizes.num_ranks)
    kernels = ALL_KERNELS if setting.on_gpu else REFERENCES
    weights = load_weights(plan, RepeatedSource(sizes.large), DTYPE, device, packed=False)
    model = Transformer(weights, SoloCommunicator(), kernels)
    num_pages = sizes.cache_bytes // bytes_per_page(plan, DTYPE.itemsize, PAGE_SIZE)
    cache = PagedCache(sizes.large, plan, num_pages, PAGE_SIZE, DTYPE, device, kernels.kv_commit)
    cache.kv.normal_()
    forward = forward_of(model, cache, target_capacities(model, cache, sizes.large.max_context))
    rows = []
    for context in sizes.contexts:
        for num_rows in sizes.rows:
            for num_sequences in sorted({1, max(1, num_rows // sizes.rows_per_sequence)}):
                # Rows are shared out evenly: 33 over four sequences are 32.
                rows_in_all = num_rows // num_sequences * num_sequences
                name = f"{rows_in_all} rows, {num_sequences} sequences, context {context}"
                sequences = sequences_of(num_rows, num_sequences, context, cache)
                if sequences is None:
                    rows.append(not_run(name, f"the cache of {sizes.cache_bytes >> 30} GiB does not hold it"))
                    continue
                batch = lay_out(*sequences)
                rows.append(milliseconds(name, timed(setting, forward, batch)))
    rows += breakdown(setting, forward, cache)
    del forward
    return rows + two_lanes(setting, model, cache)


def timed(setting: Setting, forward: Callable[[ForwardBatch], Hidden], batch: ForwardBatch) -> float:
    """Median seconds of a forward, on the device's own time line."""
    stopwatch = stopwatch_of(setting.device)
    forward(batch)
    stopwatch.start()
    for _ in range(setting.sizes.replays):
        forward(batch)
        stopwatch.lap()
    return median(stopwatch.laps_ns()) * 1e-9


def breakdown(setting: Setting, forward: Callable[[ForwardBatch], Hidden], cache: PagedCache) -> list[Row]:
    """The rounds of `expected.py` by kind of kernel, and the host's time until a replay is on its way."""
    sizes, rows = setting.sizes, []
    for case, figures in ((sizes.one, ONE), (sizes.many, MANY), (sizes.one_long, ONE_LONG)):
        num_rows, num_sequences, context = case
        name = f"{num_rows} rows, {num_sequences} sequences, context {context}"
        sequences = sequences_of(num_rows, num_sequences, context, cache)
        if sequences is None:
            rows.append(not_run(name, "the cache does not hold it"))
            continue
        batch = lay_out(*sequences)
        for kind, seconds in seconds_by_kind(setting, forward, batch).items():
            rows.append(milliseconds(f"{kind}: {name}", seconds, setting.figure(figures, kind)))
        host = []
        for _ in range(sizes.replays):
            setting.synchronize()
            begun = time.perf_counter()
            forward(lay_out(*sequences))
            host.append(time.perf_counter() - begun)
        figure = setting.figure(figures, "host before the replay")
        rows.append(milliseconds(f"host: {name}", median(host), figure))
    return rows


def seconds_by_kind(
    setting: Setting, forward: Callable[[ForwardBatch], Hidden], batch: ForwardBatch
) -> dict[str, float]:
    """What one forward spends in attention, matrix products and the rest, from torch's profiler."""
    with profile(activities=setting.activities) as profiled:
        forward(batch)
        setting.synchronize()
    seconds = dict.fromkeys((*(kind for kind, _ in KINDS), OTHER), 0.0)
    for event in setting.busiest(profiled):
        name = str(event.key).lower()
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), OTHER)
        seconds[kind] += setting.time_us(event) * 1e-6
    return seconds


def products(setting: Setting) -> list[Row]:
    """Each matrix product of the rank beside its roofline, all of a round beside the plan; then sampling."""
    sizes, device = setting.sizes, setting.device
    plan, config = ShardPlan(sizes.large, 0, sizes.num_ranks), sizes.large
    shapes = {**layer_shapes(plan), "head": (len(plan.vocab), config.hidden_size)}
    roofline = roofline_of(torch.cuda.get_device_name(device) if setting.on_gpu else "cpu")
    rows, total = [], dict.fromkeys(sizes.rows, 0.0)
    for name, (out_features, in_features) in shapes.items():
        matrix_bytes = out_features * in_features * DTYPE.itemsize
        copies = max(2, sizes.weight_bytes // matrix_bytes)
        weights = torch.randn(copies, out_features, in_features, dtype=DTYPE, device=device)
        matrices = [DenseLinear(weight, NO_BIAS) for weight in weights.unbind()]
        for num_rows in sizes.rows:
            x = torch.randn(num_rows, in_features, dtype=DTYPE, device=device)
            seconds = median_product_s(setting, matrices, x)
            least = least_time_s(matrix_bytes, 2 * num_rows * out_features * in_features, roofline)
            total[num_rows] += seconds * (1 if name == "head" else config.num_layers)
            what = f"{name} {out_features} x {in_features}, {num_rows} rows"
            rows.append(milliseconds(what, seconds, Figure(least_ms=least * 1e3)))
    figures = {sizes.one[0]: ONE, sizes.many[0]: MANY}
    for num_rows, seconds in total.items():
        figure = setting.figure(figures.get(num_rows, {}), "matrix products")
        rows.append(milliseconds(f"all products of a round, {num_rows} rows", seconds, figure))
    return rows + sampling(setting, len(plan.vocab))


def layer_shapes(plan: ShardPlan) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices of a layer of a rank, all layers alike."""
    config, heads = plan.config, len(plan.query_heads)
    inner = len(plan.mlp_columns(config.layers[0].mlp.intermediate_size))
    D, hidden = config.head_dim, config.hidden_size
    return {
        "qkv": ((heads + 2 * plan.num_kv_heads) * D, hidden),
        "attention output": (hidden, heads * D),
        "gate and up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def median_product_s(setting: Setting, matrices: Sequence[Callable[[Tensor], object]], x: Tensor) -> float:
    """Seconds of one product, walking through copies of the matrix: none is in the cache when its turn comes."""

    def run() -> None:
        for matrix in matrices:
            matrix(x)

    run()
    if not setting.on_gpu:
        stopwatch = stopwatch_of(setting.device)
        stopwatch.start()
        for _ in range(setting.sizes.replays):
            run()
            stopwatch.lap()
        return median(stopwatch.laps_ns()) * 1e-9 / len(matrices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_replay_s(graph, setting.sizes.replays) / len(matrices)


def sampling(setting: Setting, vocab_size: int) -> list[Row]:
    """A round's sampling from logits on the device to tokens on the host, sorted by what is asked for."""
    kernels: KernelSelection = ALL_KERNELS if setting.on_gpu else REFERENCES
    sampler = Sampler(vocab_size, VocabularyRange(0, vocab_size), SoloCommunicator(), kernels)
    asked = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature 1": SamplingParams(temperature=1.0, seed=1),
        "top-p": SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    }
    rows = []
    for name, params in asked.items():
        for num_rows, figures in ((setting.sizes.one[0], ONE), (setting.sizes.many[0], MANY)):
            logits = torch.randn(num_rows, vocab_size, device=setting.device) * 3
            asked_of = [SampledRows(params, np.arange(num_rows), PenaltyState(()))]
            sampler.sample(logits, asked_of)
            times = []
            for _ in range(setting.sizes.replays):
                setting.synchronize()
                begun = time.perf_counter()
                sampler.sample(logits, asked_of)
                times.append(time.perf_counter() - begun)
            figure = setting.figure(figures, f"sampling, {name}")
            rows.append(milliseconds(f"sampling, {name}, {num_rows} rows", median(times), figure))
    return rows
