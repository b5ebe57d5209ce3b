"""EAGLE-3 in training (arXiv 2503.01840): what a drafter starts as; see `unrolled`."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape, default_taps
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.unrolled import UnrolledTraining
from outrider.workers.weights.config import DenseMlp, ModelConfig, RoutedMlp
from outrider.workers.weights.source import WeightSource

_ALL = slice(None)


def drafter_shape(target: ModelConfig, head: LmHeadShape, norm_before_residual: bool) -> Eagle3Shape:
    """A drafter whose layer is like the target's last one."""
    layer = target.layers[-1]
    return Eagle3Shape(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        taps=default_taps(target.num_layers),
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=active_columns(layer.mlp),
        rms_norm_eps=target.rms_norm_eps,
        rope=layer.rope,
        max_context=target.max_context,
        norm_before_residual=norm_before_residual,
        lm_head=head,
    )


def active_columns(mlp: DenseMlp | RoutedMlp) -> int:
    """Columns that a token goes through: all of an MLP's, or those of a token's experts together."""
    return mlp.intermediate_size * (mlp.experts_per_token if isinstance(mlp, RoutedMlp) else 1)


@torch.no_grad()
def start_from_last_layer(drafter: Eagle3Drafter, source: WeightSource) -> None:
    """Makes the drafter's layer the target's last one: half of each of q, k and v's columns, those that read the
    feature; the half that reads the token starts at zero, and the feature as the last of the taps. Of a target's
    experts nothing is taken."""
    prefix = f"model.layers.{source.config.num_layers - 1}."

    def read(name: str) -> Tensor:
        return source.read(name, _ALL, _ALL, torch.float32)

    layer, hidden = drafter.midlayer, drafter.shape.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).weight
        weight.zero_()
        weight[:, hidden:] = read(f"{prefix}self_attn.{name}.weight")
    layer.self_attn.o_proj.weight.copy_(read(f"{prefix}self_attn.o_proj.weight"))
    if isinstance(source.config.layers[-1].mlp, DenseMlp):
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).weight.copy_(read(f"{prefix}mlp.{name}.weight"))
    layer.hidden_norm.weight.copy_(read(f"{prefix}input_layernorm.weight"))
    layer.post_attention_layernorm.weight.copy_(read(f"{prefix}post_attention_layernorm.weight"))
    drafter.norm.weight.copy_(read("model.norm.weight"))
    drafter.fc.weight.normal_(std=0.01)
    drafter.fc.weight[:, -hidden:] += torch.eye(hidden)


class Eagle3Training(UnrolledTraining):
    """On three of the target's hidden rows."""

    drafter: Eagle3Drafter

    def features(self, batch: FeatureBatch) -> Tensor:
        return self.drafter.features(batch.taps.to(self.dtype))
