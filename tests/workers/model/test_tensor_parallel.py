"""Ranks together compute what one rank computes, whether or not anything divides."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from gguf import GGMLQuantizationType as Kind

from outrider.configs.schema import Weights
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.config import ModelConfig, RoutedMlp
from outrider.workers.weights.gguf_source import GgufSource
from outrider.workers.weights.integers import with_weights
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.source import WeightSource
from support.models import random_tensors, write_gguf
from support.quantised import compressed_tensors, fp8
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import reference_model, tiny_config, tiny_mellum
from support.thread_group import ThreadCommunicator, thread_group

CPU = torch.device("cpu")
PAGE = 8
TREE = [0, 0, 0, 1, 1, 2]

CONFIGS = {
    "9 heads on 3": tiny_config(num_heads=9, num_kv_heads=3),
    "4 heads on 2": tiny_config(num_heads=4, num_kv_heads=2),
    "14 heads on 2, qwen2": tiny_config("qwen2", num_heads=14, num_kv_heads=2),
    "6 heads on 1, tied": tiny_config(num_heads=6, num_kv_heads=1, tied_embeddings=True),
    "qwen3": tiny_config("qwen3", num_heads=5, num_kv_heads=5),
    "windows": tiny_config("qwen3", num_heads=5, num_kv_heads=1, windows=(0, 20)),
    "mellum, experts by number and by columns": tiny_mellum((20, 0), 5, 1),
    "mellum, experts by columns": tiny_mellum((20, 0), 5, 1, RoutedMlp(5, 2, 44, renormalised=True)),
    "odd MLP and vocabulary": tiny_config(num_heads=4, intermediate_size=101, vocab_size=307),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits_on(size: int, config: ModelConfig, source: WeightSource, packed: bool) -> torch.Tensor:
    """A prompt, then a tree behind it, on `size` ranks: [rows, vocab]."""
    tokens = torch.randint(0, config.vocab_size, (76,), generator=torch.Generator().manual_seed(3)).tolist()

    def work(communicator: ThreadCommunicator) -> list[torch.Tensor]:
        try:
            return rank_logits(communicator)
        except Exception:
            communicator.abort()  # the other ranks need not wait
            raise

    def rank_logits(communicator: ThreadCommunicator) -> list[torch.Tensor]:
        plan = ShardPlan(config, communicator.rank, size)
        model = Transformer(load_weights(plan, source, torch.float32, CPU, packed), communicator)
        cache = PagedCache(config, plan, 16, PAGE, torch.float32, CPU)
        pages = [3, 9, 1, 0, 7, 5, 11, 2, 4, 6]
        out = []
        for rows in (
            SequenceRows(pages, 0, chain(70), 0, tokens[:70]),
            SequenceRows(pages, 70, TREE, 0, tokens[70:]),
        ):
            hidden = model.forward(batch_of([rows], PAGE, CPU), cache, taps=(1,))
            everywhere = communicator.all_gather(hidden.taps[1])
            assert torch.equal(everywhere, hidden.taps[1].expand_as(everywhere))
            shard = model.logits(hidden.last)
            assert shard.shape[1] == len(plan.vocab)
            out.append(shard)
        return out

    with ThreadPoolExecutor(size) as pool:
        shards = list(pool.map(work, thread_group(size)))
    return torch.cat([torch.cat(step, dim=1) for step in zip(*shards, strict=True)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ranks_agree_with_one(config: ModelConfig, size: int, packed: bool) -> None:
    source = reference_model(config)[1]
    # Logits of order 1 to 10 whose sums are split otherwise: seen up to 7e-6.
    torch.testing.assert_close(
        logits_on(size, config, source, packed), logits_on(1, config, source, packed), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("scales", "heads"),
    [
        (fp8("channel"), (9, 3)),
        (fp8("tensor"), (8, 2)),
        # Heads of 16 and a rank's part of the MLP begin inside of a block.
        (fp8("block", block_structure=[4, 12]), (9, 3)),
        (fp8("block", block_structure=[32, 32]), (8, 2)),
    ],
    ids=str,
)
def test_ranks_have_the_scales_of_their_rows_and_columns(
    scales: QuantizationArgs, heads: tuple[int, int], size: int, tmp_path: Path
) -> None:
    compressed_tensors(tmp_path, tiny_config("qwen2", *heads), scales)
    source = SafetensorsSource(tmp_path)
    torch.testing.assert_close(
        logits_on(size, source.config, source, True),
        logits_on(1, source.config, source, False),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("size", [2, 3])
def test_scales_of_activations_are_those_of_a_rank_s_own_columns(size: int, tmp_path: Path) -> None:
    def logits(name: str, inputs: QuantizationArgs | None, num_ranks: int) -> torch.Tensor:
        compressed_tensors(tmp_path / name, config, fp8("channel"), inputs)
        source = SafetensorsSource(tmp_path / name)
        return logits_on(num_ranks, source.config, source, True)

    config, token = tiny_config("llama", 9, 3), fp8("token", dynamic=True)
    exact = logits("exact", None, 1)
    alone, together = ((logits("rounded", token, n) - exact).norm() for n in (1, size))
    # A scale for fewer columns rounds otherwise, not worse.
    assert 0 < together < 1.1 * alone


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("weights", ["quantized", "int8"])
def test_ranks_have_the_integers_of_their_rows_and_columns(
    weights: Weights, size: int, tmp_path: Path
) -> None:
    """Heads of 16 columns, so that a rank's part begins inside a group; 8 bits have other scales, not worse ones."""
    config, tensors = random_tensors(
        "llama", "num_heads=6&num_kv_heads=3&hidden_size=96&intermediate_size=384"
    )
    write_gguf(tmp_path / "m.gguf", config, tensors, Kind.Q4_1)
    source = GgufSource(tmp_path / "m.gguf")
    integers = with_weights(source, weights, "target")
    dequantised = logits_on(1, config, source, True)
    alone, together = (logits_on(n, integers.config, integers, True) for n in (1, size))
    if weights == "quantized":
        torch.testing.assert_close(alone, dequantised, atol=1e-4, rtol=0)
        torch.testing.assert_close(together, dequantised, atol=1e-4, rtol=0)
    else:
        assert 0 < (together - dequantised).norm() < 1.2 * (alone - dequantised).norm()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_rank_reads_only_its_own_slices(size: int) -> None:
    config = tiny_config(num_heads=12, num_kv_heads=6, intermediate_size=768, vocab_size=768)
    tensors = reference_model(config)[1]
    matrices = sum(
        tensors.shape(name)[0] * tensors.shape(name)[1] for name in tensors.names() if "norm" not in name
    )
    for rank in range(size):
        tensors.reads.clear()
        plan = ShardPlan(config, rank, size)
        load_weights(plan, tensors, torch.float32, CPU, True)
        read = sum(numel for name, numel in tensors.reads if "norm" not in name)
        assert read == matrices // size
