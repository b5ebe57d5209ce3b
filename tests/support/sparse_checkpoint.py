"""Checkpoints of any size that take no room: files of safetensors whose data is a hole, which reads as zeros.

`python sparse_checkpoint.py FOLDER RANK SIZE` loads a rank of one and says in JSON what it has read and taken.
"""

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import torch

from outrider.workers.memory import peak_memory_bytes
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.hf_directory import INDEX
from outrider.workers.weights.safetensors_files import DTYPES
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.tensors import stored_tensors, tensor_shapes


def write_sparse(directory: Path, config: dict[str, Any], file_bytes: int) -> int:
    """A folder with config.json, an index and files of about this size. Returns the bytes of all tensors."""
    model = model_config_from_hf(config)
    tensors = {
        name: (stored.formats[0] if stored.formats else "BF16", stored.shapes[0])
        for whole, shape in tensor_shapes(model).items()
        for name, stored in stored_tensors(model, whole, shape).items()
    }
    files: list[dict[str, Any]] = [{}]
    end = total = 0
    for name, (kind, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[kind].itemsize
        if end + size > file_bytes and files[-1]:
            files.append({})
            end = 0
        files[-1][name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end, total = end + size, total + size
    weight_map = {}
    for number, header in enumerate(files):
        file = directory / f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        text = json.dumps(header).encode()
        data_bytes = max(info["data_offsets"][1] for info in header.values())
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + data_bytes)
        weight_map |= dict.fromkeys(header, file.name)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def load_rank(directory: Path, rank: int, size: int) -> dict[str, int]:
    """Loads a rank; bytes of it, and of this process's highest memory before and after."""
    source = SafetensorsSource(directory)
    plan, before = ShardPlan(source.config, rank, size), peak_memory_bytes()
    read: list[int] = []
    weights = load_weights(
        plan, source, torch.bfloat16, torch.device("cpu"), packed=False, progress=read.append
    )
    assert len(weights.layers) == source.config.num_layers
    return {"read": sum(read), "before": before, "peak": peak_memory_bytes()}


if __name__ == "__main__":
    print(json.dumps(load_rank(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
