from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from outrider.workers.weights.gguf_header import read_gguf_header
from outrider.workers.weights.gguf_source import GgufSource
from support.models import gguf_name, random_tensors, smollm2, write_gguf

EVERY = slice(None)
QUERY = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mellum"])
def test_float_files_give_the_tensors_back(tmp_path: Path, architecture: str) -> None:
    config, tensors = random_tensors(architecture, "num_heads=6&num_kv_heads=3&hidden_size=96")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    source = GgufSource(tmp_path / "m.gguf")
    assert source.config == config
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), tensor), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_quantised_values_are_those_of_the_gguf_package(tmp_path: Path, kind: Kind) -> None:
    config, tensors = random_tensors("qwen2")
    write_gguf(tmp_path / "m.gguf", config, tensors, kind)
    source = GgufSource(tmp_path / "m.gguf")
    expected = dequantized(tensors[DOWN], kind)
    assert torch.equal(source.read(DOWN, EVERY, EVERY, torch.float32), expected)
    assert torch.equal(source.read(DOWN, EVERY, EVERY, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants(tmp_path: Path, kind: Kind) -> None:
    """The gguf package cannot write these, so their blocks are random bytes (with finite scales)."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    config, tensors = random_tensors("llama", f"hidden_size={2 * block}&num_layers=1&vocab_size=10")
    blocks = np.random.default_rng(0).integers(0, 256, (10, 2 * block_bytes), np.uint8)
    # A float16 whose exponent has a zero among its five bits is finite; 0xBB clears one in every byte.
    blocks &= 0xBB
    rest = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    write_gguf(tmp_path / "m.gguf", config, rest, ready={"token_embd.weight": (blocks, kind)})
    source = GgufSource(tmp_path / "m.gguf")
    expected = torch.from_numpy(gguf.dequantize(blocks, kind))
    assert expected.isfinite().all()
    name = "model.embed_tokens.weight"
    assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), expected)
    assert torch.equal(source.read(name, slice(3, 9), slice(100, 300), torch.float32), expected[3:9, 100:300])
    ids = torch.tensor([9, 0, 9])
    assert torch.equal(source.read_rows(name, ids, torch.float32), expected[ids])


@pytest.mark.parametrize("columns", [(0, 128), (32, 96), (1, 2), (31, 33), (40, 127), (5, 5)])
def test_columns_need_not_align_with_blocks(tmp_path: Path, columns: tuple[int, int]) -> None:
    config, tensors = random_tensors("qwen2")
    write_gguf(tmp_path / "m.gguf", config, tensors, Kind.Q4_1)
    expected = dequantized(tensors[DOWN], Kind.Q4_1)[7:50, slice(*columns)]
    read = GgufSource(tmp_path / "m.gguf").read(DOWN, slice(7, 50), slice(*columns), torch.float32)
    assert torch.equal(read, expected)


@pytest.mark.parametrize("rows", [(0, 64), (16, 48), (16, 32), (3, 61), (17, 18)])
def test_rows_of_llama_queries_are_in_hugging_face_order(tmp_path: Path, rows: tuple[int, int]) -> None:
    """Whole heads (16 rows here) and any other range."""
    config, tensors = random_tensors("llama")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    source = GgufSource(tmp_path / "m.gguf")
    stored = read_gguf_header(tmp_path / "m.gguf").tensors[gguf_name(QUERY)]
    raw = np.fromfile(tmp_path / "m.gguf", np.float32, 64 * 64, offset=stored.offset).reshape(64, 64)
    assert not np.array_equal(raw, tensors[QUERY].numpy())
    assert torch.equal(source.read(QUERY, slice(*rows), EVERY, torch.float32), tensors[QUERY][slice(*rows)])


def test_long_matrices_are_read_in_pieces(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama", "hidden_size=1024&num_heads=4&num_layers=1")
    write_gguf(tmp_path / "m.gguf", config, tensors, Kind.F16)
    query = "model.layers.0.self_attn.q_proj.weight"
    expected = tensors[query].half().float()
    source = GgufSource(tmp_path / "m.gguf")
    assert torch.equal(source.read(query, EVERY, EVERY, torch.float32), expected)
    assert torch.equal(
        source.read(query, slice(100, 1000), slice(1, 9), torch.float32), expected[100:1000, 1:9]
    )


def test_a_truncated_file_and_foreign_tensors_are_one_line(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    path = tmp_path / "m.gguf"
    write_gguf(path, config, tensors)
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="not a complete GGUF file") as error:
        GgufSource(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"GARBAGE" + whole)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GgufSource(path)
    path.write_bytes(whole[: len(whole) - 4000])
    with pytest.raises(ValueError, match="is truncated"):
        GgufSource(path)


def test_smollm2_tensors_are_those_of_the_gguf_package() -> None:
    path = smollm2().path
    source = GgufSource(path)
    header = read_gguf_header(path)
    assert source.config.num_heads == 9
    assert source.config.tied_embeddings
    assert source.config.eos_token_ids[0] == 2
    for name in (DOWN, "model.layers.29.self_attn.v_proj.weight", "model.embed_tokens.weight"):
        tensor = header.tensors[gguf_name(name)]
        num_bytes = tensor.shape[0] * tensor.row_bytes
        blocks = np.fromfile(path, np.uint8, num_bytes, offset=tensor.offset).reshape(tensor.shape[0], -1)
        expected = torch.from_numpy(gguf.dequantize(blocks, tensor.type))
        assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), expected)


def dequantized(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).copy())
