"""What `quantization_config` comes to, and what of it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from outrider.workers.weights.config import to_hf_config
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.fp8_format import Fp8Format
from outrider.workers.weights.inputs import DynamicInputs
from outrider.workers.weights.quantization import Quantization
from outrider.workers.weights.quantization_config import read_quantization
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.scaled import ScaledMatrix, joined
from outrider.workers.weights.source import read_scaled
from support.quantised import blocks, compressed_tensors, fp8
from support.tensor_source import tiny_config

ALL = slice(None)
DOWN = "model.layers.0.mlp.down_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SCHEME = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False}
GROUP = {
    "targets": ["Linear"],
    "weights": SCHEME,
    "input_activations": {**SCHEME, "strategy": "token", "dynamic": True},
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
}


def read(described: dict[str, Any]) -> Quantization:
    found = read_quantization(Fields({"quantization_config": described}))
    assert found is not None
    return found


def with_group(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP, **changes}}}


def with_weights(**changes: Any) -> dict[str, Any]:
    return with_group(weights={**SCHEME, **changes})


def test_the_405b_leaves_attention_and_some_layers_as_they_were() -> None:
    plain = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"]
    found = read({**FBGEMM, "modules_to_not_convert": [*plain, "model.layers.1.mlp", "lm_head"]})
    form = found.format_of(DOWN)
    assert isinstance(form, Fp8Format)
    assert (form.scope, form.inputs) == ("row", DynamicInputs(bound=1200.0, least_scale=1 / (448 * 512)))
    for name in (QUERY, "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"):
        assert found.format_of(name) is None
    # Layer 1 is not layer 10 as well.
    assert found.format_of("model.layers.10.mlp.up_proj.weight") == form
    assert read(FBGEMM).format_of("lm_head.weight") is None


def test_a_name_goes_before_an_expression_and_both_before_a_class() -> None:
    tensor, blocked = (
        {**SCHEME, "strategy": "tensor"},
        {**SCHEME, "strategy": "block", "block_structure": [2, 4]},
    )
    groups = {
        "classes": GROUP,
        "expressions": {**GROUP, "targets": ["re:.*mlp.*"], "weights": tensor},
        "names": {"targets": [DOWN.removesuffix(".weight")], "weights": blocked, "input_activations": None},
    }
    found = read({**COMPRESSED, "config_groups": groups, "ignore": ["re:.*k_proj", "lm_head"]})

    def scope(name: str) -> str:
        form = found.format_of(name)
        assert isinstance(form, Fp8Format)
        return form.scope

    assert [scope(name) for name in (QUERY, DOWN.replace("0", "1"), DOWN)] == ["row", "tensor", "block"]
    assert found.format_of(QUERY.replace("q_proj", "k_proj")) is None


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_schemes_that_compressed_tensors_has_names_for_are_read(preset: str) -> None:
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    described = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    assert read(json.loads(json.dumps(described.to_dict()))).format_of(DOWN) is not None


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({**FBGEMM, "activation_scale_ub": 0}, "activation_scale_ub must be a number above 0"),
        ({**FBGEMM, "modules_to_not_convert": ["(("]}, "must hold regular expressions"),
        ({**FBGEMM, "other": 1}, "quantization_config.other is not known here"),
        (
            {**FP8, "activation_scheme": "static"},
            "activation_scheme must be dynamic where weights have blocks",
        ),
        ({**FP8, "scale_fmt": "ue8m0"}, "scale_fmt must be 'float'"),
        ({**FP8, "expert_dtype": "fp4"}, "expert_dtype must be 'fp8'"),
        ({**FP8, "fmt": "e5m2"}, "fmt must be e4m3"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size must be two integers"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "format must be one of float-quantized"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config must be {} or null"),
        ({**COMPRESSED, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config must be {}"),
        (
            {**COMPRESSED, "quantization_status": "calibration"},
            "quantization_status must be one of compressed",
        ),
        ({**COMPRESSED, **with_weights(type="int")}, "group_0.weights.type must be float"),
        ({**COMPRESSED, **with_weights(num_bits=4)}, "group_0.weights.num_bits must be 8"),
        (
            {**COMPRESSED, **with_weights(strategy="group")},
            "weights.strategy must be one of tensor, channel, block",
        ),
        ({**COMPRESSED, **with_weights(symmetric=False)}, "weights.symmetric must be true"),
        ({**COMPRESSED, **with_group(output_activations=SCHEME)}, "output_activations must be null"),
        ({**COMPRESSED, "kv_cache_scheme": {**SCHEME}}, "kv_cache_scheme.strategy must be tensor"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups must be an object with at least one group"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(described: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(described)
    assert "\n" not in str(error.value)


def test_a_quantised_matrix_is_read_as_the_numbers_that_it_stands_for(tmp_path: Path) -> None:
    written = blocks(tmp_path, tiny_config("llama", num_heads=8, num_kv_heads=2))
    source = SafetensorsSource(tmp_path)
    assert source.names() == set(written.reference.state_dict())
    for name, weight in written.reference.state_dict().items():
        assert source.shape(name) == weight.shape
        torch.testing.assert_close(source.read(name, ALL, ALL, torch.float32), weight, atol=0, rtol=1e-6)
    down = written.reference.state_dict()[DOWN]
    # Rows and columns that begin and end inside of blocks of 32.
    part = source.read(DOWN, slice(5, 60), slice(24, 150), torch.float32)
    torch.testing.assert_close(part, down[5:60, 24:150], atol=0, rtol=1e-6)
    ids = torch.tensor([3, 0, 40])
    torch.testing.assert_close(source.read_rows(DOWN, ids, torch.float32), down[ids], atol=0, rtol=1e-6)
    one = SafetensorsSource(tmp_path, [DOWN])
    assert one.names() == {DOWN}
    assert torch.equal(one.read(DOWN, ALL, ALL, torch.float32), source.read(DOWN, ALL, ALL, torch.float32))


@pytest.mark.parametrize("scale_name", ["weight_scale_inv", "weight_scale"])
def test_a_scale_for_a_whole_matrix_under_the_names_of_transformers_and_autofp8(
    tmp_path: Path, scale_name: str
) -> None:
    model = AutoModelForCausalLM.from_config(to_hf_config(tiny_config()))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    matrices = [name for name in tensors if name.endswith("_proj.weight")]
    for name in matrices:
        tensors[name] = tensors[name].mul(64).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + scale_name] = torch.tensor(1 / 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    described |= {"weight_block_size": None} if scale_name == "weight_scale_inv" else {}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    got = SafetensorsSource(tmp_path).read(DOWN, ALL, ALL, torch.float32)
    assert torch.equal(got, tensors[DOWN].float() / 64)


def test_every_tensor_of_a_quantised_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    compressed_tensors(tmp_path, tiny_config(), fp8("channel"), fp8("tensor"))
    path, name = tmp_path / "model.safetensors", DOWN + "_scale"
    tensors = load_file(path)
    for change, message in (
        ({DOWN + "_zero_point": torch.zeros(1)}, f"tensor {DOWN}_zero_point would be left out"),
        ({DOWN: tensors[DOWN].float()}, f"tensor {DOWN} is stored as F32, quantization_config says F8_E4M3"),
        ({name: tensors[name][:-1]}, f"tensor {name} has the shape"),
        ({name: None}, f"has no tensor {name}"),
        ({"lm_head.weight_scale": torch.ones(1)}, "tensor lm_head.weight_scale would be left out"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="tensor") as error:
            SafetensorsSource(tmp_path)
        assert message in str(error.value)


def test_dequantising_and_joining_keep_every_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-100, 100, (12, 24), generator=generator, dtype=torch.int8)
    scales, shifts = (torch.rand(12, 3, generator=generator) for _ in range(2))
    matrix = ScaledMatrix(values, scales, 8, shifts)
    dense = values * scales.repeat_interleave(8, 1) + shifts.repeat_interleave(8, 1)
    torch.testing.assert_close(matrix.dequantised(torch.float32), dense)
    torch.testing.assert_close(joined([matrix, matrix]).dequantised(torch.float32), torch.cat([dense, dense]))


def test_a_plain_matrix_has_no_scales(tmp_path: Path) -> None:
    compressed_tensors(tmp_path, tiny_config(), fp8("channel"), None)
    source = SafetensorsSource(tmp_path)
    assert read_scaled(source, "lm_head.weight", ALL, ALL) is None
    assert read_scaled(source, QUERY, ALL, ALL) is not None
