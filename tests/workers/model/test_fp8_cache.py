"""Rows of keys and values in FP8: what compressed-tensors computes, and a tree sees what is committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.configs.schema import Config, TargetConfig
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.capacity import num_target_pages
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import CacheScales, PagedCache
from outrider.workers.model.fp8_cache import Fp8PagedCache, read_cache_scales
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.model.transformer import Transformer
from outrider.workers.setup import cache_dtype, kernels_with_cache, target_cache
from outrider.workers.weights.safetensors_source import SafetensorsSource
from support.quantised import compressed_tensors, fp8
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import reference_model, tiny_config

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
PAGE = 8
PAGES = [3, 9, 1, 0, 7, 5, 11, 2, 4, 6]
TREE = [0, 0, 0, 1, 1, 2]  # rows 0, 1, 3 are a path


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prompt(count: int) -> list[int]:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def step(
    model: Transformer, cache: PagedCache, first: int, parents: list[int], tokens: list[int]
) -> torch.Tensor:
    rows = SequenceRows(PAGES, first, parents, 0, tokens)
    return model.logits(model.forward(batch_of([rows], PAGE, CPU), cache).last)


def test_a_checkpoint_that_was_made_for_it_has_its_library_s_logits(tmp_path: Path) -> None:
    config = tiny_config("llama", num_heads=8, num_kv_heads=2)
    written = compressed_tensors(tmp_path, config, fp8("channel"), cache=fp8("tensor"))
    source = SafetensorsSource(tmp_path)
    scales = read_cache_scales(source)
    # Values of keys go up to some 5, so that scales of 2 / 448 and a little more cut some of them off.
    assert all(2 / 448 < scale < 0.01 for layer in scales for scale in (layer.keys, layer.values))
    deployed = Config(target=TargetConfig(model=str(tmp_path), dtype="float32", page_size=PAGE))
    plan = ShardPlan(source.config, 0, 1)
    model = Transformer(load_weights(plan, source, torch.float32, CPU, True), SoloCommunicator())
    cache = target_cache(deployed, model.weights, scales, REFERENCES)
    assert isinstance(cache, Fp8PagedCache)
    tokens = prompt(60)
    got, want = step(model, cache, 0, chain(60), tokens), written.logits(tokens)
    # A key or value between two FP8 numbers may become either, for all rows that follow.
    difference = (got - want).abs().amax(1)
    assert difference.median() < 1e-4
    assert difference.max() < 1e-1
    plainly = step(model, PagedCache(source.config, plan, 12, PAGE, torch.float32, CPU), 0, chain(60), tokens)
    assert (plainly - want).abs().amax(1).median() > 1e-2


def test_a_tree_sees_what_will_be_committed() -> None:
    config = tiny_config("qwen3", num_heads=4, num_kv_heads=2, windows=(0, 20))
    plan, tokens = ShardPlan(config, 0, 1), prompt(40)
    model = Transformer(
        load_weights(plan, reference_model(config)[1], torch.float32, CPU, True), SoloCommunicator()
    )
    scales = [CacheScales(0.01, 0.02)] * 2
    drafted, plain = (Fp8PagedCache(config, plan, 12, PAGE, CPU, scales) for _ in range(2))
    for cache in (drafted, plain):
        step(model, cache, 0, chain(30), tokens[:30])
    tree = step(model, drafted, 30, TREE, tokens[30:36])
    path = [0, 1, 3]
    alone = [step(model, plain, 30 + i, [0], [tokens[30 + row]]) for i, row in enumerate(path)]
    torch.testing.assert_close(tree[path], torch.cat(alone), atol=1e-4, rtol=1e-4)
    rows = torch.tensor([PAGES[row // PAGE] * PAGE + row % PAGE for row in range(30, 36)])
    drafted.commit(rows[path], rows[:3])

    def committed(cache: Fp8PagedCache) -> torch.Tensor:
        return cache.kv.view(torch.uint8).flatten(2, 3)[:, :, rows[:3]]

    assert torch.equal(committed(drafted), committed(plain))
    assert committed(plain).any()
    torch.testing.assert_close(
        step(model, drafted, 33, [0], [7]), step(model, plain, 33, [0], [7]), atol=1e-4, rtol=1e-4
    )


def test_a_byte_for_each_number_and_the_kernels_that_read_it() -> None:
    config = tiny_config(num_heads=4, num_kv_heads=2)

    def deployed(cache: str) -> Config:
        return Config(target=TargetConfig(model="random:llama", kv_cache_dtype=cache))  # type: ignore[arg-type]

    plan = ShardPlan(config, 0, 1)
    wide, narrow = (bytes_per_page(plan, num_bytes, 16) for num_bytes in (2, 1))
    assert wide == 2 * narrow
    assert num_target_pages(deployed("fp8"), config) == (256 << 20) // narrow
    assert [cache_dtype(deployed(name), config) for name in ("auto", "fp8", "fp8_e4m3")] == [
        torch.bfloat16,
        FP8,
        FP8,
    ]
    of_fp8 = KernelSelection.of(["tree_attention_fp8", "kv_commit"])
    assert kernels_with_cache(of_fp8, torch.bfloat16) == of_fp8
    chosen = kernels_with_cache(of_fp8, FP8)
    assert (chosen.tree_attention, chosen.rope_append, chosen.kv_commit) == (True, False, True)
    assert not kernels_with_cache(KernelSelection.of(["tree_attention"]), FP8).tree_attention
