"""What a checkpoint may contain: every tensor is read, or known to be harmless, or refused by name."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from outrider.workers.weights.config import to_hf_config
from outrider.workers.weights.gguf_source import GgufSource
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import resolve
from outrider.workers.weights.safetensors_source import SafetensorsSource
from support.models import gguf_name, permuted, random_tensors, write_gguf, write_safetensors

EVERY = slice(None)
SHAPE = "hidden_size=128&num_heads=4&num_kv_heads=2&head_dim=32&intermediate_size=96&num_layers=2"
DOWN = "model.layers.0.mlp.down_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def refusal(directory: Path) -> str:
    """The one line with which a directory or a GGUF file is refused."""
    with pytest.raises(ValueError, match=re.escape(str(directory))) as error:
        GgufSource(directory) if directory.suffix == ".gguf" else SafetensorsSource(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def saved_by_transformers(directory: Path) -> dict[str, torch.Tensor]:
    config, tensors = random_tensors("llama", SHAPE)
    AutoModelForCausalLM.from_config(to_hf_config(config)).save_pretrained(directory)
    assert SafetensorsSource(directory).names() == set(tensors)
    return tensors


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32]
)
@pytest.mark.parametrize("scale", ["", "_scale", "_scale_inv"])
def test_quantised_tensors_are_refused_by_name(tmp_path: Path, dtype: torch.dtype, scale: str) -> None:
    tensors = saved_by_transformers(tmp_path)
    beside = {DOWN + scale: torch.ones(1)} if scale else {}
    save_file(tensors | {DOWN: tensors[DOWN].to(dtype)} | beside, tmp_path / "model.safetensors")
    assert f"tensor {DOWN}{scale}" in refusal(tmp_path)


def test_packed_tensors_and_methods_are_refused_by_name(tmp_path: Path) -> None:
    tensors = saved_by_transformers(tmp_path)
    rest = {name: tensor for name, tensor in tensors.items() if name != DOWN}
    stem = DOWN.removesuffix("weight")
    for suffix in ("qweight", "weight_packed"):
        save_file(rest | {stem + suffix: torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
        assert f"tensor {stem}{suffix} would be left out: no quantization_config" in refusal(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "hqq"})
    assert "config.json: quantization_config: weights quantised by the method hqq" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("intermediate_size", 64, "mlp.down_proj.weight"),
        ("intermediate_size", 128, "mlp.down_proj.weight"),
        ("num_attention_heads", 2, "self_attn.o_proj.weight"),
        ("num_key_value_heads", 1, "self_attn.k_proj.weight"),
        ("head_dim", 8, "self_attn.k_proj.weight"),
        ("vocab_size", 300, HEAD),
        ("vocab_size", 400, HEAD),
        ("hidden_size", 64, HEAD),
    ],
)
def test_shapes_are_compared_before_anything_is_cut(
    tmp_path: Path, field: str, value: int, tensor: str
) -> None:
    config, tensors = random_tensors("llama", SHAPE)
    write_safetensors(tmp_path, config, tensors)
    change_config(tmp_path, **{field: value})
    message = refusal(tmp_path)
    name = tensor if tensor == HEAD else f"model.layers.0.{tensor}"
    assert f"tensor {name} has the shape {list(tensors[name].shape)}, the configuration says [" in message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_tensors_that_nobody_reads_are_refused_by_name(tmp_path: Path, family: str, name: str) -> None:
    config, tensors = random_tensors(family)
    if name in tensors:
        del tensors[name]
        expected = f"has no tensor {name}"
    else:
        tensors[name] = torch.ones(64)
        expected = f"tensor {name} would be left out: a {family} of this configuration has none of that name"
    write_safetensors(tmp_path, config, tensors)
    assert expected in refusal(tmp_path)
    if name.startswith(("model.layers.0", "model.layers.1")):
        path = tmp_path / "m.gguf"
        write_gguf(path, config, tensors)
        assert (expected.replace(name, gguf_name(name)) if name in tensors else expected) in refusal(path)


def test_a_configuration_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    change_config(tmp_path, num_hidden_layers=1)
    assert "tensor model.layers.1." in refusal(tmp_path)


def test_what_is_known_to_be_harmless_is_left_out(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write_safetensors(tmp_path, config, tensors | extra)
    assert SafetensorsSource(tmp_path).names() == set(tensors)


@torch.inference_mode()
@pytest.mark.parametrize("head", ["its own", "equal", "alone"])
def test_a_head_beside_tied_embeddings_is_taken_as_transformers_takes_it(tmp_path: Path, head: str) -> None:
    config, tensors = random_tensors("llama", "tied=1")
    embedding = tensors[EMBEDDING]
    tensors[HEAD] = embedding.flip(0).contiguous() if head == "its own" else embedding.clone()
    if head == "alone":
        del tensors[EMBEDDING]
    write_safetensors(tmp_path, config, tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = SafetensorsSource(tmp_path)
    assert ["lm_head.weight is used" in str(warning.message) for warning in caught] == [True] * (
        head == "its own"
    )
    assert source.config == replace(config, tied_embeddings=head != "its own")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    name = EMBEDDING if source.config.tied_embeddings else HEAD
    assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), theirs.lm_head.weight)
    assert torch.equal(source.read(EMBEDDING, EVERY, EVERY, torch.float32), theirs.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map must be an object, got nothing"),
        ({"weight_map": []}, "weight_map must be an object"),
        ({"weight_map": {"a": 5}}, "weight_map must give the name of a file"),
        ({"weight_map": {"a": "../a.safetensors"}}, "weight_map must give the name of a file"),
        ({"weight_map": {}}, "has no .safetensors file"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, index: object, message: str) -> None:
    write_safetensors(tmp_path, *random_tensors("llama"), num_files=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "must hold an object for each tensor"),
        ({"a": 5}, "must hold an object for each tensor"),
        ({"a": {}}, "tensor a: shape must be a list of integers, got nothing"),
        ({"a": {"shape": [2], "data_offsets": [4, 0], "dtype": "F32"}}, "tensor a: data_offsets must be"),
        ({"a": {"shape": [2], "data_offsets": [0, 4], "dtype": "F32"}}, "has 4 bytes, which do not fit"),
        (
            {"a": {"shape": [2], "data_offsets": [8, 16], "dtype": "F32"}},
            "does not begin where the one before",
        ),
        ({"a": {"shape": [2], "data_offsets": [0, 8], "dtype": 7}}, "tensor a: dtype must be a text, got 7"),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path: Path, header: object, message: str) -> None:
    write_safetensors(tmp_path, *random_tensors("llama"))
    data = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    assert message in refusal(tmp_path)


def test_an_adapter_and_a_tensor_in_two_files_are_refused(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors, num_files=2)
    save_file({DOWN: tensors[DOWN]}, tmp_path / "model-00001-of-00002.safetensors")
    first = tmp_path / "model-00002-of-00002.safetensors"
    save_file({DOWN: tensors[DOWN]}, first)
    with pytest.raises(ValueError, match=f"tensor {DOWN} is in .*00001.* and in .*00002"):
        SafetensorsSource(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(tmp_path)


def split_gguf(directory: Path, num_parts: int, **changes: Any) -> list[Path]:
    """A tiny llama in parts, as llama.cpp's gguf-split writes them: the metadata in the first."""
    config, tensors = random_tensors("llama")
    names = sorted(tensors)
    paths = []
    for i in range(num_parts):
        path = directory / f"m-{i + 1:05}-of-{num_parts:05}.gguf"
        part = {name: tensors[name] for name in names[i::num_parts]}
        split = {"split.no": i, "split.count": num_parts, "split.tensors.count": len(tensors)} | changes
        if i == 0:
            write_gguf(path, config, part, extra=split)
        else:
            writer = gguf.GGUFWriter(path, "llama")
            for key, value in split.items():
                writer.add_uint32(key, value)
            for name, tensor in part.items():
                values = tensor.numpy()
                if "q_proj" in name or "k_proj" in name:
                    values = permuted(values, config.num_heads if "q_proj" in name else config.num_kv_heads)
                writer.add_tensor(gguf_name(name), values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        paths.append(path)
    return paths


def test_a_split_gguf_is_read_whichever_part_is_named(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    paths = split_gguf(tmp_path, 3)
    for named in (*paths, tmp_path):
        source = GgufSource(resolve(str(named), tmp_path, silent, "target.model").path)
        assert source.config == config
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), tensor)
    ids = torch.tensor([3, 1])
    assert torch.equal(source.read_rows(EMBEDDING, ids, torch.float32), tensors[EMBEDDING][ids])
    paths[1].unlink()
    assert "lacks m-00002-of-00003.gguf (1 of 3 parts missing)" in refusal(paths[2])


def test_a_split_gguf_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    paths = split_gguf(tmp_path, 2, **{"split.tensors.count": 99})
    assert "the 2 parts have 21 of 99 tensors" in refusal(paths[0])
    paths[1].write_bytes(paths[0].read_bytes())
    assert "says that it is part 0 of 2" in refusal(paths[1])
    alone = paths[0].rename(tmp_path / "alone.gguf")
    assert "it must be named NAME-0000N-of-00002.gguf" in refusal(alone)


def test_tensors_are_handed_out_as_they_are_stored(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama", SHAPE)
    write_safetensors(tmp_path, config, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    stored = SafetensorsSource(tmp_path).read_stored(DOWN, slice(3, 70), slice(8, 96))
    assert (stored.format, stored.data.dtype, dict(stored.scales)) == ("BF16", torch.bfloat16, {})
    assert torch.equal(stored.data, tensors[DOWN].bfloat16()[3:70, 8:96])


@pytest.mark.parametrize("rows", [(0, 128), (32, 64), (5, 71)])
def test_blocks_of_gguf_are_handed_out_in_the_order_of_hugging_face(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    write_gguf(tmp_path / "m.gguf", *random_tensors("llama", SHAPE), gguf.GGMLQuantizationType.Q8_0)
    source = GgufSource(tmp_path / "m.gguf")
    query = "model.layers.0.self_attn.q_proj.weight"
    stored = source.read_stored(query, slice(*rows), slice(32, 96))
    assert stored.format == "Q8_0"
    values = gguf.dequantize(stored.data.numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = source.read(query, slice(*rows), slice(32, 96), torch.float32)
    assert torch.equal(torch.from_numpy(values), expected)


def test_types_that_gguf_cannot_convert_are_refused(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    data = (tmp_path / "m.gguf").read_bytes()
    name = gguf_name(DOWN).encode()
    at = data.index(name) + len(name) + 4 + 2 * 8
    integers = gguf.GGMLQuantizationType.I32.to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data[:at] + integers + data[at + 4 :])
    assert f"tensor {name.decode()} is stored as I32, which cannot be read" in refusal(tmp_path / "m.gguf")
