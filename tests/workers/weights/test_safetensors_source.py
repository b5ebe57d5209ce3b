import json
import os
from pathlib import Path

import pytest
import torch

from outrider.workers.weights.safetensors_source import SafetensorsSource
from support.models import random_tensors, write_safetensors

EVERY = slice(None)
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize("num_files", [1, 3])
def test_reads_every_tensor_of_one_or_several_files(tmp_path: Path, num_files: int) -> None:
    config, tensors = random_tensors("qwen2")
    write_safetensors(tmp_path, config, tensors, num_files)
    source = SafetensorsSource(tmp_path)
    assert source.config == config
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name, EVERY, EVERY, torch.float32), tensor)
    assert source.total_bytes(torch.bfloat16) == 2 * sum(tensor.numel() for tensor in tensors.values())


def test_slices_and_conversions(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    write_safetensors(tmp_path, config, stored)
    source = SafetensorsSource(tmp_path)
    part = source.read(GATE, slice(5, 90), slice(3, 17), torch.float32)
    assert torch.equal(part, stored[GATE][5:90, 3:17].float())
    assert torch.equal(
        source.read("model.norm.weight", slice(8, 16), EVERY, torch.bfloat16),
        stored["model.norm.weight"][8:16],
    )
    assert source.read(GATE, slice(4, 4), EVERY, torch.float32).shape == (0, 64)
    ids = torch.tensor([7, 300, 7, 0])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(source.read_rows(embedding, ids, torch.float32), stored[embedding][ids].float())


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    source = SafetensorsSource(tmp_path)
    source.read(GATE, EVERY, EVERY, torch.float32).zero_()
    assert torch.equal(source.read(GATE, EVERY, EVERY, torch.float32), tensors[GATE])


def test_only_the_covered_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    source = SafetensorsSource(tmp_path)
    counts: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(preadv(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    source.read(GATE, slice(2, 6), EVERY, torch.bfloat16)
    assert sum(counts) == 4 * 64 * 4
    counts.clear()
    source.read(GATE, slice(2, 6), slice(10, 13), torch.float32)
    assert sum(counts) == 4 * 3 * 4


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        SafetensorsSource(tmp_path)


def test_end_ids_of_the_generation_config_are_added(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert SafetensorsSource(tmp_path).config.eos_token_ids == (2, 9)


def test_a_second_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama", "tied=1")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_safetensors(tmp_path, config, tensors | copy)
    assert SafetensorsSource(tmp_path).names() == set(tensors)


def test_damage_is_one_line(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors, num_files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors \(1 of 2") as error:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        SafetensorsSource(tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="has no tensor nonsense"):
        SafetensorsSource(tmp_path).read("nonsense", EVERY, EVERY, torch.float32)
