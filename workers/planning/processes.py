"""What each process of a deployment keeps in the memory of its GPU (or of its machine), part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from outrider.configs.processors import shares_gpus
from outrider.configs.schema import Config
from outrider.kernels.growth import FirstStep, Growth, GrowthShape, NextStep
from outrider.kernels.launch_plans import TYPE_NAMES
from outrider.kernels.sample_shard import ROW
from outrider.kernels.transfers import num_bytes_of
from outrider.kernels.tree_attention import HEAD_DIMS
from outrider.workers.capacity import num_draft_pages, num_target_pages
from outrider.workers.model.cuda_graphs import draft_capacities, target_capacities
from outrider.workers.model.grown_steps import MAX_GROWN_STEPS
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.model.sizes import WeightBytes, weight_bytes
from outrider.workers.model.static_batch import GraphCapacity, StaticBatch
from outrider.workers.model.whole_rounds import answer_bytes, extras_of
from outrider.workers.planning.activations import FLOAT32_BYTES, forward_bytes, gathered_bytes, logits_bytes
from outrider.workers.planning.heads import Heads
from outrider.workers.setup import cache_dtype, target_cache_bytes, torch_dtype
from outrider.workers.weights.config import ModelConfig

# What is not ours to count, on GPUs; estimates, each from who has measured it:
# a CUDA context with the kernels that are loaded into it: 0.3 GB at least, more as kernels are loaded
# (pytorch/pytorch#107667);
CONTEXT_BYTES = 512 << 20
# NCCL's buffers of the target's ranks: what a rank of two of vLLM's had outside of torch more than a single one,
# 3.58 - 1.79 GiB on H100s (vllm-project/vllm#10511);
RANKS_BYTES = 1833 << 20
# those of the two that hidden rows pass between, drafter and rank 0: 544 MB (NVIDIA/nccl#964);
LINK_BYTES = 544 << 20
# a CUDA graph, by layer: vLLM counted 24 to 28 MiB a graph (vllm-project/vllm#22897), of a model of about 30 layers;
GRAPH_BYTES_PER_LAYER = 1 << 20
# cuBLAS' workspace on Hopper, of each of the streams that products run on: the usual one and that of captures.
WORKSPACE_BYTES = 2 * (32 << 20)
# On CPUs: Python with torch and transformers in it, measured where this was written.
INTERPRETER_BYTES = 400 << 20
INT64_BYTES = 8


@dataclass(frozen=True)
class _Pages:
    num_pages: int
    page_size: int


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one process.

    Attributes:
        name: "target 0", ..., "draft", "draft 1", ...
        weights: of its model; heads: of draft heads, and what they share with the target.
        kv_cache: of which `kv_tokens` tokens fit.
        graphs: CUDA graphs: their inputs, the memory that they compute in, and the graphs themselves.
        activations: of the largest round, with its logits.
        communication: buffers between ranks, and between drafter and target.
        context: the CUDA context with cuBLAS' workspace; the interpreter on a CPU.
    """

    name: str
    weights: WeightBytes
    heads: int
    kv_cache: int
    kv_tokens: int
    graphs: int
    activations: int
    communication: int
    context: int

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by what they are for, in the order of a table."""
        weights = {part.name: getattr(self.weights, part.name) for part in fields(self.weights)}
        others = ("heads", "kv_cache", "graphs", "activations", "communication", "context")
        return {**weights, **{name: getattr(self, name) for name in others}}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def target_memory(config: Config, model: ModelConfig, rank: int, num_taps: int) -> ProcessMemory:
    """Of one rank of the target.

    Args:
        num_taps: layers whose inputs draft methods read.

    Raises:
        ValueError: `target.kv_cache_bytes` does not hold a page, or `target.tp_size` ranks cannot share the model.
    """
    target, rounds = config.target, config.rounds
    plan, dtype = ShardPlan(model, rank, target.tp_size), torch_dtype(target.dtype)
    on_gpu = config.cluster.num_gpus_per_target > 0 and target.device != "cpu"
    num_pages, cache = num_target_pages(config, model), cache_dtype(config, model)
    by_kernel = on_gpu and target.attention != "sdpa" and attention_kernel_fits(model, dtype)
    capacities = target_capacities(plan, _Pages(num_pages, target.page_size), target.max_context)
    nodes = rounds.max_sequences * (config.tree.max_nodes + 1)
    activations = forward_bytes(plan, rounds.max_round_tokens, dtype, num_taps)
    if not by_kernel:
        # A sequence of the longest context and as many rows of it as a round has; many are grouped, and padded less.
        context = min(target.max_context, model.max_context, num_pages * target.page_size)
        activations += gathered_bytes(plan, rounds.max_round_tokens, context, dtype, cache)
    logits = logits_bytes(plan, min(nodes, rounds.max_round_tokens), dtype)
    graphs = 0
    if by_kernel:
        graphs = graph_bytes(plan, capacities, target.page_size, dtype, num_taps, with_logits=True)
        graphs += whole_round_bytes(plan, capacities)
    communication = RANKS_BYTES if target.tp_size > 1 else 0
    if rank == 0 and num_taps and _links_gpus(config):
        communication += LINK_BYTES
    return ProcessMemory(
        name=f"target {rank}",
        weights=weight_bytes(plan, dtype, on_gpu),
        heads=0,
        kv_cache=target_cache_bytes(config, plan),
        kv_tokens=num_pages * target.page_size,
        graphs=graphs,
        activations=activations + logits,
        communication=communication if on_gpu else 0,
        context=context_bytes(on_gpu),
    )


def draft_memory(
    config: Config, model: ModelConfig | None, rank: int, heads: Heads, num_taps: int
) -> ProcessMemory:
    """Of one rank of the drafter; the first is the DraftWorker, which has heads and all logits.

    Args:
        model: of `draft.model`, where method `model` drafts.
        heads: of the draft methods other than `model`.
        num_taps: as for the target, whose rows of this many layers come here.

    Raises:
        ValueError: `draft.kv_cache_bytes` does not hold a page, or `draft.tp_size` ranks cannot share the model.
    """
    draft, rounds = config.draft, config.rounds
    dtype, page_size = torch_dtype(draft.dtype), config.target.page_size
    on_gpu = config.cluster.num_gpus_per_draft > 0 and draft.device != "cpu"
    weights, cache, tokens, graphs, activations = WeightBytes(0, 0, 0, 0, 0), 0, 0, 0, 0
    if model is not None:
        plan = ShardPlan(model, rank, draft.tp_size, "draft")
        num_pages = num_draft_pages(config, model, draft.tp_size)
        weights, tokens = weight_bytes(plan, dtype, on_gpu), num_pages * page_size
        cache = num_pages * bytes_per_page(plan, dtype.itemsize, page_size)
        # Prompts come in chunks, of which one sequence after the other is read; logits are those of a step.
        activations = forward_bytes(plan, rounds.prefill_chunk, dtype, 0)
        whole = ShardPlan(model, 0, 1)
        activations += logits_bytes(whole if rank == 0 else plan, rounds.max_sequences, dtype)
        if on_gpu and config.target.attention != "sdpa" and attention_kernel_fits(model, dtype):
            capacities = draft_capacities(plan, _Pages(num_pages, page_size))
            graphs = graph_bytes(plan, capacities, page_size, dtype, 0, with_logits=draft.tp_size == 1)
            if draft.tp_size == 1:
                graphs += levels_bytes(plan, capacities, page_size, config.tree.max_children, 0)
    if rank == 0 and on_gpu and config.target.attention != "sdpa":
        fitting = [drafter for drafter in heads.stepping if attention_kernel_fits(drafter, dtype)]
        graphs += sum(step_graph_bytes(config, drafter) for drafter in fitting)
    communication = RANKS_BYTES if draft.tp_size > 1 else 0
    if rank == 0 and num_taps and _links_gpus(config):
        communication += LINK_BYTES
    return ProcessMemory(
        name=f"draft {rank}" if rank else "draft",
        weights=weights,
        heads=0 if rank else heads.num_bytes,
        kv_cache=cache + (0 if rank else heads.num_caches * draft.kv_cache_bytes),
        kv_tokens=tokens,
        graphs=graphs,
        activations=activations,
        communication=communication if on_gpu else 0,
        context=context_bytes(on_gpu),
    )


def _links_gpus(config: Config) -> bool:
    """Whether hidden rows go from GPU to GPU: NCCL connects none to itself."""
    return config.cluster.num_gpus_per_draft > 0 and not shares_gpus(config.draft, config.cluster)


def attention_kernel_fits(model: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether there is an attention kernel for a model, without which there are no CUDA graphs."""
    return dtype in TYPE_NAMES and model.head_dim in HEAD_DIMS


def graph_bytes(
    plan: ShardPlan,
    capacities: list[GraphCapacity],
    page_size: int,
    dtype: torch.dtype,
    num_taps: int,
    with_logits: bool,
) -> int:
    """Of CUDA graphs that share one pool of memory, which the largest fills. Each keeps its logits, if it has any."""
    cpu = torch.device("cpu")  # a few MB; on the meta device torch takes a second to find out what zeros are
    inputs = sum(StaticBatch(capacity, page_size, cpu).num_bytes for capacity in capacities)
    num_rows = [capacity.num_rows for capacity in capacities]
    pool = forward_bytes(plan, max(num_rows), dtype, num_taps)
    if with_logits:
        others = sum(num_rows) - max(num_rows)
        pool += logits_bytes(plan, max(num_rows), dtype) + others * len(plan.vocab) * FLOAT32_BYTES
    return inputs + pool + len(capacities) * plan.config.num_layers * GRAPH_BYTES_PER_LAYER


def whole_round_bytes(plan: ShardPlan, capacities: list[GraphCapacity]) -> int:
    """Of what graphs of the target's rounds have around their forwards, see `WholeRounds`."""
    from outrider.workers.sampling.candidates import usual_list_size

    list_size, num_bytes = usual_list_size(plan.config.vocab_size, len(plan.vocab)), 0
    for capacity in capacities:
        num_bytes += num_bytes_of([part for part, _ in extras_of(capacity.num_rows)])
        num_bytes += answer_bytes(capacity.num_rows, list_size)
    return num_bytes


def step_graph_bytes(config: Config, drafter: ModelConfig) -> int:
    """Of the graphs of a drafter on the target's hidden rows, see `GraphedSteps`: with what they keep of nodes.

    drafter: as in `Heads.stepping`.
    """
    from outrider.workers.drafting.slots import tree_capacity  # takes a second to import

    dtype, page_size = torch_dtype(config.draft.dtype), config.target.page_size
    plan, num_pages = ShardPlan(drafter, 0, 1), num_draft_pages(config, drafter)
    capacities = draft_capacities(plan, _Pages(num_pages, page_size))
    num_rows = [capacity.num_rows for capacity in capacities]
    row_bytes = drafter.hidden_size * dtype.itemsize
    num_nodes = config.rounds.max_sequences * tree_capacity(config.tree.max_nodes)
    features = (num_nodes + max(num_rows) * (1 + MAX_GROWN_STEPS) + 1) * row_bytes
    ids = 2 * sum(num_rows) * INT64_BYTES  # of features that are read and written
    # Beside a layer's own rows: features and embedding rows, these normed, and both side by side.
    read = max(num_rows) * 5 * row_bytes
    levels = levels_bytes(
        plan, capacities, page_size, config.tree.max_children, MAX_GROWN_STEPS * max(num_rows)
    )
    return (
        features + ids + read + levels + graph_bytes(plan, capacities, page_size, dtype, 0, with_logits=True)
    )


def levels_bytes(
    plan: ShardPlan, capacities: list[GraphCapacity], page_size: int, num_best: int, num_moves: int
) -> int:
    """Of the graphs more that levels without the host take, two of each size, see `GrownSteps`: a batch with what is
    known of the first step, and what steps leave to each other. What is computed shares the memory of the others."""
    cpu, kept = torch.device("cpu"), 0
    for capacity in capacities:
        rows, words = capacity.num_rows, capacity.mask_words
        shape = GrowthShape(rows, capacity.num_sequences, num_best, MAX_GROWN_STEPS, words)
        kept += sum(x.nbytes for x in (*Growth.empty(shape, cpu), *NextStep.empty(shape, cpu)))
        kept += StaticBatch(capacity, page_size, cpu).num_bytes + num_bytes_of(FirstStep.parts(shape))
        kept += 2 * num_moves * INT64_BYTES + rows * (ROW.itemsize + 2 * INT64_BYTES)
    return kept + 2 * len(capacities) * plan.config.num_layers * GRAPH_BYTES_PER_LAYER


def context_bytes(on_gpu: bool) -> int:
    """What a process takes before it has anything of its own."""
    return CONTEXT_BYTES + WORKSPACE_BYTES if on_gpu else INTERPRETER_BYTES
