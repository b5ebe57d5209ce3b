"""Checkpoints of narrow numbers, written by the formats' own libraries where these run on a CPU, and models that
compute with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from outrider.workers.weights.config import ModelConfig
from support.tensor_source import reference_model

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = (32, 32)


def fp8(strategy: str, **more: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **more)


@dataclass(frozen=True)
class Written:
    """A checkpoint, and what its library's model says."""

    directory: Path
    reference: PreTrainedModel

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """float32 [N, vocab]."""
        logits: Tensor = self.reference(torch.tensor([tokens])).logits[0]
        return logits


def compressed_tensors(
    directory: Path,
    config: ModelConfig,
    weights: QuantizationArgs,
    inputs: QuantizationArgs | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    cache: QuantizationArgs | None = None,
) -> Written:
    """Written by compressed-tensors, and read by transformers with its help."""
    model, _ = reference_model(config)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    described = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=list(ignore),
        format="float-quantized",
        kv_cache_scheme=cache,
    )
    apply_quantization_config(model, described, show_progress=False)
    for number, module in enumerate(model.modules()):
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(_weight_scales(module.weight.detach(), weights))
        for name in ("input_scale", "k_scale", "v_scale"):
            if hasattr(module, name):
                # What calibration finds; another one for each module.
                getattr(module, name).data.fill_(
                    (3.0 if name == "input_scale" else 2.0) / FP8_MAX + number * 1e-5
                )
    compressor = ModelCompressor(quantization_config=described)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return Written(directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def _weight_scales(weight: Tensor, args: QuantizationArgs) -> Tensor:
    if args.strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        height, width = args.block_structure
        weight = F.pad(weight, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
        blocks = weight.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scales: Tensor = calculate_qparams(low, high, args)[0]
    return scales


def fbgemm(directory: Path, config: ModelConfig, plain: tuple[str, ...], bound: float) -> Written:
    """As meta-llama's 405B-FP8: FBGEMM needs a GPU, so its arithmetic is written out here."""

    def scales_of(rows: Tensor, most: float) -> Tensor:
        return (rows.abs().amax(-1, keepdim=True).clamp(max=most) / FP8_MAX).clamp(min=1 / (FP8_MAX * 512))

    def rounded(rows: Tensor, scales: Tensor) -> Tensor:
        return (rows / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)

    def round_rows(rows: Tensor) -> Tensor:
        scales = scales_of(rows, bound)
        return rounded(rows, scales).float() * scales

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = scales_of(weight, float("inf"))
        return {name: rounded(weight, scales), f"{name}_scale": scales}

    described = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": bound,
        "modules_to_not_convert": list(plain),
    }
    return _written_here(directory, config, described, plain, store, round_rows)


def blocks(directory: Path, config: ModelConfig, plain: tuple[str, ...] = ("lm_head",)) -> Written:
    """DeepSeek's and Qwen's layout; scales of activations as compressed-tensors computes those of groups."""
    weights = fp8("block", block_structure=list(BLOCK))
    inputs = fp8("group", group_size=BLOCK[1], dynamic=True)

    def round_rows(rows: Tensor) -> Tensor:
        scale, zero = compute_dynamic_scales_and_zp(rows, inputs, torch.nn.Module())
        out: Tensor = fake_quantize(rows, scale, zero, inputs)
        return out

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = _weight_scales(weight, weights)
        of_elements = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        return {name: (weight / of_elements).clamp(-FP8_MAX, FP8_MAX).to(FP8), f"{name}_scale_inv": scales}

    described = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": list(plain),
    }
    written = _written_here(directory, config, described, plain, store, round_rows)
    # Without a GPU transformers reads this layout dequantised; its weights are the reference's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, weight in written.reference.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], weight, atol=0, rtol=1e-6)
    return written


def _written_here(
    directory: Path,
    config: ModelConfig,
    described: dict[str, Any],
    plain: tuple[str, ...],
    store: Callable[[str, Tensor], dict[str, Tensor]],
    round_rows: Callable[[Tensor], Tensor],
) -> Written:
    model, _ = reference_model(config)
    model.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    tensors = load_file(directory / "model.safetensors")
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith(plain):
            continue
        stored = store(f"{name}.weight", module.weight.detach())
        tensors |= stored
        values, scales = stored.values()
        of_elements = scales
        for dim in (0, 1):
            of_elements = of_elements.repeat_interleave(values.shape[dim] // of_elements.shape[dim], dim)
        module.weight.data.copy_(values.float() * of_elements)
        module.register_forward_pre_hook(lambda _, inputs: (round_rows(inputs[0]),))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Written(directory, model)
