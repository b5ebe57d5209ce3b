"""Parallel drafters in training (DFlash, arXiv 2602.06036; DSpark, 2607.05147; JetSpec, 2606.18394).

Blocks stand at random anchors of texts that the target wrote, and learn its law at the places that their levels
guess; the pair term reads the text's own tokens, so that every level is measured given that those before it are
right, as a node of a tree is verified. See the picture in `block_attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.configs.training import ParallelConfig
from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION
from outrider.workers.draft_heads.eagle3 import default_taps
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter, ParallelLayer, ParallelShape
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.training.block_attention import Blocks, block_attention, plan_blocks
from outrider.workers.training.data import Corpus
from outrider.workers.training.eagle3 import active_columns
from outrider.workers.training.feature_store import FeatureBatch
from outrider.workers.training.heads import HeadLoss
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.unrolled import rotated
from outrider.workers.training.vocabulary_loss import SoftTargets
from outrider.workers.weights.config import DenseMlp, ModelConfig
from outrider.workers.weights.source import WeightSource

_ALL = slice(None)


def drafter_shape(target: ModelConfig, head: LmHeadShape, config: ParallelConfig) -> ParallelShape:
    """A drafter whose layers are like the target's last one. Raises ValueError for options that do not fit it."""
    taps = config.taps or default_taps(target.num_layers)
    if not all(0 < tap <= target.num_layers for tap in taps):
        raise ValueError(f"parallel.taps must be from 1 to {target.num_layers}, got {taps}")
    if not 0 <= config.mask_token_id < target.vocab_size:
        raise ValueError(
            f"parallel.mask_token_id must be below {target.vocab_size}, got {config.mask_token_id}"
        )
    if config.mask_token_id in target.eos_token_ids:
        raise ValueError(f"parallel.mask_token_id must end no text, got {config.mask_token_id}")
    layer = target.layers[-1]
    first_slot = 0 if config.anchor_guesses else 1
    pair = PairShape("markov", config.pair_rank) if config.pair_rank else NO_PAIR
    return ParallelShape(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        taps=taps,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        intermediate_size=active_columns(layer.mlp),
        rms_norm_eps=target.rms_norm_eps,
        rope=layer.rope,
        max_context=target.max_context,
        layers=(BlockLayer(config.causal),) * config.num_layers,
        block_size=config.block_size,
        first_slot=first_slot,
        num_levels=config.block_size - first_slot,
        mask_token_id=config.mask_token_id,
        lm_head=head,
        pair=pair,
        confidence="none"
        if not config.confidence_weight
        else "hidden_and_pair"
        if pair.is_there
        else "hidden",
        convolution=NO_CONVOLUTION,
    )


def check_mask_token(config: ParallelConfig, corpus: Corpus) -> None:
    """Raises ValueError if texts have the token that stands for those that are not known."""
    for text in (*corpus.training, *corpus.held_out):
        if (text.tokens == config.mask_token_id).any():
            raise ValueError(
                f"parallel.mask_token_id must be a token that no text has, got {config.mask_token_id}"
            )


@torch.no_grad()
def start_from_last_layers(drafter: ParallelDrafter, source: WeightSource) -> None:
    """Makes the layers the target's last ones, whose keys and values are of the last tap at first. Their queries and
    keys are normed here, whatever the target does. Of a target's experts nothing is taken."""
    last = source.config.num_layers

    def read(name: str) -> Tensor:
        return source.read(name, _ALL, _ALL, torch.float32)

    for layer in drafter.layers:
        assert isinstance(layer, ParallelLayer)
        number = max(0, last - len(drafter.layers) + layer.index)
        prefix = f"model.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.copy_(read(f"{prefix}self_attn.{name}.weight"))
        if isinstance(source.config.layers[number].mlp, DenseMlp):
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).weight.copy_(read(f"{prefix}mlp.{name}.weight"))
        layer.input_layernorm.weight.copy_(read(f"{prefix}input_layernorm.weight"))
        layer.post_attention_layernorm.weight.copy_(read(f"{prefix}post_attention_layernorm.weight"))
    drafter.hidden_norm.weight.copy_(read(f"model.layers.{last - 1}.input_layernorm.weight"))
    drafter.norm.weight.copy_(read("model.norm.weight"))
    hidden = drafter.shape.hidden_size
    drafter.fc.weight.normal_(std=0.01)
    drafter.fc.weight[:, -hidden:] += torch.eye(hidden)


class ParallelTraining(nn.Module):
    """A drafter and its loss over the levels of blocks.

    Attributes:
        drafter: what is trained.
        head_loss: of its LM head and pair term.
    """

    def __init__(
        self, drafter: ParallelDrafter, embedding: Tensor, config: ParallelConfig, dtype: torch.dtype
    ) -> None:
        """embedding: [V, hidden], the target's, which is not trained. dtype: of products."""
        super().__init__()
        self.drafter = drafter
        self.head_loss = HeadLoss(drafter.lm_head, config.loss)
        self.config = config
        self.dtype = dtype
        self._embedding = [embedding]  # in a list: no part of what is trained, saved or shared out
        self._rope = RotaryEmbedding(drafter.shape.model, drafter.shape.rope, torch.float32, embedding.device)
        self._fraction = 0.0

    @property
    def num_guesses(self) -> int:
        """Levels."""
        return self.drafter.shape.num_levels

    def set_progress(self, fraction: float) -> None:
        """Every step has other anchors, the same when it is taken again."""
        self._fraction = fraction

    def count_labels(self, batch: FeatureBatch) -> Tensor:
        """float32 [K]: of a batch, how many labels each level's loss is the mean over."""
        blocks = self._blocks(batch)
        within = self.head_loss.has(self._labels(batch)).cpu()
        counts = []
        for level in range(self.num_guesses):
            laws = blocks.anchors[blocks.learned[:, level]] + level
            counts.append(float(within[laws].sum()))
        return torch.tensor(counts)

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """The loss: over levels k the sum of position_decay**k times the mean over labels.

        Args:
            totals: float32 [K], what each mean is divided by: labels of all ranks and forwards of this step.
            measure: also count how often the guesses are the target's choice; slower.
        """
        device = batch.tokens.device
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self._loss(batch, totals, measure)

    def _loss(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        drafter, device = self.drafter, batch.tokens.device
        blocks = self._blocks(batch)
        counts = StepCounts(self.num_guesses, batch.soft.columns.shape[0], device)
        loss = torch.zeros((), device=device)
        if not len(blocks.anchors):
            # The loss hangs on the weights in any case: ranks add up their gradients.
            return sum((0.0 * weight.sum() for weight in drafter.parameters()), loss), counts
        output = self._output(batch, blocks)  # [A, K, hidden]
        for level in range(self.num_guesses):
            learned = blocks.learned[:, level]
            laws = (blocks.anchors[learned] + level).to(device)
            if not len(laws):
                break
            rows = output[learned.to(device), level]
            # The law at a place is that of the token after it, which the token at the place stands before.
            pair_rows = drafter.pair_rows(batch.tokens[laws], rows)
            soft, labels = batch.soft.at(laws), batch.greedy[laws]
            if self.config.learns == "text" and not measure:
                labels = self._labels(batch)[laws]
                soft = self._certain(labels)
            value, guess = self.head_loss(rows, soft, labels, measure, pair_rows, drafter.pair.successors())
            counts.add(level, value, guess, laws - level)
            if self.config.confidence_weight:
                said = drafter.confidence(rows, pair_rows)
                wrong = F.binary_cross_entropy_with_logits(said, guess.acceptances, reduction="sum")
                value = value + self.config.confidence_weight * wrong
            loss = loss + self.config.position_decay**level * value / totals[level].clamp(min=1.0)
        return loss, counts

    def _output(self, batch: FeatureBatch, blocks: Blocks) -> Tensor:
        drafter, shape, device = self.drafter, self.drafter.shape, batch.tokens.device
        size = shape.block_size
        features = drafter.features(batch.taps.to(self.dtype))
        tokens = torch.full((len(blocks.anchors), size), shape.mask_token_id, device=device)
        tokens[:, 0] = batch.tokens[blocks.anchors.to(device)]
        lengths = torch.tensor(batch.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        of_context = self._rotation(torch.arange(len(starts)) - starts, device)
        of_slots = self._rotation((blocks.places[:, None] + torch.arange(size)).flatten(), device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            context_k, context_v = drafter.context(layer, features)
            return block_attention(
                rotated(q, *of_slots),
                rotated(k, *of_slots),
                v,
                rotated(context_k, *of_context),
                context_v,
                blocks,
                shape.layers[layer],
            )

        output: Tensor = drafter(self._embedding[0][tokens.flatten()].to(self.dtype), attend)
        return output

    def _rotation(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = (table.to(self.dtype)[:, None] for table in self._rope(positions.to(device)))
        return cos, sin

    def _blocks(self, batch: FeatureBatch) -> Blocks:
        """Those of this step, or of any measurement; of a batch always the same."""
        step = round(self._fraction * 1e9) if self.training else 0
        generator = torch.Generator().manual_seed(step * 1_000_003 + int(batch.tokens.sum()) % 1_000_003)
        is_label = batch.is_label.cpu()
        return plan_blocks(batch.lengths, is_label, self.num_guesses, self.config.anchors, generator)

    def _labels(self, batch: FeatureBatch) -> Tensor:
        """int64 [N]: at each place, the token after it that is to be learned: the target's choice, or the text's."""
        if self.config.learns == "law":
            return batch.greedy
        return torch.cat((batch.tokens[1:], batch.tokens[:1]))

    def _certain(self, labels: Tensor) -> SoftTargets:
        """Laws of one token each; the loss is not looked at where the head does not have it."""
        ids = self.drafter.lm_head.ids.to(labels.device)
        columns = torch.searchsorted(ids, labels).clamp(max=len(ids) - 1)
        return SoftTargets(columns[:, None], torch.zeros(len(labels), 1, device=labels.device))
