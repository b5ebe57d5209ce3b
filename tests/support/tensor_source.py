"""Weights for model tests: tensors in memory, and a transformers model with the same ones."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from outrider.workers.weights.config import (
    DenseMlp,
    LayerConfig,
    ModelConfig,
    Rope,
    RoutedMlp,
    to_hf_config,
)
from outrider.workers.weights.source import Stored
from outrider.workers.weights.tensors import expert_prefix

_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 256}
ROPES = (
    Rope(),
    Rope(kind="linear", parameters={"factor": 4.0}),
    Rope(
        kind="llama3",
        parameters={
            "factor": 8.0,
            "original_max_position_embeddings": 256,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    Rope(kind="yarn", parameters=_ORIGINAL),
    Rope(
        kind="yarn", parameters={**_ORIGINAL, "truncate": False, "beta_fast": 16.0, "attention_factor": 1.2}
    ),
    Rope(kind="yarn", parameters={**_ORIGINAL, "mscale": 1.0, "mscale_all_dim": 0.5}),
)


class TensorSource:
    """A weight source over tensors in memory. Remembers what was read: (name, first row, end row, columns)."""

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
        self._config = config
        self._tensors = tensors
        self.reads: list[tuple[str, int]] = []

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensors[name]
        part = (tensor[rows] if tensor.dim() == 1 else tensor[rows, columns]).to(dtype, copy=True)
        self.reads.append((name, part.numel()))
        return part.contiguous()

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        return Stored(self.read(name, rows, columns, torch.float32), "F32", {})

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._tensors[name][ids].to(dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(tensor.numel() for tensor in self._tensors.values()) * dtype.itemsize


def tiny_config(
    architecture: str = "llama",
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 160,
    vocab_size: int = 300,
    rope: Rope | None = None,
    tied_embeddings: bool = False,
    max_context: int = 1024,
    windows: tuple[int, ...] = (0, 0),
) -> ModelConfig:
    """A layer for each of `windows`, with heads of size 16; heads * 16 need not be the hidden size, as in Qwen3."""
    return ModelConfig(
        architecture=architecture,
        layers=tuple(LayerConfig(window, rope or Rope(), DenseMlp(intermediate_size)) for window in windows),
        hidden_size=8 * num_heads,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        vocab_size=vocab_size,
        rms_norm_eps=1e-5,
        max_context=max_context,
        tied_embeddings=tied_embeddings,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "mellum"),
    )


def tiny_mellum(
    windows: tuple[int, ...] = (48, 0, 48),
    num_heads: int = 4,
    num_kv_heads: int = 2,
    mlp: RoutedMlp | None = None,
    yarn: Rope = ROPES[3],
    vocab_size: int = 300,
) -> ModelConfig:
    """A layer for each of `windows`, with experts; only layers without a window have their positions stretched."""
    config = tiny_config("mellum", num_heads, num_kv_heads, vocab_size=vocab_size)
    mlp = mlp or RoutedMlp(num_experts=6, experts_per_token=2, intermediate_size=40, renormalised=True)
    plain = Rope(theta=500000.0)
    layers = tuple(LayerConfig(window, plain if window else yarn, mlp) for window in windows)
    return replace(config, layers=layers)


def reference_model(config: ModelConfig, seed: int = 0) -> tuple[PreTrainedModel, TensorSource]:
    """transformers' model in float32 with random weights, and a source that reads them.

    Weights are large enough that attention is peaked and logits are of order 1, norms and biases are not
    trivial: with transformers' own initialisation a wrong mask would hide within the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    # head_dim * num_heads != hidden_size is refused by nothing but the check for a divisible hidden size.
    model = AutoModelForCausalLM.from_config(to_hf_config(config)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.2 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    tensors = _stored(dict(model.state_dict()))
    if config.tied_embeddings:
        tensors.pop("lm_head.weight", None)
    return model, TensorSource(config, tensors)


def _stored(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a transformers model as its checkpoints have them: each expert's matrices for themselves."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in parameters.items():
        prefix, is_expert, matrices = name.partition("mlp.experts.")
        if not is_expert:
            stored[name] = tensor
            continue
        kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrices]
        for number, whole in enumerate(tensor):
            for kind, matrix in zip(kinds, whole.chunk(len(kinds)), strict=True):
                stored[f"{prefix}{expert_prefix(number)}{kind}.weight"] = matrix
    return stored
