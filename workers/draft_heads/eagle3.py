"""EAGLE-3 drafter (arXiv 2503.01840; SafeAILab/EAGLE, sgl-project/SpecForge, vllm-project/speculators).

One decoder layer over pairs (the token at t + 1, a feature of position t) guesses the token at t + 2. The feature is
made of three of the target's hidden rows where the target has seen position t, else it is the drafter's own output
for t. So a row of the drafter stands for a token and what came before it; the first token of a text has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.kernels.rms_norm import rms_norm
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.weights.config import DenseMlp, LayerConfig, ModelConfig, Rope

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [N, HQ, D], k and v [N, HK, D], before rotary embedding -> [N, HQ * D]: the server attends over its paged cache,
the trainer over the rows of its unrolled steps."""


@dataclass(frozen=True)
class Eagle3Shape:
    """Sizes of an EAGLE-3 drafter.

    Attributes:
        hidden_size: the drafter's, and that of the embedding rows it reads, which are the target's.
        target_hidden_size: of each tap.
        vocab_size: the target's.
        taps: the target's layers whose *inputs* are the feature, as in `Hidden.taps`; three in the paper.
        num_heads, num_kv_heads, head_dim, intermediate_size, rms_norm_eps: of the layer.
        rope: its rotary positions.
        max_context: longest text that the positions are meant for, tokens.
        norm_before_residual: the normed feature, not the feature, is what the layer's output is added to.
        lm_head: sizes of the LM head.
    """

    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    taps: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    max_context: int
    norm_before_residual: bool
    lm_head: LmHeadShape

    @property
    def model(self) -> ModelConfig:
        """The drafter as a model of one layer, which is what its cache and its positions are made for."""
        return ModelConfig(
            architecture="llama",
            layers=(LayerConfig(0, self.rope, DenseMlp(self.intermediate_size)),),
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            max_context=self.max_context,
            tied_embeddings=False,
            qkv_bias=False,
            qk_norm=False,
        )


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The inputs of the target's layers 2, L//2 and L - 3: outputs of 1, L//2 - 1 and L - 4 (SafeAILab/EAGLE)."""
    return 2, num_layers // 2, num_layers - 3


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In training x may be narrower than the weight; the fused norm wants one dtype.
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Eagle3Attention(nn.Module):
    """q, k and v read the normed token and the normed feature side by side."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * shape.hidden_size
        self.q_proj = nn.Linear(width, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        D = self.shape.head_dim
        q, k, v = (project(x).unflatten(-1, (-1, D)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(attend(q, k, v))
        return out


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Eagle3Layer(nn.Module):
    """The one decoder layer."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        hidden_size, eps = shape.hidden_size, shape.rms_norm_eps
        self.norm_before_residual = shape.norm_before_residual
        self.input_layernorm = RmsNorm(hidden_size, eps)
        self.hidden_norm = RmsNorm(hidden_size, eps)
        self.self_attn = Eagle3Attention(shape)
        self.post_attention_layernorm = RmsNorm(hidden_size, eps)
        self.mlp = GatedMlp(hidden_size, shape.intermediate_size)

    def forward(self, embedded: Tensor, feature: Tensor, attend: Attend) -> Tensor:
        normed_feature = self.hidden_norm(feature)
        residual = normed_feature if self.norm_before_residual else feature
        read = torch.cat((self.input_layernorm(embedded), normed_feature), dim=-1)
        hidden = residual + self.self_attn(read, attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Eagle3Drafter(nn.Module):
    """The drafter without the embedding, which is the target's.

    Attributes:
        fc: the target's taps side by side -> a feature.
        midlayer: the decoder layer.
        norm, lm_head: from its output to logits.
    """

    def __init__(self, shape: Eagle3Shape, ids: Tensor) -> None:
        """`ids`: int64 [shape.lm_head.num_ids], the target's token of each logit, ascending."""
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(len(shape.taps) * shape.target_hidden_size, shape.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(shape)
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = make_lm_head(shape.lm_head, ids)

    @property
    def model(self) -> ModelConfig:
        """As a model of one layer, see `Eagle3Shape`."""
        return self.shape.model

    def features(self, taps: Tensor) -> Tensor:
        """The target's rows [N, taps * target_hidden_size], in the order of `shape.taps` -> features [N, hidden]."""
        features: Tensor = self.fc(taps)
        return features

    def forward(self, embedded: Tensor, features: Tensor, attend: Attend) -> Tensor:
        """Embedding rows [N, hidden] of tokens and the features [N, hidden] of the positions before them -> output
        [N, hidden] before the final norm: the features that stand in for the target's own at those tokens."""
        out: Tensor = self.midlayer(embedded, features, attend)
        return out

    def normed(self, output: Tensor) -> Tensor:
        """Output rows [N, hidden] as the LM head reads them."""
        normed: Tensor = self.norm(output)
        return normed

    def logits(self, output: Tensor) -> Tensor:
        """Output rows [N, hidden] -> logits [N, V'] of the token after each."""
        logits: Tensor = self.lm_head(self.normed(output))
        return logits
