"""Each rank reads its bytes and no others, by several threads, and takes little more memory than they do."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.workers.model.loader import WeightLoader, ignore_bytes, load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.sizes import weight_bytes
from outrider.workers.weights import reader
from outrider.workers.weights.fields import read_json
from outrider.workers.weights.hf_directory import INDEX
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.shipped import shipped_models
from support import sparse_checkpoint
from support.models import random_tensors, write_safetensors
from support.sparse_checkpoint import write_sparse

CPU = torch.device("cpu")
FP8_405B = "meta-llama/Llama-3.1-405B-Instruct-FP8"


class Reads:
    """Bytes that are read from files, and the threads that read them."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
            self.threads.add(threading.current_thread().name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    counted, preadv = Reads(), os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        counted.add(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return counted


def config_of_405b(**changes: Any) -> dict[str, Any]:
    """config.json of the 405B in FP8, its last layer's format with it."""
    config = {**read_json(shipped_models()[FP8_405B])["config"], **changes}
    last = config["num_hidden_layers"] - 1
    quantization = dict(config["quantization_config"])
    plain = [f"model.layers.{i}.self_attn" for i in range(1, last)]
    quantization["modules_to_not_convert"] = ["model.layers.0", f"model.layers.{last}", "lm_head", *plain]
    return {**config, "quantization_config": quantization}


def small_405b() -> dict[str, Any]:
    """In a sixty-fourth of its width."""
    sizes = {"hidden_size": 256, "intermediate_size": 832, "num_attention_heads": 16, "vocab_size": 2004}
    return config_of_405b(num_hidden_layers=4, head_dim=16, bos_token_id=None, eos_token_id=None, **sizes)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_each_rank_reads_what_it_keeps_and_no_more(size: int, tmp_path: Path, reads: Reads) -> None:
    write_sparse(tmp_path, small_405b(), 1 << 20)
    source = SafetensorsSource(tmp_path)
    for rank in range(size):
        plan = ShardPlan(source.config, rank, size)
        reads.num_bytes, reported = 0, []
        load_weights(plan, source, torch.bfloat16, CPU, False, reported.append)
        assert reads.num_bytes == sum(reported) == weight_bytes(plan, torch.bfloat16).total


def test_several_threads_read_a_matrix_and_each_part_is_in_its_place(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PART_BYTES", 1 << 10)
    config, tensors = random_tensors("llama", "hidden_size=256&intermediate_size=512&vocab_size=500")
    write_safetensors(tmp_path, config, tensors)
    source = SafetensorsSource(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    reads.threads.clear()
    part = source.read(name, slice(None), slice(100, 300), torch.float32)
    assert torch.equal(part, tensors[name][:, 100:300])
    assert len(reads.threads) > 1
    out = torch.empty(256, 512, dtype=torch.bfloat16)
    source.read_into(name, slice(None), slice(None), out)
    assert torch.equal(out, tensors[name].bfloat16())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    source = SafetensorsSource(tmp_path)

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*model\.safetensors'"):
        source.read("model.norm.weight", slice(None), slice(None), torch.float32)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_sparse(tmp_path, small_405b(), 1 << 20)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    second = files[1]
    whole = second.read_bytes()
    for harm, message in (
        (whole[:-1], r"model-00002.* is truncated"),
        (whole[:5], r"model-00002.* ends before byte 8: the file is truncated"),
        (b"\xff" * len(whole), r"model-00002.* is not a safetensors file: its header would take"),
        (whole[:8] + b"{{" + whole[10:], r"model-00002.* is not a safetensors file"),
        (files[2].read_bytes(), r"tensor .* is in .*model-00002.* and in .*model-00003"),
    ):
        second.write_bytes(harm)
        with pytest.raises(ValueError, match=message):
            SafetensorsSource(tmp_path)
    second.write_bytes(whole)
    weight_map = read_json(tmp_path / INDEX)["weight_map"]
    name = next(name for name, file in weight_map.items() if file == second.name)
    renamed = whole.replace(name.encode(), name.encode()[:-1] + b"X")
    second.write_bytes(renamed)
    with pytest.raises(ValueError, match=rf"{second.name} lacks tensor {name}, which .* says is in it"):
        SafetensorsSource(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=rf"lacks {second.name} \(1 of {len(files)} weight files missing\)"):
        SafetensorsSource(tmp_path)


def test_the_405b_is_opened_and_a_rank_reads_its_part_of_a_layer(tmp_path: Path, reads: Reads) -> None:
    """487 GB in files that take no room: those of the checkpoint, in size and number."""
    total = write_sparse(tmp_path, config_of_405b(), 4_800_000_000)
    assert total == pytest.approx(487e9, rel=0.001)
    source = SafetensorsSource(tmp_path)
    plan = ShardPlan(source.config, 3, 8)
    header_bytes = reads.num_bytes
    assert header_bytes < 1 << 20
    layer = WeightLoader(plan, source, torch.bfloat16, CPU, False, ignore_bytes).layer(1)
    assert layer.qkv.out_features == 18 * 128
    share = weight_bytes(plan, torch.bfloat16)
    assert reads.num_bytes - header_bytes == pytest.approx((share.attention + share.mlp) / 126, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_of_a_wide_405b_takes_its_share_and_little_more(rank: int, tmp_path: Path) -> None:
    """Of four layers as wide as the 405B's: 22 GB, of which a rank keeps 2.8. The largest matrix is put together
    beside what is there."""
    write_sparse(tmp_path, config_of_405b(num_hidden_layers=4), 4_800_000_000)
    command = [sys.executable, sparse_checkpoint.__file__, str(tmp_path), str(rank), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(done.stdout)
    plan = ShardPlan(SafetensorsSource(tmp_path).config, rank, 8)
    share = weight_bytes(plan, torch.bfloat16).total
    assert found["read"] == share
    assert found["peak"] - found["before"] < 1.15 * share
