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
from outrider.kernels.transfers import upload
from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION
from outrider.workers.draft_heads.eagle3 import default_taps
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter, ParallelLayer, ParallelShape
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.training.block_attention import Blocks, block_attention, plan_attention, plan_blocks
from outrider.workers.training.data import Corpus
from outrider.workers.training.eagle3 import active_columns
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.heads import HeadLoss, label_weights
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
        within = self.head_loss.has(self._labels(batch))
        return torch.tensor([float(within[laws].sum()) for _, laws in blocks.by_level()])

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """The loss: over levels k the sum of position_decay**k times the mean over labels.

        Args:
            totals: float32 [K], what each mean is divided by: labels of all ranks and forwards of this step.
            measure: also count how often the guesses are the target's choice; slower.
        """
        with torch.autocast(batch.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self._loss(batch, totals, measure)

    def _loss(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        drafter, device = self.drafter, batch.device
        blocks = self._blocks(batch)
        counts = StepCounts(self.num_guesses, len(batch.tokens), device)
        if not len(blocks.anchors):
            # The loss hangs on the weights in any case: ranks add up their gradients.
            return sum((0.0 * weight.sum() for weight in drafter.parameters()), counts.sums.sum()), counts
        levels = blocks.by_level()
        sizes = [len(laws) for _, laws in levels]
        learns_text = self.config.learns == "text" and not measure
        places, laws = (torch.cat(parts) for parts in zip(*levels, strict=True))
        labels = (self._labels(batch) if learns_text else batch.greedy)[laws]
        known = self.head_loss.has(labels)
        chains = [of_level - level for level, (_, of_level) in enumerate(levels)]
        # The law at a place is that of the token after it, which the token at the place stands before.
        places, previous, laws, columns, learned, *chains = upload(
            [
                places,
                batch.tokens[laws],
                laws,
                self.head_loss.columns(labels),
                known.nonzero().squeeze(1),
                *chains,
            ],
            device,
        )
        rows = self.rows_of(batch, blocks).flatten(0, 1).index_select(0, places)
        pair_rows = drafter.pair_rows(previous, rows)
        soft = _certain(columns) if learns_text else batch.soft.at(laws)
        weights = label_weights(self.config.position_decay, totals, sizes)
        loss, guesses = self.head_loss(
            rows, soft, learned, weights, measure, pair_rows, drafter.pair.successors()
        )
        if self.config.confidence_weight:
            said = drafter.confidence(rows, pair_rows)
            wrong = F.binary_cross_entropy_with_logits(said, guesses.acceptances, weights, reduction="sum")
            loss = loss + self.config.confidence_weight * wrong
        num_learned = [int(part.sum()) for part in known.split(sizes)]
        for level, of_level in enumerate(guesses.split(sizes)):
            if sizes[level]:
                counts.add(level, num_learned[level], of_level, chains[level])
        return loss, counts

    def rows_of(self, batch: FeatureBatch, blocks: Blocks) -> Tensor:
        """[A, K, hidden], what the LM head reads of the levels of blocks; of the batch, tokens and taps are read."""
        drafter, shape = self.drafter, self.drafter.shape
        size = shape.block_size
        if not len(blocks.anchors):
            return self._embedding[0].new_empty(0, self.num_guesses, shape.hidden_size)
        tokens = torch.full((len(blocks.anchors), size), shape.mask_token_id)
        tokens[:, 0] = batch.tokens[blocks.anchors]
        lengths = torch.tensor(batch.lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        tokens, of_context, of_slots = upload(
            [
                tokens.flatten(),
                torch.arange(len(starts)) - starts,
                (blocks.places[:, None] + torch.arange(size)).flatten(),
            ],
            batch.device,
        )
        context_rotation, slot_rotation = self._rotation(of_context), self._rotation(of_slots)
        features = drafter.features(batch.taps.to(self.dtype))
        plan = plan_attention(blocks, size, batch.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            context_k, context_v = drafter.context(layer, features)
            return block_attention(
                rotated(q, *slot_rotation),
                rotated(k, *slot_rotation),
                v,
                rotated(context_k, *context_rotation),
                context_v,
                plan,
                shape.layers[layer],
            )

        output: Tensor = drafter(self._embedding[0][tokens].to(self.dtype), attend)
        return output

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (table.to(self.dtype)[:, None] for table in self._rope(positions))
        return cos, sin

    def _blocks(self, batch: FeatureBatch) -> Blocks:
        """Those of this step, or of any measurement; of a batch always the same."""
        step = round(self._fraction * 1e9) if self.training else 0
        generator = torch.Generator().manual_seed(step * 1_000_003 + int(batch.tokens.sum()) % 1_000_003)
        return plan_blocks(batch.lengths, batch.is_label, self.num_guesses, self.config.anchors, generator)

    def _labels(self, batch: FeatureBatch) -> Tensor:
        """int64 [N]: at each place, the token after it that is to be learned: the target's choice, or the text's."""
        if self.config.learns == "law":
            return batch.greedy
        return torch.cat((batch.tokens[1:], batch.tokens[:1]))


def _certain(columns: Tensor) -> SoftTargets:
    """Laws of one token each, which is a logit of the head; the loss is not looked at where the head has no such."""
    return SoftTargets(columns[:, None], torch.zeros(len(columns), 1, device=columns.device))
