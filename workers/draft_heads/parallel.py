"""Parallel block drafters: one forward guesses all levels (DFlash, arXiv 2602.06036; DSpark, 2607.05147; JetSpec,
2606.18394; DFlash2).

A few layers run over a block of slots: the last known token, the anchor, and mask tokens behind it. Of the known
tokens before the anchor they see keys and values made of the target's hidden rows, at the tokens' own positions,
which is all that is kept of a text. A slot's output gives logits of one level. A pair term adds to them what the
token before says, so that a node's children depend on the node at no further forward.

The literal picture, tokens a b c d, of which the target has read a b c, so that d is the anchor:

    context rows   a b c       from the target's rows, positions 0 1 2
    slots          d _ _ _     positions 3 4 5 6
    first_slot 0   slot 0 guesses the token after d (level 0), slot 1 the one after that (level 1), …
    first_slot 1   slot 0 guesses nothing; slot 1 guesses the token after d (level 0), …
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from outrider.workers.draft_heads.convolutions import BlockConvolution, ConvolutionShape
from outrider.workers.draft_heads.eagle3 import GatedMlp, RmsNorm
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.draft_heads.mtp import Attention
from outrider.workers.draft_heads.pairs import PairShape, make_pair_term
from outrider.workers.weights.config import DenseMlp, LayerConfig, ModelConfig, Rope

MAX_BLOCK = 64  # slots: one word of a mask

AttendBlock = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q [N, HQ, D], k and v [N, HK, D] of slots, before rotary embedding -> [N, HQ * D]: the server attends over
its paged cache, the trainer over the rows of a whole text."""

ConfidenceKind = Literal["none", "hidden", "hidden_and_pair"]

SUCCESSOR_ROWS = ("pair.markov_w2.weight", "pair.successor_codebook")
"""The weights, besides those of the LM head, that have a row for each of its ids."""


@dataclass(frozen=True)
class BlockLayer:
    """What may differ between the layers of a drafter.

    Attributes:
        is_causal: a slot sees itself and those before it in its block, not those behind.
        window: positions that a slot sees, its own included; 0 for all.
        window_from_anchor: all slots of a block see what its anchor sees, whose window it is.
    """

    is_causal: bool
    window: int = 0
    window_from_anchor: bool = False


@dataclass(frozen=True)
class ParallelShape:
    """Sizes of a parallel drafter.

    Attributes:
        hidden_size: the drafter's, and that of the embedding rows it reads, which are the target's.
        target_hidden_size: of each tap.
        vocab_size: the target's.
        taps: the target's layers whose *inputs* are read, as in `Hidden.taps`.
        num_heads, num_kv_heads, head_dim, intermediate_size, rms_norm_eps: of its layers.
        rope: its rotary positions.
        max_context: longest text that the positions are meant for, tokens.
        layers: first to last.
        block_size: slots.
        first_slot: the slot that guesses level 0, see the picture in the module; 0 or 1.
        num_levels: that are guessed: no more than there are slots from `first_slot` on.
        mask_token_id: what stands in all slots but the first.
        lm_head: sizes of the LM head.
        pair: of the pair term.
        confidence: what a guess of how often each level is right reads.
        convolution: around attention and MLP.
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
    layers: tuple[BlockLayer, ...]
    block_size: int
    first_slot: int
    num_levels: int
    mask_token_id: int
    lm_head: LmHeadShape
    pair: PairShape
    confidence: ConfidenceKind
    convolution: ConvolutionShape

    def __post_init__(self) -> None:
        assert 0 < self.num_levels <= self.block_size - self.first_slot
        assert self.block_size <= MAX_BLOCK
        assert self.pair.is_there or self.confidence != "hidden_and_pair"

    @property
    def model(self) -> ModelConfig:
        """The drafter as a model, which is what its cache and its positions are made for."""
        mlp = DenseMlp(self.intermediate_size)
        return ModelConfig(
            architecture="qwen3",
            layers=tuple(LayerConfig(layer.window, self.rope, mlp) for layer in self.layers),
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            max_context=self.max_context,
            tied_embeddings=False,
            qkv_bias=False,
            qk_norm=True,
        )


class ParallelLayer(nn.Module):
    """One layer over the slots of blocks, as Qwen3's, with convolutions where the drafter has them."""

    def __init__(self, shape: ParallelShape, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape.model)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GatedMlp(shape.hidden_size, shape.intermediate_size)
        if shape.convolution.is_there:
            self.attention_conv, self.mlp_conv = (
                BlockConvolution(shape.hidden_size, shape.block_size, shape.convolution) for _ in range(2)
            )

    def forward(self, hidden: Tensor, attend: AttendBlock) -> Tensor:
        def attention(x: Tensor) -> Tensor:
            out: Tensor = self.self_attn(x, lambda q, k, v: attend(self.index, q, k, v))
            return out

        hidden = hidden + self._around("attention_conv", attention, self.input_layernorm(hidden))
        out: Tensor = hidden + self._around("mlp_conv", self.mlp, self.post_attention_layernorm(hidden))
        return out

    def context(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, HK, D] of known tokens, keys before rotary embedding; features: [N, hidden]."""
        attention = self.self_attn
        k, v = (
            project(features).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.k_proj, attention.v_proj)
        )
        return attention.k_norm(k), v

    def _around(self, name: str, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not hasattr(self, name):
            return inner(x)
        out: Tensor = getattr(self, name)(x, inner)
        return out


class ConfidenceHead(nn.Module):
    """The logit of how often a level is right, given that those before it are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.proj(rows)[..., 0]
        return out


class ParallelDrafter(nn.Module):
    """The drafter without the embedding, which is the target's.

    Attributes:
        fc, hidden_norm: the target's taps side by side -> a feature, of which all layers make keys and values.
        layers: over the slots.
        norm, lm_head: from a slot's output to logits.
        markov_head or candidate_selector: `pair`, where the drafter has one.
        shares_lm_head: the LM head is the target's rows of its ids, and no part of the checkpoint.
    """

    def __init__(self, shape: ParallelShape, ids: Tensor) -> None:
        """`ids`: int64 [shape.lm_head.num_ids], the target's token of each logit, ascending."""
        super().__init__()
        self.shape = shape
        hidden_size, eps = shape.hidden_size, shape.rms_norm_eps
        self.fc = nn.Linear(len(shape.taps) * shape.target_hidden_size, hidden_size, bias=False)
        self.hidden_norm, self.norm = RmsNorm(hidden_size, eps), RmsNorm(hidden_size, eps)
        self.layers = nn.ModuleList(ParallelLayer(shape, index) for index in range(len(shape.layers)))
        self.lm_head = make_lm_head(shape.lm_head, ids)
        self.shares_lm_head = False
        self.pair = make_pair_term(shape.pair, hidden_size, shape.vocab_size, shape.lm_head.num_ids)
        if shape.confidence != "none":
            extra = shape.pair.rank if shape.confidence == "hidden_and_pair" else 0
            self.confidence_head = ConfidenceHead(hidden_size + extra)

    def take_target(self, head: Tensor) -> None:
        """Gives the drafter the rows [V', hidden] of the target's LM head, where it shares them."""
        assert self.shares_lm_head
        self.lm_head.load_state_dict({"weight": head}, assign=True)

    def features(self, taps: Tensor) -> Tensor:
        """The target's rows [N, taps * target_hidden_size], in the order of `shape.taps` -> features [N, hidden]."""
        features: Tensor = self.hidden_norm(self.fc(taps))
        return features

    def context(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """What layer `layer` sees of known tokens: see `ParallelLayer.context`."""
        own = self.layers[layer]
        assert isinstance(own, ParallelLayer)
        return own.context(features)

    def forward(self, embedded: Tensor, attend: AttendBlock) -> Tensor:
        """Embedding rows [S * block_size, hidden] of the slots of S blocks -> what the LM head reads
        [S, num_levels, hidden]."""
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, attend)
        first = self.shape.first_slot
        levels = hidden.unflatten(0, (-1, self.shape.block_size))[:, first : first + self.shape.num_levels]
        out: Tensor = self.norm(levels)
        return out

    def logits(self, output: Tensor) -> Tensor:
        """Rows [M, hidden] of levels -> logits [M, V'], without the pair term."""
        logits: Tensor = self.lm_head(output)
        return logits

    def pair_rows(self, previous: Tensor, output: Tensor) -> Tensor:
        """[M, rank]: what the pair term makes of the tokens int64 [M] before levels whose rows are `output`."""
        rows: Tensor = self.pair.rows(previous, output)
        return rows

    def with_pair(self, logits: Tensor, pair_rows: Tensor) -> Tensor:
        """Logits [M, V'] after the tokens that `pair_rows` [M, rank] were made of."""
        out: Tensor = self.pair(logits, pair_rows)
        return out

    def confidence(self, output: Tensor, pair_rows: Tensor) -> Tensor:
        """float32 [M], the logit of how often each level is right; pair_rows: see `pair_rows`, [M, 0] without any."""
        reads_pair = self.shape.confidence == "hidden_and_pair"
        rows = torch.cat((output, pair_rows.to(output.dtype)), dim=-1) if reads_pair else output
        out: Tensor = self.confidence_head(rows).float()
        return out
