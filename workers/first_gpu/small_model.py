"""Part 4: a small model on kernels, on SDPA and on the CPU; graphs against the forward without."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.self_test import ENTRIES
from outrider.workers.first_gpu.report import Row, not_run, passed_or_failed
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.trees import PAGE_SIZE, chain, trees_of
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.model.batch import ForwardBatch, build_batch, lay_out
from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.cuda_graphs import GraphedForward, forward_of, target_capacities
from outrider.workers.model.fp8_cache import Fp8PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.source import WeightSource

CPU = torch.device("cpu")
ALL_KERNELS = KernelSelection.of(ENTRIES)
NUM_PAGES = 64
CONTEXT = 40  # tokens before the trees
# Relative errors of logits. In float32 only the order of sums differs; in bfloat16 every operation rounds, and the
# kernels round less often than the CPU's references do.
FLOAT32_LIMIT = 1e-3
BFLOAT16_FACTOR = 1.5
# Of last hidden rows: padded to a graph's capacity, products and attention sum in another order.
GRAPH_LIMIT = 2e-2


def build(
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    kernels: KernelSelection,
    communicator: Communicator,
) -> tuple[Transformer, PagedCache]:
    """The small model with an empty cache."""
    return build_of(RandomSource(setting.model_spec()), device, dtype, kernels, communicator)


def build_of(
    source: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    kernels: KernelSelection,
    communicator: Communicator,
    cache_scales: CacheScales | None = None,
) -> tuple[Transformer, PagedCache]:
    """A model of any source with an empty cache; in FP8 where there are `cache_scales`, those of every layer."""
    config, plan = source.config, ShardPlan(source.config, 0, 1)
    weights = load_weights(plan, source, dtype, device, packed=False)
    if cache_scales is None:
        cache = PagedCache(config, plan, NUM_PAGES, PAGE_SIZE, dtype, device, kernels.kv_commit)
    else:
        scales = (cache_scales,) * config.num_layers
        cache = Fp8PagedCache(config, plan, NUM_PAGES, PAGE_SIZE, device, scales, kernels.kv_commit)
        kernels = kernels.of_fp8_cache()
    return Transformer(weights, communicator, kernels), cache


def tree_batch(num_rows: int) -> ForwardBatch:
    """On the host, one tree of so many rows behind the prompt; each node has up to three children."""
    parents = [0, *(row // 3 for row in range(num_rows - 1))]
    tokens = [(7 * row + 3) % 64 for row in range(num_rows)]
    pages = range(-(-(CONTEXT + num_rows) // PAGE_SIZE))
    return lay_out(*trees_of([pages], CONTEXT, parents, tokens))


def read_prompt(model: Transformer, cache: PagedCache) -> Tensor:
    """Fills the cache with the prompt before the trees; its hidden rows."""
    pages = range(-(-CONTEXT // PAGE_SIZE))
    prompt = trees_of([pages], 0, chain(CONTEXT), [(5 * n) % 64 for n in range(CONTEXT)])
    return model.forward(build_batch(*prompt, model.device), cache).last


def logits_of(model: Transformer, cache: PagedCache) -> Tensor:
    """Float32 on the CPU: of a prompt, a tree behind it, and a node behind a path that was committed."""
    device = model.device

    def all_logits(rows: Tensor) -> Tensor:
        return model.logits_of(rows, torch.arange(len(rows), device=device)).cpu()

    hidden = [read_prompt(model, cache), model.forward(tree_batch(9).to(device), cache).last.clone()]
    # The path root, third child, its first child: rows 0, 3, 8; the first is in place.
    sources, targets = (
        torch.tensor([CONTEXT + row for row in rows], device=device) for rows in ((3, 8), (1, 2))
    )
    cache.commit(sources, targets)
    last = build_batch(*trees_of([range(4)], CONTEXT + 3, [0], [11]), device)
    hidden.append(model.forward(last, cache).last)
    return torch.cat([all_logits(rows) for rows in hidden])


def small_model(setting: Setting) -> list[Row]:
    solo = SoloCommunicator()
    exact = logits_of(*build(setting, CPU, torch.float32, REFERENCES, solo))

    def error(device: torch.device, dtype: torch.dtype, kernels: KernelSelection) -> float:
        logits = logits_of(*build(setting, device, dtype, kernels, solo))
        return ((logits - exact).norm() / exact.norm()).item()

    on_cpu = error(CPU, torch.bfloat16, REFERENCES)
    rows = [Row("logits on the CPU, bfloat16", f"{on_cpu:.2e} off", beside="float32 on the CPU")]
    variants = (
        ("SDPA, float32", torch.float32, REFERENCES, FLOAT32_LIMIT),
        ("SDPA, bfloat16", torch.bfloat16, REFERENCES, BFLOAT16_FACTOR * on_cpu),
        ("kernels, bfloat16", torch.bfloat16, ALL_KERNELS, BFLOAT16_FACTOR * on_cpu),
    )
    for name, dtype, kernels, limit in variants:
        if kernels is ALL_KERNELS and not setting.has_kernels:
            rows.append(not_run(f"logits, {name}", "there is no GPU"))
            continue
        off = error(setting.device, dtype, kernels)
        said = f"{off:.2e} off"
        rows.append(
            passed_or_failed(f"logits, {name}", [] if off <= limit else [said], said, f"at most {limit:.2e}")
        )
    return rows + compare_graphs(setting, solo)


def compare_graphs(setting: Setting, communicator: Communicator) -> list[Row]:
    """`graphs_against_eager` of the small model in bfloat16."""
    kernels = ALL_KERNELS if setting.has_kernels else REFERENCES
    return graphs_against_eager(
        setting, *build(setting, setting.device, torch.bfloat16, kernels, communicator)
    )


def graphs_against_eager(
    setting: Setting, model: Transformer, cache: PagedCache, limit: float = GRAPH_LIMIT
) -> list[Row]:
    """Replayed graphs against the forward without them, and against themselves; `limit`: of the relative error."""
    read_prompt(model, cache)
    forward = forward_of(model, cache, target_capacities(model, cache, model.config.max_context))
    graphed = isinstance(forward, GraphedForward)
    if setting.on_gpu and not graphed:
        return [passed_or_failed("graphs", ["none were captured"], "")]
    rows = []
    for num_rows in setting.sizes.trees:
        batch = tree_batch(num_rows)
        eager = model.forward(batch.to(setting.device), cache).last.float()
        replayed = [forward(batch).last.float().clone() for _ in range(3)]
        off = ((replayed[0] - eager).norm() / eager.norm()).item()
        problems = [] if off < limit else [f"{off:.2e} off the forward without a graph"]
        problems += [] if all(torch.equal(x, replayed[0]) for x in replayed) else ["replays gave other bits"]
        name = f"{'graph' if graphed else 'forward (no graphs on a CPU)'}, {num_rows} rows"
        rows.append(passed_or_failed(name, problems, f"{off:.2e} off"))
    return rows
