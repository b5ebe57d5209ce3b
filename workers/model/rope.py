"""Rotary position embedding: frequencies per kind of scaling, cos and sin per position."""

from typing import Protocol

import torch
from torch import Tensor

from outrider.workers.weights.config import Rope, hf_rope_parameters


class RopeSizes(Protocol):
    """What frequencies depend on besides `Rope`: of a model, or of an EAGLE-3 drafter."""

    @property
    def head_dim(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def max_context(self) -> int: ...


class RotaryEmbedding:
    """cos and sin of every position a batch asks for (Su et al., arXiv:2104.09864)."""

    def __init__(self, config: RopeSizes, rope: Rope, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, self.attention_factor = rope_frequencies(config, rope)
        self.inverse_frequencies = frequencies.to(device)  # [head_dim / 2]
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [N, head_dim / 2] in the model's dtype, of positions int64 [N]."""
        angles = positions[:, None].float() * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(self.dtype), sin.to(self.dtype)


def rope_frequencies(config: RopeSizes, rope: Rope) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2], and a factor on cos and sin.

    Scaled frequencies are computed by transformers itself: a last bit more is 3e-5 radians at position 1000.
    """
    if rope.kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / rope.theta**exponents, 1.0
    # Takes a second to import, and many models do without.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](_Described(config, rope), torch.device("cpu"))
    return frequencies, float(factor)


class _Described:
    """What transformers' initialisers read of a configuration. A real one costs 4 s and 150 MB to import."""

    def __init__(self, config: RopeSizes, rope: Rope) -> None:
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_heads
        self.max_position_embeddings = config.max_context
        self.rope_parameters = hf_rope_parameters(rope)

    def standardize_rope_params(self) -> None:
        """They are in the standard form already."""
