"""Rotary position embedding: frequencies per kind of scaling, cos and sin per position."""

import math

import torch
from torch import Tensor

from outrider.workers.weights.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """cos and sin of every position a batch asks for (Su et al., arXiv:2104.09864)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.inverse_frequencies = rope_frequencies(config).to(device)  # [head_dim / 2]
        self.attention_factor = config.rope_scaling.attention_factor
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [N, head_dim / 2] in the model's dtype, of positions int64 [N]."""
        angles = positions[:, None].float() * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(self.dtype), sin.to(self.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2].

    Bit for bit those of transformers: a last bit more is 3e-5 radians at position 1000.
    """
    dim, scaling = config.head_dim, config.rope_scaling
    periods = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / periods
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(periods, config.rope_theta, dim, scaling)
    return plain


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    wavelengths = 2 * math.pi / plain
    rotations = scaling.original_max_context / wavelengths
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(periods: Tensor, theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv:2309.00071): dimensions that rotate often are kept, slow ones divided by the factor."""

    def dimension_with(rotations: float) -> float:
        return (
            dim * math.log(scaling.original_max_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
