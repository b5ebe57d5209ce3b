"""A head for multi-token prediction (DeepSeek-V3, arXiv 2412.19437): one more block of the model's own kind.

It reads pairs (the token at t + 1, a feature of position t) and guesses the token at t + 2. The feature is the
target's last row after the final norm where the target has seen position t, else it is the head's own output for t,
normed as well: with its own output in the place of the target's rows it goes on for more than one token. As
transformers' `MtpModel` and vllm-project/speculators' `mtp` do; embedding and LM head are the target's, unless the
head has another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from outrider.kernels.rms_norm import rms_norm
from outrider.workers.draft_heads.eagle3 import Attend, GatedMlp, RmsNorm
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.draft_heads.start_values import fill_normal
from outrider.workers.routing import route
from outrider.workers.weights.config import ModelConfig, RoutedMlp


@dataclass(frozen=True)
class MtpShape:
    """What a head is made for.

    Attributes:
        target: the model that it belongs to.
        like: the layer of the target that its block is like.
        lm_head: sizes of the LM head.
    """

    target: ModelConfig
    like: int
    lm_head: LmHeadShape

    @property
    def model(self) -> ModelConfig:
        """The block as a model of one layer."""
        return replace(self.target, layers=(self.target.layers[self.like],))

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose rows are read, as in `Hidden.taps`: what leaves the last one."""
        return (self.target.num_layers,)


def default_layer(target: ModelConfig) -> int:
    """Which of the target's layers a head is like where nobody says: the last of the kind of the first, which is
    windowed and has experts in Mellum 2, as transformers assumes for its head."""
    first = target.layers[0]
    return max(i for i, layer in enumerate(target.layers) if layer == first)


class Router(nn.Module):
    """Scores of experts, computed in float32: no linear layer, whose matrix would be packed for the server."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        fill_normal(self.weight, hidden_size**-0.5)


class Experts(nn.Module):
    """A router and its experts, see `RoutedMlp`; only experts that rows visit are computed."""

    def __init__(self, hidden_size: int, shape: RoutedMlp) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Router(shape.num_experts, hidden_size)
        self.experts = nn.ModuleList(
            GatedMlp(hidden_size, shape.intermediate_size) for _ in range(shape.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        # Autocast would compute the product in its own dtype.
        with torch.autocast(x.device.type, enabled=False):
            routes = route(x, self.gate.weight.float(), shape.experts_per_token, shape.renormalised)
        total = torch.zeros_like(x, dtype=torch.float32)
        for number in routes.experts.unique().tolist():
            rows, place = (routes.experts == number).nonzero(as_tuple=True)
            out = self.experts[number](x[rows]).float() * routes.weights[rows, place, None]
            total = total.index_add(0, rows, out)
        return total.to(x.dtype)


class Attention(nn.Module):
    """As the target's own."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, D, bias = model.hidden_size, model.head_dim, model.qkv_bias
        self.head_dim = D
        self.q_proj = nn.Linear(width, model.num_heads * D, bias=bias)
        self.k_proj = nn.Linear(width, model.num_kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(width, model.num_kv_heads * D, bias=bias)
        self.o_proj = nn.Linear(model.num_heads * D, width, bias=False)
        if model.qk_norm:
            self.q_norm: nn.Module = RmsNorm(D, model.rms_norm_eps)
            self.k_norm: nn.Module = RmsNorm(D, model.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(attend(self.q_norm(q), self.k_norm(k), v))
        return out


class Block(nn.Module):
    """One decoder layer of the target's kind."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        mlp = model.layers[0].mlp
        self.input_layernorm = RmsNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = RmsNorm(model.hidden_size, model.rms_norm_eps)
        self.mlp: nn.Module = (
            Experts(model.hidden_size, mlp)
            if isinstance(mlp, RoutedMlp)
            else GatedMlp(model.hidden_size, mlp.intermediate_size)
        )

    def forward(self, hidden: Tensor, attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class MtpDrafter(nn.Module):
    """The head without the embedding, which is the target's.

    Attributes:
        enorm, hnorm: of the embedding row and the feature, which `eh_proj` reads side by side in this order.
        block: the decoder layer.
        norm, lm_head: from its output to logits.
        target_norm: [hidden], the target's final norm, of which features are made; no part of the head.
        shares_lm_head: nor is the LM head, which is the target's.
    """

    target_norm: Tensor

    def __init__(self, shape: MtpShape, ids: Tensor) -> None:
        """`ids`: int64 [shape.lm_head.num_ids], the target's token of each logit, ascending."""
        super().__init__()
        self.shape = shape
        hidden_size, self.eps = shape.target.hidden_size, shape.target.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (RmsNorm(hidden_size, self.eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = Block(shape.model)
        self.lm_head = make_lm_head(shape.lm_head, ids)
        self.shares_lm_head = False
        self.register_buffer("target_norm", torch.ones(hidden_size), persistent=False)

    def take_target(self, final_norm: Tensor, head: Tensor | None) -> None:
        """Gives the head what it shares with its target: the final norm [hidden], and the matrix [V, hidden] of the
        LM head where it shares that, too."""
        assert (head is not None) == self.shares_lm_head
        self.target_norm = final_norm
        if head is not None:
            self.lm_head.load_state_dict({"weight": head}, assign=True)

    @property
    def model(self) -> ModelConfig:
        """The head as a model of one layer, which is what its cache and its positions are made for."""
        return self.shape.model

    def features(self, taps: Tensor) -> Tensor:
        """Rows [N, hidden] that leave the target's last layer -> features [N, hidden]."""
        return rms_norm(taps, self.target_norm.to(taps.dtype), self.eps)

    def forward(self, embedded: Tensor, features: Tensor, attend: Attend) -> Tensor:
        """Embedding rows [N, hidden] of tokens and the features [N, hidden] of the positions before them -> output
        [N, hidden] after the head's norm: the features that stand in for the target's own at those tokens."""
        hidden = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(features)), dim=-1))
        out: Tensor = self.norm(self.block(hidden, attend))
        return out

    def normed(self, output: Tensor) -> Tensor:
        """Output rows [N, hidden] as the LM head reads them: as they are."""
        return output

    def logits(self, output: Tensor) -> Tensor:
        """Output rows [N, hidden] -> logits [N, V'] of the token after each."""
        logits: Tensor = self.lm_head(output)
        return logits
