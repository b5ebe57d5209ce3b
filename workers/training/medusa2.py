"""Medusa-2 (arXiv 2401.10774): heads and target trained together, the target by low-rank adapters (LoRA, peft).

L = L_LM + lambda * L_heads. The texts are the target's own, so L_LM is KL(teacher || model), the teacher being the
same model with its adapters off; lambda rises from 0 along a sine, so that the fresh heads do not spoil the target.
The heads learn `head_lr_factor` times as fast as the adapters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from outrider.configs.training import MedusaConfig, TrainingConfig
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.setup import torch_dtype
from outrider.workers.training.data import Corpus
from outrider.workers.training.feature_batch import FeatureBatch, TokensOnly
from outrider.workers.training.heads import head_shape, read_ids
from outrider.workers.training.medusa1 import Medusa1Training, heads_shape, start_heads
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.saving import describe, save_drafter, start_from
from outrider.workers.training.tasks import Task
from outrider.workers.training.vocabulary_loss import SoftTargets, vocabulary_loss
from outrider.workers.weights.reference import load_transformers
from outrider.workers.weights.resolver import ResolvedModel, open_source
from outrider.workers.weights.safetensors_writer import let_others_read

_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LOGIT_ROWS = 256


class Medusa2Training(nn.Module):
    """A target with adapters, heads, and their joint loss.

    Attributes:
        target: a peft model of a transformers one; only its adapters are trained.
        medusa: the heads with their loss.
    """

    def __init__(
        self, target: nn.Module, heads: MedusaHeads, config: MedusaConfig, top_k: int, dtype: torch.dtype
    ) -> None:
        """top_k: tokens of the teacher's law that are compared one by one; dtype: of products."""
        super().__init__()
        self.target = target
        self.medusa = Medusa1Training(heads, config, dtype)
        self.config = config
        self._top_k = top_k
        self._dtype = dtype
        self._progress = 0.0

    @property
    def num_guesses(self) -> int:
        """Heads."""
        return self.medusa.num_guesses

    @property
    def head_weight(self) -> float:
        """lambda: the weight of the heads' loss now."""
        done = self._progress / self.config.ramp_fraction if self.config.ramp_fraction else 1.0
        return self.config.lambda0 * math.sin(0.5 * math.pi * min(1.0, done))

    def set_progress(self, fraction: float) -> None:
        """Which part of all steps is done."""
        self._progress = fraction

    def count_labels(self, batch: FeatureBatch) -> Tensor:
        """float32 [K + 1]: labels of the heads, and those of the target itself."""
        own = torch.tensor([float(len(_learned(batch)))])
        return torch.cat((self.medusa.count_labels(batch), own))

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """As in `Eagle3Training.forward`; totals: [K + 1]."""
        with torch.autocast(batch.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            normed = self._rows(batch)
            head_loss, counts = self.medusa.loss_of(normed, batch, totals[:-1], measure)
            if measure:
                return head_loss, counts
            own = self._own_loss(normed, batch) / totals[-1].clamp(min=1.0)
        return own + self.head_weight * head_loss, counts

    def _own_loss(self, normed: Tensor, batch: FeatureBatch) -> Tensor:
        """Summed KL(teacher || model) over the positions before labels."""
        learned = _learned(batch).to(normed.device)
        matrix = self._model().lm_head.weight
        with torch.no_grad(), self._adapters_off():
            teacher = self._rows(batch)[learned]
            laws = [
                self._law(teacher[start : start + _LOGIT_ROWS], matrix)
                for start in range(0, len(teacher), _LOGIT_ROWS)
            ]
        if not laws:
            return normed.sum() * 0.0
        soft = SoftTargets(torch.cat([law[0] for law in laws]), torch.cat([law[1] for law in laws]))
        weights = torch.ones(len(learned), device=normed.device)
        value, _, _ = vocabulary_loss(normed[learned], matrix, soft, weights, "kl")
        return value

    def _law(self, rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        logits = (rows @ matrix.to(rows.dtype).T).float()
        top, columns = logits.topk(min(self._top_k, logits.shape[1]), dim=-1)
        return columns, top - logits.logsumexp(-1, keepdim=True)

    def _rows(self, batch: FeatureBatch) -> Tensor:
        """The target's last rows after its final norm, [N, hidden], texts back to back."""
        lengths = batch.lengths
        padded = nn.utils.rnn.pad_sequence(list(batch.tokens.split(lengths)), batch_first=True)
        # Texts are padded behind their ends, where a causal model does not look.
        hidden = self._model().model(input_ids=padded.to(batch.device), use_cache=False).last_hidden_state
        return torch.cat([hidden[number, :length] for number, length in enumerate(lengths)])

    def _model(self) -> Any:
        """The transformers model, its adapted layers in place."""
        target: Any = self.target
        return target.get_base_model()

    def _adapters_off(self) -> Any:
        target: Any = self.target
        return target.disable_adapter()


def build_medusa2(
    config: TrainingConfig, resolved: ResolvedModel, corpus: Corpus, low_rank: Mapping[str, Tensor]
) -> Task:
    """What a rank trains with method `medusa2`; low_rank: the start of such a head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("method medusa2 needs the package peft: pip install 'outrider[train]'") from error
    source, medusa = open_source(resolved), config.medusa
    ids = read_ids(config.head, source.config.vocab_size)
    shape = head_shape(config.head, source.config.hidden_size, ids)
    heads = MedusaHeads(heads_shape(source.config, shape, medusa), ids)
    start_heads(heads, source, low_rank)
    if config.start_from:
        start_from(config.start_from, heads, source.config.num_layers)
    lora = LoraConfig(
        r=medusa.lora_rank,
        lora_alpha=medusa.lora_alpha,
        lora_dropout=medusa.lora_dropout,
        target_modules=_ADAPTED,
    )
    # In float32: a step's change to a bfloat16 weight is often less than its last bit.
    target: Any = get_peft_model(load_transformers(resolved, torch.float32), lora)
    module = Medusa2Training(target, heads, medusa, config.texts.top_k, torch_dtype(config.engine.dtype))
    adapters = [parameter for parameter in target.parameters() if parameter.requires_grad]
    if config.head.frozen:
        heads.lm_heads.requires_grad_(False)

    def save(folder: Path, accuracies: tuple[tuple[float, ...], ...]) -> None:
        """Heads, adapters, and the target with the adapters merged into it, each by itself."""
        # The heads belong to the target as it is now, which has the embedding of the one it was.
        save_drafter(folder, heads, describe("target", source, corpus, accuracies))
        target.save_pretrained(folder / "adapter")
        copy.deepcopy(target).merge_and_unload().save_pretrained(folder / "target")
        for path in folder.rglob("*.safetensors"):
            let_others_read(path)

    trained = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    return Task(
        module,
        TokensOnly(corpus.training),
        TokensOnly(corpus.held_out),
        save,
        [(adapters, 1.0), (trained, medusa.head_lr_factor)],
    )


def _learned(batch: FeatureBatch) -> Tensor:
    """int64 [M], on the host: positions whose next token is a label, as indices into all texts back to back."""
    sizes = torch.tensor(batch.lengths)
    last = torch.zeros(len(batch.tokens), dtype=torch.bool)
    last[sizes.cumsum(0) - 1] = True
    following = torch.cat((batch.is_label[1:], torch.zeros(1, dtype=torch.bool)))
    return (following & ~last).nonzero().squeeze(1)
