"""The whole model on the CUDA kernels, which the source executor runs: prefill, trees, commit and sampling, through
the same operators that launch on a GPU. Only the launcher and the number of multiprocessors are stand-ins."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.kernels import gather_rows, launch_plans, narrow_matmul, tree_attention
from outrider.kernels.noise import noise_keys
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import ShardLogits
from outrider.kernels.token_rows import unpack_tokens
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.cuda_graphs import GraphedForward
from outrider.workers.model.fp8_cache import Fp8PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.static_batch import GraphCapacity
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.device_shard import DeviceShard
from support.counted_gpu import KERNEL_MODULES
from support.cuda_on_cpu.kernels import source_kernels
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import reference_model, tiny_config
from support.thread_group import thread_group

CPU = torch.device("cpu")
PAGE = 8
PAGES = list(range(20))
ALL_KERNELS = KernelSelection.of(ENTRIES)


class CountingLauncher:
    """Runs plans on the source executor and remembers which kernels ran."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def launch(self, plans) -> None:  # type: ignore[no-untyped-def]
        self.kernels += [plan.source for plan in plans]
        source_kernels().launch(plans)


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> CountingLauncher:
    torch.set_num_threads(1)
    counting = CountingLauncher()
    monkeypatch.setattr(launch_plans, "_launcher", lambda device: counting)
    monkeypatch.setattr(tree_attention, "_num_sms", lambda device: 2)
    monkeypatch.setattr(narrow_matmul, "gpu_resources", lambda device: (2, 227 << 10))
    # The bodies that run on a GPU; on CPU tensors the operators would choose the references.
    for module in KERNEL_MODULES:
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, f"{name}_op", getattr(module, f"{name}_on_gpu"))
    return counting


def model_and_cache(kernels: KernelSelection, communicator: Communicator) -> tuple[Transformer, PagedCache]:
    config = replace(tiny_config("qwen3", num_heads=6, num_kv_heads=2), hidden_size=128, head_dim=64)
    _, source = reference_model(config)
    plan = ShardPlan(config, communicator.rank, communicator.size)
    weights = load_weights(plan, source, torch.bfloat16, CPU, packed=False)
    model = Transformer(weights, communicator, kernels)
    return model, PagedCache(config, plan, len(PAGES), PAGE, torch.bfloat16, CPU, kernels.kv_commit)


def generate(kernels: KernelSelection, narrow: bool) -> list[torch.Tensor]:
    """Logits of two prompts in chunks, of trees on them, and of the nodes behind a committed path."""
    model, cache = model_and_cache(kernels, SoloCommunicator())
    if narrow:
        plan, scales = ShardPlan(model.config, 0, 1), [CacheScales(0.01, 0.02)] * model.config.num_layers
        cache = Fp8PagedCache(model.config, plan, len(PAGES), PAGE, CPU, scales, kernels.kv_commit)
    first, second = PAGES[:12], PAGES[12:]

    def logits(*sequences: SequenceRows) -> torch.Tensor:
        hidden = model.forward(batch_of(sequences, PAGE, CPU), cache).last
        return model.logits_of(hidden, torch.arange(len(hidden)))

    tree = [0, 0, 0, 1, 1, 2]
    found = [
        logits(
            SequenceRows(first, 0, chain(40), 0, list(range(40))),
            SequenceRows(second, 0, chain(9), 0, [7] * 9),
        ),
        logits(SequenceRows(first, 40, chain(20), 0, list(range(20)))),
        logits(SequenceRows(first, 60, tree, 0, [1, 2, 3, 4, 5, 6]), SequenceRows(second, 9, [0], 0, [8])),
    ]
    # The path root, second child, its child: rows 0, 2, 5 become the tokens at 60, 61, 62.
    slots = [first[n // PAGE] * PAGE + n % PAGE for n in (62, 65, 61, 62)]
    cache.commit(torch.tensor(slots[:2]), torch.tensor(slots[2:]))
    found.append(logits(SequenceRows(first, 63, [0], 0, [9])))
    return found


@pytest.mark.parametrize(("narrow", "tolerance"), [(False, 3e-2), (True, 4e-2)], ids=["bf16", "FP8"])
def test_the_model_computes_on_kernels_what_it_computes_on_the_references(
    narrow: bool, tolerance: float, launcher: CountingLauncher
) -> None:
    expected = generate(REFERENCES, narrow)
    assert launcher.kernels == []
    for logits, reference in zip(generate(ALL_KERNELS, narrow), expected, strict=True):
        # bf16 activations: the references round after every operation, the kernels once.
        # Seen: 1.3e-2, and with a cache in FP8 1.9e-2.
        error = (logits - reference).norm() / reference.norm()
        assert error < tolerance
    rows = {"gather_rows", "add_rms_norm", "silu_mul"}
    assert {"tree_attention", "rope_append", "kv_commit", *rows} <= set(launcher.kernels)


def test_a_rank_rehearses_its_graphs_alone(launcher: CountingLauncher) -> None:
    """The other rank never comes: a sum over both would wait for it."""
    communicator = thread_group(2)[1]
    model, cache = model_and_cache(ALL_KERNELS, communicator)
    before = cache.kv.clone()
    GraphedForward(model, cache, [GraphCapacity(3, 2, 4, 1, 32), GraphCapacity(9, 2, 4, 1, 32)]).rehearse()
    assert {"tree_attention", "rope_append", "gather_rows"} <= set(launcher.kernels)
    assert torch.equal(cache.kv, before)


def test_the_best_tokens_of_a_row_are_found_by_the_kernel(
    launcher: CountingLauncher,
) -> None:
    logits = (torch.randn(4, 700, generator=torch.Generator().manual_seed(0)) * 5).bfloat16().float()
    logits[2] = -torch.inf
    before = logits.clone()
    rows, temperatures = np.array([3, 0, 1]), np.array([0.0, 0.8, 1.3], dtype=np.float32)
    keys = noise_keys(np.arange(3, dtype=np.uint64), np.full(3, 4))
    shard = DeviceShard(logits, ShardIds.from_first(7000, 700), ALL_KERNELS)
    on_host = ShardLogits(logits, ShardIds.from_first(7000, 700)).best(rows, temperatures, keys, 4)
    for packed, expected in zip(shard.best(rows, temperatures, keys, 4), on_host, strict=True):
        (values, ids), (expected_values, expected_ids) = (unpack_tokens(p) for p in (packed, expected))
        assert ids.tolist() == expected_ids.tolist()
        torch.testing.assert_close(torch.from_numpy(values), torch.from_numpy(expected_values))
    assert launcher.kernels == ["sample_shard"]
    removed = shard.best(np.array([2]), temperatures[1:2], keys[:1], 2)
    assert unpack_tokens(removed)[1].tolist() == [[7000, 7001]]
    assert torch.equal(logits, before)


def test_rows_are_gathered_by_their_kernel(launcher: CountingLauncher) -> None:
    rows, index = torch.randn(6, 10), torch.tensor([5, 0, 5])
    assert torch.equal(gather_rows.gather_rows(rows, index, use_kernel=True), rows[index])
    assert gather_rows.gather_rows(rows, index[:0], use_kernel=True).shape == (0, 10)
    assert launcher.kernels == ["gather_rows"]


def test_long_contexts_are_split_and_merged(launcher: CountingLauncher) -> None:
    q, pages = torch.randn(1, 4, 64).bfloat16(), torch.randn(2, 40, 16, 2, 64).bfloat16()
    batch = batch_of([SequenceRows(list(range(40)), 600, [0], 0, [1])], 16, CPU).tree
    attended = [
        tree_attention.tree_attention(q, *pages, batch, 0.125, use_kernel=used) for used in (True, False)
    ]
    assert (attended[0] - attended[1]).float().norm() / attended[1].float().norm() < 1e-2
    assert launcher.kernels == ["tree_attention", "merge_splits"]
