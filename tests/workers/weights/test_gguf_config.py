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

from outrider.workers.weights.config import Rope
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
    rope = source.config.layers[0].rope
    assert (rope.theta, rope.kind) == (500000.0, "llama3")
    assert rope.parameters == {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert source.names() == set(tensors)


def test_divisors_of_another_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="does not follow the Llama 3 rule"):
        llama3_scaling(np.linspace(1, 8, 32), 64, 500000.0)


def test_linear_and_yarn(tmp_path: Path) -> None:
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert source_with(tmp_path, linear).config.layers[0].rope == Rope(
        kind="linear", parameters={"factor": 4.0}
    )
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 1024,
    }
    rope = source_with(tmp_path, yarn, "qwen2").config.layers[0].rope
    assert (rope.kind, rope.parameters["factor"]) == ("yarn", 4.0)
    assert rope.parameters["original_max_position_embeddings"] == 1024
    assert rope.parameters["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)


_RELEASED_YARN = {
    "mellum.rope.freq_base": 500000.0,
    "mellum.rope.scaling.type": "yarn",
    "mellum.rope.scaling.factor": 16.0,
    "mellum.rope.scaling.original_context_length": 256,
    "mellum.rope.scaling.yarn_attn_factor": 1.2772588722239782,
    "mellum.rope.scaling.yarn_beta_fast": 32.0,
    "mellum.rope.scaling.yarn_beta_slow": 1.0,
}


def test_mellum_stretches_positions_in_full_layers_only(tmp_path: Path) -> None:
    options = "num_layers=5&window=20&num_experts=3&expert_size=32&rope_theta=500000"
    config, tensors = random_tensors("mellum", options)
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=_RELEASED_YARN)
    read = GgufSource(tmp_path / "m.gguf")
    assert [layer.window for layer in read.config.layers] == [20, 20, 20, 0, 20]
    assert {layer.mlp for layer in read.config.layers} == {config.layers[0].mlp}
    plain, stretched = read.config.layers[0].rope, read.config.layers[3].rope
    assert plain == Rope(500000.0)
    assert (stretched.theta, stretched.kind) == (500000.0, "yarn")
    assert stretched.parameters["attention_factor"] == pytest.approx(1.2772588722239782)
    assert read.names() == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.read(name, slice(None), slice(None), torch.float32), tensor), name


@pytest.mark.parametrize(
    ("extra", "windows"),
    [
        ({"mellum.attention.sliding_window_pattern": 2}, [9, 0, 9, 0, 9]),
        ({"mellum.attention.sliding_window_pattern": 0}, [9, 9, 9, 9, 9]),
        ({"mellum.attention.sliding_window": 0}, [0, 0, 0, 0, 0]),
        ({"mellum.rope.freq_base_swa": 20000.0}, [9, 9, 9, 0, 9]),
    ],
    ids=str,
)
def test_mellum_windows_of_other_files(tmp_path: Path, extra: dict[str, Any], windows: list[int]) -> None:
    config, tensors = random_tensors("mellum", "num_layers=5&window=9")
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
    layers = GgufSource(tmp_path / "m.gguf").config.layers
    assert [layer.window for layer in layers] == windows
    assert layers[0].rope.theta == extra.get("mellum.rope.freq_base_swa", 10000.0)
    assert layers[3].rope.theta == 10000.0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mellum.expert_gating_func": 2}, "expert_gating_func must be 1 .softmax., got 2"),
        ({"mellum.expert_shared_count": 1}, "expert_shared_count must be 0 or null"),
        (
            {**_RELEASED_YARN, "mellum.rope.scaling.yarn_attn_factor": 1.1},
            "yarn_attn_factor must be 1 or 1.277259, got 1.1",
        ),
    ],
    ids=str,
)
def test_what_mellum_files_may_not_ask_for_is_named(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    config, tensors = random_tensors("mellum", "num_layers=3")
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
    with pytest.raises(ValueError, match=message):
        GgufSource(tmp_path / "m.gguf")


def test_chat_end_of_turn_ends_a_text_too(tmp_path: Path) -> None:
    tokens = ["<|endoftext|>", "a", "</s>", "<|im_end|>"]
    source = source_with(tmp_path, {"tokenizer.ggml.tokens": tokens})
    assert source.config.eos_token_ids == (2, 0, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count must be 0 or null"),
        ({"llama.attention.sliding_window": 128}, "sliding_window must be 0 or the context"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count must be 16, the size of a head, got 8"),
        ({"llama.attention.value_length": 8}, "attention.value_length must be 16, the size of a head, got 8"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type must be one of none, linear, yarn"),
        ({"llama.rope.freq_base": 0.0}, "rope.freq_base must be a number above 1, got 0.0"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale must be 0 or 1 or null"),
        ({"llama.attention.causal": False}, "llama.attention.causal must be true or null"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale is not known here"),
        ({"qwen2.residual_scale": 0.5}, "qwen2.residual_scale is not known here"),
        ({"adapter.type": "lora"}, "adapter.type is not known here"),
        ({"general.type": "mmproj"}, "general.type must be 'model' or null"),
        ({"general.alignment": "x"}, "general.alignment must be a positive integer, got 'x'"),
        ({"tokenizer.ggml.eot_token_id": 320}, "eot_token_id must be token ids .integers from 0 to 319."),
    ],
)
def test_unsupported_features_are_named(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_with(tmp_path, extra)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    write_gguf(tmp_path / "m.gguf", replace(config, architecture="gemma3"), tensors)
    with pytest.raises(
        ValueError, match=r"general\.architecture must be one of llama, qwen2, qwen3, mellum, got 'gemma3'"
    ):
        GgufSource(tmp_path / "m.gguf")
