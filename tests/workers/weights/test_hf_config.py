from typing import Any

import pytest
from transformers import (
    AutoConfig,
    LlamaConfig,
    MellumConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from outrider.workers.weights.config import ModelConfig, Rope, RoutedMlp, to_hf_config
from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.hf_config import model_config_from_hf
from support.released_mellum import MELLUM_2
from support.tensor_source import ROPES, tiny_config

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
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
WINDOWS = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


def test_reads_a_config_of_transformers_4() -> None:
    config = model_config_from_hf({**LLAMA, "rope_scaling": LLAMA3})
    parameters = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    assert config.layers[1].rope == Rope(500000.0, "llama3", parameters)
    assert config.head_dim == 16
    assert config.eos_token_ids == (5, 6)
    assert config.bos_token_ids == (1,)


def test_reads_a_config_of_transformers_5() -> None:
    raw = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 1e6}}
    assert model_config_from_hf(raw).layers[0].rope.theta == 1e6


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("tied", [False, True])
def test_survives_the_way_through_transformers(architecture: str, rope: Rope, tied: bool) -> None:
    windows = (0, 48) if FAMILIES[architecture].has_windows else (0, 0)
    config = tiny_config(architecture, rope=rope, tied_embeddings=tied, windows=windows)
    assert model_config_from_hf(to_hf_config(config).to_dict()) == config


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_every_field_that_transformers_writes_is_known(config_class: type[PreTrainedConfig]) -> None:
    written = config_class(architectures=[config_class.__name__.replace("Config", "ForCausalLM")]).to_dict()
    assert model_config_from_hf(written).num_layers == 32


def described(config: ModelConfig) -> list[object]:
    """What of a model follows from optional fields."""
    return [config.num_kv_heads, config.head_dim, config.max_context, config.rms_norm_eps, config.layers]


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not FAMILIES[name].has_layer_kinds])
@pytest.mark.parametrize(
    "change",
    [
        *(
            {key: ...}
            for key in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        ),
        {"hidden_act": "swish"},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e4},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 512},
        {"rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": None, "attention_factor": 1.5}},
        {"rope_scaling": {**YARN, "truncate": False}},
        {"use_sliding_window": False, "sliding_window": None},
        {"pretraining_tp": 2, "torch_dtype": "bfloat16", "temperature": 0.5, "id2label": {"0": "a"}},
    ],
    ids=str,
)
def test_what_is_read_is_what_transformers_reads(model_type: str, change: dict[str, Any]) -> None:
    raw: dict[str, Any] = {**LLAMA, "model_type": model_type, "num_attention_heads": 32, **change}
    raw = {key: value for key, value in raw.items() if value is not ...}
    raw["hidden_size"] = 128
    theirs = AutoConfig.for_model(**{key: dict(v) if isinstance(v, dict) else v for key, v in raw.items()})
    config = model_config_from_hf(raw)
    assert described(config) == described(model_config_from_hf(theirs.to_dict()))
    head_dim = getattr(theirs, "head_dim", 128 // 32)
    assert (config.num_kv_heads, config.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (config.rms_norm_eps, config.max_context) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert config.layers[0].rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.tied_embeddings == theirs.tie_word_embeddings


def test_the_released_mellum_2() -> None:
    config = model_config_from_hf(MELLUM_2)
    yarn = {k: v for k, v in MELLUM_2["rope_parameters"]["full_attention"].items() if "rope" not in k}
    assert [layer.window for layer in config.layers] == [1024, 1024, 1024, 0] * 7
    assert {layer.mlp for layer in config.layers} == {RoutedMlp(64, 8, 896, renormalised=True)}
    assert config.layers[0].rope == Rope(500000.0)
    assert config.layers[3].rope == Rope(500000.0, "yarn", yarn)
    assert (config.qk_norm, config.tied_embeddings, config.eos_token_ids) == (True, False, (28,))
    assert model_config_from_hf(MellumConfig(**MELLUM_2).to_dict()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ...},
        {"rope_parameters": ...},
        {"use_sliding_window": False},
        {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 25},
        {"norm_topk_prob": False},
        {"num_key_value_heads": ..., "max_position_embeddings": ..., "sliding_window": ..., "head_dim": ...},
        {"num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_mellum_is_read_as_transformers_reads_it(change: dict[str, Any]) -> None:
    raw = {key: value for key, value in {**MELLUM_2, **change}.items() if value is not ...}
    config, theirs = model_config_from_hf(raw), MellumConfig(**raw)
    assert described(config) == described(model_config_from_hf(theirs.to_dict()))
    windows = [theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
    assert [layer.window for layer in config.layers] == windows
    assert [isinstance(layer.mlp, RoutedMlp) for layer in config.layers] == [
        kind == "sparse" for kind in theirs.mlp_layer_types
    ]
    assert config.layers[3].rope.theta == theirs.rope_parameters[theirs.layer_types[3]]["rope_theta"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": ...}, "num_experts must be a positive integer, got nothing"),
        ({"num_local_experts": 32}, "num_experts and num_local_experts must be the same"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok must be an integer from 1 to 64"),
        ({"sliding_window": None}, "sliding_window must be a positive integer, got null"),
        (
            {"layer_types": ["chunked_attention"] * 28},
            "layer_types must be 28 of full_attention, sliding_att",
        ),
        ({"rope_theta": 1e4}, "rope_theta is not known here"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is not known here"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.[a-z]*_attention must be an object"),
        ({"attention_bias": True}, "attention_bias must be false or null"),
    ],
    ids=str,
)
def test_what_mellum_may_not_ask_for_is_named(change: dict[str, Any], message: str) -> None:
    raw = {key: value for key, value in {**MELLUM_2, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(raw)


def test_windows_are_those_of_transformers() -> None:
    for change in (
        WINDOWS,
        {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
        {**WINDOWS, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": 64},
    ):
        raw = {**LLAMA, "model_type": "qwen2", **change}
        theirs = Qwen2Config(**raw)
        expected = [64 if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
        assert [layer.window for layer in model_config_from_hf(raw).layers] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type must be one of llama, qwen2, qwen3, mellum, got 'gemma2'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "model_type must be one of .*, got 'mistral'"),
        ({"sliding_window": 4096}, "sliding_window must be null"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be .'LlamaForCausalLM'."),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts"),
        ({"auto_map": {"AutoModelForCausalLM": "my.Model"}}, "auto_map must be {} or null"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, swish, got 'gelu'"),
        ({"hidden_act": None}, "hidden_act must be one of silu, swish, got null"),
        ({"attention_bias": True}, "attention_bias must be false or null"),
        ({"attention_bias": 0}, "attention_bias must be false or null"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got true"),
        (
            {"num_hidden_layers": 2**40},
            "num_hidden_layers must be an integer from 1 to 10000, got 1099511627776",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 1, got 1000"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive integer, got 64.0"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got null"),
        ({"hidden_size": 66}, "hidden_size must be a multiple of num_attention_heads"),
        ({"head_dim": "16"}, "head_dim must be a positive integer, got '16'"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer, got 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive integer, got -1"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number from 0 to 1, got null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, got nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"eos_token_id": "2"}, "eos_token_id must be token ids .integers from 0 to 319., got '2'"),
        ({"eos_token_id": [2, 320]}, "eos_token_id must be token ids"),
        ({"eos_token_id": True}, "eos_token_id must be token ids"),
        ({"rope_theta": 0}, "rope_theta must be a number above 1, got 0"),
        ({"rope_theta": None}, "rope_theta must be a number above 1, got null"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 1, got inf"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, linear",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            "rope_scaling.type must be one of default",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number of at least 1, got nothing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "factor must be a number of at least 1, got 0.5",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "high_freq_factor must be above"),
        ({"rope_scaling": {**LLAMA3, "extra": 1}}, "rope_scaling.extra is not known here"),
        ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast must be above rope_scaling.beta_slow"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": YARN},
            "rope_scaling and rope_parameters must be the same",
        ),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters.full_attention is not known here"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 or null"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1 or null"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "without use_sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 2 of full_attention"),
        ({"sliding_window": 64}, "sliding_window must be null"),
        (WINDOWS | {"sliding_window": None}, "use_sliding_window must be false for llama"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping must be null"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is not known here"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config must be {} or null"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by the method hqq cannot be read"),
        ({"quantization_config": {"load_in_8bit": True}}, r"bitsandbytes \(load_in_8bit\)"),
        ({"quantization_config": {}}, "the method without a name cannot be read"),
        ({"compression_config": {"quant_method": "quark"}}, "method quark"),
    ],
    ids=str,
)
def test_what_it_does_not_know_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model_config_from_hf({**LLAMA, **change})
    assert "\n" not in str(error.value)
