"""Each layout of integers: logits of transformers' model of the dequantised values, and parts of a matrix."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.integer_linear import Int4Linear, Int8Linear, int8_works
from outrider.workers.model.loader import load_weights
from outrider.workers.model.quantized import make_scaled_linear
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.source import read_scaled
from support.quantised import Written
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import reference_model, tiny_config

CPU = torch.device("cpu")
PAGE = 8
CONFIG = tiny_config("llama", num_heads=8, num_kv_heads=2)
BIASED = tiny_config("qwen2", num_heads=8, num_kv_heads=2)
DOWN = "model.layers.0.mlp.down_proj"


def args(bits: int, strategy: str, symmetric: bool, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, **more)


def compressed(directory: Path, weights: QuantizationArgs, form: str) -> Written:
    """Written by compressed-tensors; the values are those that it computes with before they are written."""
    model, _ = reference_model(BIASED)
    reference = copy.deepcopy(model)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    described = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, described, show_progress=False)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, weights.group_size or module.weight.shape[1]))
            scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            module.weight_scale.data.copy_(scales)
            if not weights.symmetric:
                module.weight_zero_point.data.copy_(zeros)
            values = fake_quantize(
                module.weight.detach(), scales, None if weights.symmetric else zeros, weights
            )
            reference.get_submodule(name).weight.data.copy_(values)
    compressor = ModelCompressor(quantization_config=described)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return Written(directory, reference)


def by_hand(
    directory: Path,
    described: dict[str, Any],
    store: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
) -> Written:
    """`store` gives the tensors of a matrix, by the ends of their names, and the values that they stand for."""
    model, _ = reference_model(CONFIG)
    model.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    tensors = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            del tensors[f"{name}.weight"]
            stored, values = store(module.weight.detach())
            tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in stored.items()}
            module.weight.data.copy_(values)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Written(directory, model)


def rounded(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers [out, in], scales in float16 and zero points [out, groups]; the values that they stand for."""
    groups, most = weight.unflatten(1, (-1, group)), 2**bits - 1
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / most).half()
    zeros = (-low / scales.float()).round().clamp(1, most - 1).int()
    whole = (groups / scales.float()[..., None]).round() + zeros[..., None]
    whole = whole.clamp(0, most).int()
    values = (whole - zeros[..., None]) * scales.float()[..., None]
    return whole.flatten(1), scales, zeros, values.flatten(1)


def words(integers: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Neighbours along the last dimension in a word of 32 bits; `order[i]` is whom its i-th lowest bits hold."""
    parts = integers.long().unflatten(-1, (-1, 32 // bits))
    total = sum(parts[..., which] << (bits * place) for place, which in enumerate(order))
    assert isinstance(total, Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def gptq(directory: Path, group: int, bits: int, version: str) -> Written:
    order = tuple(range(32 // bits))

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        width = columns if group == -1 else group
        whole, scales, zeros, values = rounded(weight, width, bits)
        stored_zeros = zeros.T - (1 if version == "gptq" else 0)
        return {
            "qweight": words(whole, bits, order).T,
            "qzeros": words(stored_zeros, bits, order),
            "scales": scales.T,
            "g_idx": torch.arange(columns, dtype=torch.int32) // width,
        }, values

    described = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
    return by_hand(directory, {**described, "checkpoint_format": version, "lm_head": False}, store)


def awq(directory: Path, group: int) -> Written:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        whole, scales, zeros, values = rounded(weight, group, 4)
        return {
            "qweight": words(whole.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": scales.T,
        }, values

    described = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return by_hand(directory, described, store)


LAYOUTS: dict[str, Callable[[Path], Written]] = {
    "packed, 4 bits, symmetric": lambda d: compressed(
        d, args(4, "group", True, group_size=32), "pack-quantized"
    ),
    "packed, 4 bits, zero points": lambda d: compressed(
        d, args(4, "group", False, group_size=32), "pack-quantized"
    ),
    "packed, 8 bits, rows": lambda d: compressed(d, args(8, "channel", True), "pack-quantized"),
    "packed, 4 bits, rows": lambda d: compressed(d, args(4, "channel", True), "pack-quantized"),
    "bytes, rows": lambda d: compressed(d, args(8, "channel", True), "int-quantized"),
    "bytes, rows, zero points": lambda d: compressed(d, args(8, "channel", False), "int-quantized"),
    "gptq, 4 bits": lambda d: gptq(d, 32, 4, "gptq"),
    "gptq 2, 8 bits, rows": lambda d: gptq(d, -1, 8, "gptq_v2"),
    "awq": lambda d: awq(d, 32),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_are_those_of_the_dequantised_values(write: Callable[[Path], Written], tmp_path: Path) -> None:
    written = write(tmp_path)
    source = SafetensorsSource(tmp_path)
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    want = written.logits(tokens)
    assert want.std() > 0.5
    difference: dict[tuple[torch.dtype, bool], Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for packed in (False, True):
            plan = ShardPlan(source.config, 0, 1)
            model = Transformer(load_weights(plan, source, dtype, CPU, packed), SoloCommunicator())
            cache = PagedCache(source.config, plan, 64, PAGE, dtype, CPU)
            rows = SequenceRows(list(range(16)), 0, chain(60), 0, tokens)
            got = model.logits(model.forward(batch_of([rows], PAGE, CPU), cache).last)
            difference[dtype, packed] = (got - want).abs()
    assert difference[torch.float32, False].max() < 1e-4
    assert difference[torch.float32, True].max() < 2e-4  # rows rounded to 24 bits
    # As far off as products with the dequantised values are. Scales in 8 bits are the 4 bits' rounding more.
    in_bfloat16 = difference[torch.bfloat16, False].mean()
    assert difference[torch.bfloat16, True].mean() < 1.5 * in_bfloat16
    # Parts that begin and end inside groups and words.
    whole = source.read(f"{DOWN}.weight", slice(None), slice(None), torch.float32)
    for part in ((slice(3, 13), slice(5, 43)), (slice(8, 24), slice(32, 64)), (slice(0, 9), slice(40, 41))):
        assert torch.equal(source.read(f"{DOWN}.weight", *part, torch.float32), whole[part])


@pytest.mark.parametrize(("name", "kind"), [("awq", Int4Linear), ("bytes, rows", Int8Linear)])
def test_integers_are_multiplied_as_they_are(name: str, kind: type, tmp_path: Path) -> None:
    if kind is Int8Linear and not int8_works():
        pytest.skip("no exact int8 product on this machine")
    LAYOUTS[name](tmp_path)
    matrix = read_scaled(SafetensorsSource(tmp_path), f"{DOWN}.weight", slice(None), slice(None))
    assert matrix is not None
    assert isinstance(make_scaled_linear(matrix, torch.empty(0), torch.bfloat16, packed=True), kind)


def test_columns_sorted_by_activations_are_refused(tmp_path: Path) -> None:
    gptq(tmp_path, 32, 4, "gptq")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="g_idx must be the group of each column in order"):
        SafetensorsSource(tmp_path).read(f"{DOWN}.weight", slice(None), slice(None), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq", "bits": 3}, "quantization_config.bits must be 4, got 3"),
        ({"quant_method": "awq", "version": "gemv"}, "quantization_config.version must be"),
        ({"quant_method": "awq", "zero_point": False}, "quantization_config.zero_point must be"),
        ({"quant_method": "gptq", "bits": 3}, "quantization_config.bits must be 4 or 8, got 3"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "quantization_config.checkpoint_format"),
        ({"quant_method": "gptq", "dynamic": {"-:.*": {}}}, "quantization_config.dynamic"),
    ],
)
def test_what_is_not_read_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = reference_model(CONFIG)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    described = {"bits": 4, "group_size": 32} | changes
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    with pytest.raises(ValueError, match=message):
        SafetensorsSource(tmp_path)
