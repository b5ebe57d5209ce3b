"""GGUF files: quantised blocks on disk, plain tensors under Hugging Face names in memory.

Two things differ from safetensors: a row is stored as quantisation blocks (32 or 256 columns each), and the
converter of llama.cpp reorders the rows of q and k of the Llama architecture inside each head, because ggml
rotates neighbouring pairs where transformers rotates halves; they are put back here.
Converter: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (`LlamaModel.permute`)
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_from_byte_shape

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.data_file import DataFile
from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.gguf_config import ROPE_FACTORS, model_config_from_gguf
from outrider.workers.weights.gguf_header import GgufTensor, read_gguf_header
from outrider.workers.weights.quantization import StoredTensor
from outrider.workers.weights.source import (
    CHUNK_ELEMENTS,
    Stored,
    bounds,
    read_rectangle,
    unknown_tensor,
)
from outrider.workers.weights.tensors import (
    EMBEDDING,
    HEAD,
    FoundTensor,
    check_tensors,
    expert_prefix,
    tensor_shapes,
)

_TOP_LEVEL = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
# The matrices of all experts of a layer, one behind the other.
_OF_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# Read into the configuration, or derived from it: no weights of the model.
_NOT_WEIGHTS = re.compile(rf"{re.escape(ROPE_FACTORS)}|blk\.\d+\.attn_rot_embd\.weight")
_PAGE_BYTES = 4096
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufSource:
    """A GGUF file or all parts of a split one (any type that the gguf package can dequantise).

    Opening it reads the headers and compares the tensors with the metadata: see `check_tensors`.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self.path = path
        self._config = model_config_from_gguf(header)
        tensors = [t for t in header.tensors.values() if not _NOT_WEIGHTS.fullmatch(t.name)]
        self._tensors = {name: part for tensor in tensors for name, part in _under_hugging_face_names(tensor)}
        readable = {kind: _can_dequantize(kind) for kind in {tensor.type for tensor in tensors}}
        try:
            check_tensors(
                self._config.architecture,
                {name: StoredTensor((shape,), None) for name, shape in tensor_shapes(self._config).items()},
                {
                    name: FoundTensor(tensor.name, tensor.shape, tensor.type.name, readable[tensor.type])
                    for name, tensor in self._tensors.items()
                },
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._files = {part: DataFile(part) for part in {tensor.path for tensor in tensors}}
        for tensor in tensors:
            self._files[tensor.path].require(tensor.offset + tensor.num_bytes)
        self._is_permuted = FAMILIES[self._config.architecture].gguf_permutes

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def kind(self, name: str) -> GGMLQuantizationType:
        """The type that a tensor is stored as."""
        return self._tensor(name).type

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensor(name)
        if len(tensor.shape) == 1:
            # One row of blocks; 1-D tensors are small, so the slice is taken after reading all of it.
            vector = self._decode(tensor, (0, 1), (0, tensor.shape[0]))[0]
            if self._permuted_head_dim(name):
                vector = self._unpermute(name, vector[:, None])[:, 0]
            return vector[slice(*bounds(rows, tensor.shape[0]))].to(dtype, copy=True)
        start, stop = bounds(rows, tensor.shape[0])
        left, right = bounds(columns, tensor.shape[1])
        out = torch.empty(stop - start, right - left, dtype=dtype)
        head_dim = self._permuted_head_dim(name)
        unit = head_dim or 1
        step = max(1, CHUNK_ELEMENTS // max(1, (right - left) * unit)) * unit
        # Permutation stays inside a head, so chunks are cut at head boundaries and cover the asked rows.
        for first in range(start // unit * unit, stop, step):
            last = min(first + step, -(-stop // unit) * unit)
            values = self._decode(tensor, (first, last), (left, right))
            if head_dim:
                values = self._unpermute(name, values)
            covered = max(first, start), min(last, stop)
            out[covered[0] - start : covered[1] - start] = values[covered[0] - first : covered[1] - first]
        return out

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        """`columns` must be whole blocks. Rows of q and k are in Hugging Face's order, as everywhere."""
        tensor = self._tensor(name)
        start, stop = bounds(rows, tensor.shape[0])
        left, right = bounds(columns, tensor.shape[1])
        block, _ = GGML_QUANT_SIZES[tensor.type]
        assert (left % block, right % block) == (0, 0), (name, columns, block)
        unit = self._permuted_head_dim(name) or 1
        first, last = start // unit * unit, -(-stop // unit) * unit
        blocks = self._blocks(tensor, (first, last), (left // block, right // block))
        if self._permuted_head_dim(name):
            blocks = self._unpermute(name, blocks)
        return Stored(blocks[start - first : stop - first].contiguous(), tensor.type.name, {})

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert not self._permuted_head_dim(name), name
        tensor = self._tensor(name)
        num_rows, _ = tensor.shape
        blocks = np.empty((len(ids), tensor.row_bytes), np.uint8)
        view = blocks.reshape(-1).data
        for i, row in enumerate(ids.tolist()):
            assert 0 <= row < num_rows, (name, row)
            self._files[tensor.path].read_into(
                view[i * tensor.row_bytes : (i + 1) * tensor.row_bytes],
                tensor.offset + row * tensor.row_bytes,
            )
        return _dequantize(blocks, tensor.type).to(dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(tensor.shape) for tensor in self._tensors.values()) * dtype.itemsize

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise unknown_tensor(name, self.path)
        return self._tensors[name]

    def _decode(self, tensor: GgufTensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
        """Float32 values of a rectangle; whole blocks are read and what is outside the columns is cut off."""
        block, _ = GGML_QUANT_SIZES[tensor.type]
        first_block, last_block = columns[0] // block, -(-columns[1] // block)
        blocks = self._blocks(tensor, rows, (first_block, last_block))
        values = _dequantize(blocks.numpy(), tensor.type)
        return values[:, columns[0] - first_block * block : columns[1] - first_block * block]

    def _blocks(self, tensor: GgufTensor, rows: tuple[int, int], window: tuple[int, int]) -> torch.Tensor:
        """Blocks `window` of some rows, u8 [rows, bytes], in the order of the file."""
        _, size = GGML_QUANT_SIZES[tensor.type]
        span = window[0] * size, window[1] * size
        if tensor.row_bytes - (span[1] - span[0]) < _PAGE_BYTES:
            # What lies between the windows of two rows is in pages that are read anyway: one call, not one for each.
            whole = torch.empty(rows[1] - rows[0], tensor.row_bytes, dtype=torch.uint8)
            read_rectangle(
                self._files[tensor.path], tensor.offset, tensor.row_bytes, rows, (0, tensor.row_bytes), whole
            )
            return whole[:, span[0] : span[1]].contiguous()
        blocks = torch.empty(rows[1] - rows[0], span[1] - span[0], dtype=torch.uint8)
        read_rectangle(self._files[tensor.path], tensor.offset, tensor.row_bytes, rows, span, blocks)
        return blocks

    def _permuted_head_dim(self, name: str) -> int:
        """Rows of a head when the tensor's rows are permuted inside each head, 0 when they are in order."""
        is_rotated = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        return self._config.head_dim if self._is_permuted and is_rotated else 0

    def _unpermute(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """[num_heads * head_dim, columns]: row 2*i+s of a head goes to row s*head_dim/2+i."""
        head_dim = self._permuted_head_dim(name)
        pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
        return pairs.transpose(1, 2).reshape(values.shape)


def _dequantize(blocks: np.ndarray, tensor_type: GGMLQuantizationType) -> torch.Tensor:
    """u8 [rows, row_bytes] -> float32 [rows, columns]."""
    if tensor_type == GGMLQuantizationType.BF16:
        return torch.from_numpy(blocks).view(torch.bfloat16).float()
    # The package works on 16 rows at a time, here all in one: what it is given is small (`CHUNK_ELEMENTS`).
    values = gguf.dequantize(blocks.reshape(1, -1), tensor_type)
    return torch.from_numpy(values.reshape(quant_shape_from_byte_shape(blocks.shape, tensor_type)))


def _can_dequantize(tensor_type: GGMLQuantizationType) -> bool:
    """Whether the gguf package converts this type; tried on one block of zeros."""
    try:
        _dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor_type][1]), np.uint8), tensor_type)
    except NotImplementedError:
        return False
    return True


def _under_hugging_face_names(tensor: GgufTensor) -> list[tuple[str, GgufTensor]]:
    """The tensor under its name, or the matrix of each expert that it holds under that one's."""
    match = _LAYER_NAME.fullmatch(tensor.name)
    if match is None or match[2] not in _OF_EXPERTS or len(tensor.shape) != 3:
        return [(_hugging_face_name(tensor.name), tensor)]
    num_experts, *shape = tensor.shape
    size = tensor.num_bytes // num_experts
    return [
        (
            f"model.layers.{match[1]}.{expert_prefix(i)}{_OF_EXPERTS[match[2]]}.{match[3]}",
            replace(tensor, shape=tuple(shape), offset=tensor.offset + i * size),
        )
        for i in range(num_experts)
    ]


def _hugging_face_name(name: str) -> str:
    """Its own name for a tensor of no known part, which `check_tensors` then refuses."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        return name
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
