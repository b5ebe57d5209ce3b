import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from outrider.configs.schema import Weights
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.integer_linear import Int8Linear, int8_works
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.gguf_source import GgufSource
from outrider.workers.weights.integers import gguf_in_four_bits, with_weights
from outrider.workers.weights.source import read_scaled
from support.models import random_tensors, write_gguf
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import reference_model, tiny_config

ALL = slice(None)
DOWN = "model.layers.0.mlp.down_proj.weight"
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_four_bits_of_gguf_are_the_values_of_the_gguf_package(kind: Kind) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (12, 512 // block * block_bytes), np.uint8)
    blocks &= 0xBB  # scales are finite, see test_k_quants
    want = torch.from_numpy(gguf.dequantize(blocks, kind))
    got = gguf_in_four_bits(torch.from_numpy(blocks), kind)
    assert got.values.max() <= 15
    torch.testing.assert_close(got.dequantised(torch.float32), want, atol=0, rtol=1e-5)


@pytest.mark.parametrize(("kind", "exact"), [(Kind.Q4_0, True), (Kind.Q4_1, True), (Kind.Q8_0, False)])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_file_stays_quantised(tmp_path: Path, kind: Kind, exact: bool, architecture: str) -> None:
    config, tensors = random_tensors(architecture)
    write_gguf(tmp_path / "m.gguf", config, tensors, kind)
    plain = GgufSource(tmp_path / "m.gguf")
    source = with_weights(plain, "quantized", "target")
    query = "model.layers.1.self_attn.q_proj.weight"
    for name in (DOWN, query):
        whole = plain.read(name, ALL, ALL, torch.float32)
        for rows, columns in ((ALL, ALL), (slice(3, 7), slice(5, 41)), (slice(2, 3), slice(32, 64))):
            matrix = read_scaled(source, name, rows, columns)
            assert matrix is not None
            assert matrix.values.dtype == (torch.uint8 if exact else torch.int8)
            got, want = matrix.dequantised(torch.float32), whole[rows, columns]
            torch.testing.assert_close(got, want, atol=1e-6 if exact else 0.01, rtol=0)
            assert torch.equal(source.read(name, rows, columns, torch.float32), got)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(source.read(norm, ALL, ALL, torch.float32), plain.read(norm, ALL, ALL, torch.float32))
    assert source.total_bytes(torch.bfloat16) < plain.total_bytes(torch.bfloat16)


@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.05), ("int4", 0.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_rounded_when_they_are_read(weights: Weights, tolerance: float, tied: bool) -> None:
    """The logits are those of the rounded values, and near those of the values; the head is in 8 bits."""
    original, plain = reference_model(tiny_config("qwen3", tied_embeddings=tied))
    source = with_weights(plain, weights, "target")
    reference = copy.deepcopy(original)  # the source reads from the other
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        unrounded = reference(torch.tensor([tokens])).logits[0]
        for name, parameter in reference.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(source.read(name, ALL, ALL, torch.float32))
        embedding = reference.model.embed_tokens.weight.clone()
        reference.lm_head.weight = torch.nn.Parameter(source.read("lm_head.weight", ALL, ALL, torch.float32))
        reference.model.embed_tokens.weight = torch.nn.Parameter(embedding)
        want = reference(torch.tensor([tokens])).logits[0]
    plan = ShardPlan(source.config, 0, 1)
    loaded = load_weights(plan, source, torch.float32, CPU, packed=True)
    cache = PagedCache(source.config, plan, 64, 8, torch.float32, CPU)
    rows = SequenceRows(list(range(16)), 0, chain(60), 0, tokens)
    model = Transformer(loaded, SoloCommunicator())
    got = model.logits(model.forward(batch_of([rows], 8, CPU), cache).last)
    assert (got - want).abs().max() < 2e-4
    assert 1e-3 < (want - unrounded).abs().mean() < tolerance
    if int8_works():
        assert isinstance(loaded.head.linear, Int8Linear)  # type: ignore[attr-defined]


def test_what_cannot_be_is_refused_by_name() -> None:
    _, plain = reference_model(tiny_config("llama"))
    with pytest.raises(
        ValueError, match=r"target.weights must be auto, int8 or int4, because target.model is not"
    ):
        with_weights(plain, "quantized", "target")
    rounded = with_weights(plain, "int8", "draft")
    with pytest.raises(
        ValueError, match=r"draft.weights must be auto, because draft.model is quantised already"
    ):
        with_weights(rounded, "int4", "draft")
    assert with_weights(plain, "auto", "target") is plain
