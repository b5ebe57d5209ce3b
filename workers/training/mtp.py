"""Multi-token prediction in training (DeepSeek-V3, arXiv 2412.19437): what a head starts as; see `unrolled`.

The target is frozen: the head learns the target's law from the target's own last rows, for as many steps as it is to
be fed back on itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.configs.training import MtpConfig
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.mtp import MtpDrafter, MtpShape, default_layer
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.unrolled import UnrolledTraining
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import FINAL_NORM

_ALL = slice(None)


def head_shape_for(target: ModelConfig, head: LmHeadShape) -> MtpShape:
    """A head whose block is like the target's last layer of the kind of its first."""
    return MtpShape(target, default_layer(target), head)


@torch.no_grad()
def start_from_layer(drafter: MtpDrafter, source: WeightSource) -> None:
    """Makes the block the target's layer that it is like, and its input the sum of token and feature."""
    prefix, hidden_size = f"model.layers.{drafter.shape.like}.", source.config.hidden_size
    for name, weight in drafter.block.state_dict().items():
        weight.copy_(source.read(prefix + name, _ALL, _ALL, torch.float32))
    drafter.norm.weight.copy_(source.read(FINAL_NORM, _ALL, _ALL, torch.float32))
    drafter.eh_proj.weight.normal_(std=0.01)
    drafter.eh_proj.weight += torch.eye(hidden_size).repeat(1, 2)


class MtpTraining(UnrolledTraining):
    """On the target's last rows, after its final norm."""

    drafter: MtpDrafter
    config: MtpConfig

    def features(self, batch: FeatureBatch) -> Tensor:
        return batch.normed.to(self.dtype)

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        loss, counts = super().forward(batch, totals, measure)
        return self.config.loss_weight * loss, counts
