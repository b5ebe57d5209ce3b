import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from outrider.workers.model.rope import RotaryEmbedding, rope_frequencies
from outrider.workers.weights.config import RopeScaling, model_config_from_hf, to_hf_config
from support.tensor_source import tiny_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": [5, 6],
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
SCALINGS = [
    RopeScaling(),
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(
        kind="llama3", factor=8.0, original_max_context=256, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    RopeScaling(kind="yarn", factor=4.0, original_max_context=256, attention_factor=1.1386),
    RopeScaling(kind="yarn", factor=4.0, original_max_context=256, truncate=False, beta_fast=16.0),
]


def test_reads_a_config_of_transformers_4() -> None:
    config = model_config_from_hf({**LLAMA, "rope_scaling": LLAMA3})
    assert config.rope_theta == 500000.0
    assert config.rope_scaling.kind == "llama3"
    assert config.rope_scaling.factor == 8.0
    assert config.rope_scaling.original_max_context == 1024
    assert config.head_dim == 16
    assert config.eos_token_ids == (5, 6)
    assert config.bos_token_ids == (1,)


def test_reads_a_config_of_transformers_5() -> None:
    raw = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 1e6}}
    assert model_config_from_hf(raw).rope_theta == 1e6


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
@pytest.mark.parametrize("tied", [False, True])
def test_survives_the_way_through_transformers(architecture: str, scaling: RopeScaling, tied: bool) -> None:
    config = tiny_config(architecture, rope_scaling=scaling, tied_embeddings=tied)
    assert model_config_from_hf(to_hf_config(config).to_dict()) == config


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
def test_frequencies_are_those_of_transformers(scaling: RopeScaling) -> None:
    config = tiny_config(rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(to_hf_config(config))
    assert torch.equal(rope_frequencies(config), theirs.inv_freq)
    positions = torch.tensor([0, 1, 17, 900])
    cos, sin = RotaryEmbedding(config, torch.float32, torch.device("cpu"))(positions)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, their_cos[0, :, :8])
    torch.testing.assert_close(sin, their_sin[0, :, :8])


def test_yarn_attention_factor_is_derived_when_not_stated() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    scaling = model_config_from_hf({**LLAMA, "rope_scaling": rope}).rope_scaling
    assert scaling.attention_factor == pytest.approx(1.1386294)
    deepseek = {**rope, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = model_config_from_hf({**LLAMA, "rope_scaling": deepseek}).rope_scaling
    assert scaling.attention_factor == pytest.approx(1.1386294 / 1.0693147)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type must be one of llama, qwen2, qwen3, got 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, linear",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window layers are not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding-window layers are not supported",
        ),
    ],
)
def test_what_it_does_not_know_is_refused_in_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model_config_from_hf({**LLAMA, **change})
    assert "\n" not in str(error.value)


def test_an_unused_sliding_window_is_fine() -> None:
    raw = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    assert model_config_from_hf(raw).qkv_bias
