import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outrider.workers.weights.config import RopeScaling
from outrider.workers.weights.gguf_config import llama3_scaling
from outrider.workers.weights.gguf_source import GgufSource
from support.models import random_tensors, write_gguf


def source_with(tmp_path: Path, extra: dict[str, Any], architecture: str = "llama") -> GgufSource:
    config, tensors = random_tensors(architecture)
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
    return GgufSource(tmp_path / "m.gguf")


def llama3_factors(theta: float, dim: int, factor: float, original: int, high: float) -> np.ndarray:
    """Divisors of the frequencies, from transformers' implementation of the rule."""
    rope = {
        "rope_theta": theta,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / scaled.double()).float().numpy()


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "original", "high"),
    [
        (500000.0, 128, 8.0, 8192, 4.0),  # Llama 3.1
        (500000.0, 64, 32.0, 8192, 4.0),  # Llama 3.2 1B
        (10000.0, 128, 4.0, 2048, 8.0),
    ],
)
def test_llama3_parameters_are_recovered(
    theta: float, dim: int, factor: float, original: int, high: float
) -> None:
    factors = llama3_factors(theta, dim, factor, original, high)
    scaling = llama3_scaling(factors, dim, theta)
    assert scaling["factor"] == factor
    rebuilt = llama3_factors(
        theta, dim, factor, scaling["original_max_position_embeddings"], scaling["high_freq_factor"]
    )
    assert np.abs(rebuilt / factors - 1).max() < 1e-3
    assert scaling["original_max_position_embeddings"] == pytest.approx(original, rel=1e-3)


def test_llama3_files_carry_divisors_in_a_tensor(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama", "rope_theta=500000&head_dim=64")
    factors = llama3_factors(500000.0, 64, 32.0, 8192, 4.0)
    write_gguf(tmp_path / "m.gguf", config, tensors, ready={"rope_freqs.weight": (factors, Kind.F32)})
    source = GgufSource(tmp_path / "m.gguf")
    scaling = RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert source.config == replace(config, rope_scaling=scaling)
    assert source.names() == set(tensors)


def test_divisors_of_another_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="does not follow the Llama 3 rule"):
        llama3_scaling(np.linspace(1, 8, 32), 64, 500000.0)


def test_linear_and_yarn(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert source_with(tmp_path, linear).config.rope_scaling == RopeScaling("linear", 4.0)
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 1024,
    }
    scaling = source_with(tmp_path, yarn, "qwen2").config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_context) == ("yarn", 4.0, 1024)
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_chat_end_of_turn_ends_a_text_too(tmp_path: Path) -> None:
    tokens = ["<|endoftext|>", "a", "</s>", "<|im_end|>"]
    source = source_with(tmp_path, {"tokenizer.ggml.tokens": tokens})
    assert source.config.eos_token_ids == (2, 0, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.sliding_window": 128}, "sliding window"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of 16"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "rope scaling longrope"),
    ],
)
def test_unsupported_features_are_named(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_with(tmp_path, extra)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_gguf(tmp_path / "m.gguf", replace(config, architecture="gemma3"), tensors)
    with pytest.raises(ValueError, match="architecture gemma3; supported in GGUF: llama, qwen2, qwen3"):
        GgufSource(tmp_path / "m.gguf")
