"""The transformer, for target and drafter alike, on one tensor-parallel rank; its family is in its configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.kernels.add_rms_norm import add_rms_norm
from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.rms_norm import rms_norm
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.workers.link.communicator import Communicator
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.linear import pad_rows
from outrider.workers.model.loader import ModelWeights
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.model.whole_rounds import Written
from outrider.workers.weights.config import RoutedMlp


@dataclass(frozen=True)
class Hidden:
    """What a forward gives, one row for each row of its batch, in the model's dtype.

    Attributes:
        last: [N, hidden] that leave the last layer, before the final norm.
        taps: by layer, [N, hidden] that enter it, for the layers asked for. Layer 0 reads the embedding; the number
            of layers stands for `last`.
        logits: of this rank, float32 [N, vocab_shard], where they came along.
        sampled: what was sampled of these, where that came along, too.
    """

    last: Tensor
    taps: Mapping[int, Tensor]
    logits: Tensor | None = None
    sampled: Written | None = None

    def first(self, num_rows: int) -> "Hidden":
        """Of the first `num_rows` rows; no copy."""
        taps = {layer: rows[:num_rows] for layer, rows in self.taps.items()}
        logits = None if self.logits is None else self.logits[:num_rows]
        return Hidden(self.last[:num_rows], taps, logits, self.sampled)


class Transformer:
    """One rank's part of a model; every rank runs the same calls in the same order.

    Three sums over ranks: after the vocabulary-parallel embedding, after each attention, after each MLP.
    """

    def __init__(
        self, weights: ModelWeights, communicator: Communicator, kernels: KernelSelection = REFERENCES
    ) -> None:
        """Built once, of weights that are loaded and ranks that are connected.

        Args:
            communicator: of the ranks that share this model.
            kernels: which CUDA kernels to run, see `select_kernels`; the same on every rank, and for whoever else
                computes with these weights.
        """
        self.weights = weights
        self.communicator = communicator
        self.kernels = kernels
        weights.product_kernels.selection = kernels
        self.plan = weights.plan
        self.config = weights.plan.config
        self.device = weights.device
        self.dtype = weights.dtype
        self.scale = self.config.head_dim**-0.5
        # Most models have one kind of layer.
        kinds = list(dict.fromkeys(layer.rope for layer in self.config.layers))
        self._ropes = [RotaryEmbedding(self.config, rope, self.dtype, self.device) for rope in kinds]
        self._rope_of_layer = [kinds.index(layer.rope) for layer in self.config.layers]
        # Where a rank has only some of a KV head's query heads, attention has places for all.
        places = torch.tensor(self.plan.query_places, device=self.device)
        self._query_places = places if self.plan.has_empty_places else None
        layer = weights.layers[0]
        # Rows that are added would be sent to experts, too.
        is_routed = any(isinstance(layer.mlp, RoutedMlp) for layer in self.config.layers)
        self._pads = not is_routed and (layer.qkv.pads or layer.attention_output.pads)

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N] -> [N, hidden]."""
        embedding, use_kernel = self.weights.embedding, self.kernels.gather_rows
        if self.plan.size == 1:
            return embedding.rows(tokens, use_kernel)
        columns, here = embedding.vocabulary.columns(tokens)
        rows = embedding.rows(columns, use_kernel)
        return self.communicator.all_reduce(rows.masked_fill_(~here[:, None], 0.0))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: PagedCache, taps: Sequence[int] = ()) -> Hidden:
        """Runs all layers, writing the rows' keys and values.

        `taps`: layers whose inputs are wanted as well, from 0 to the number of layers, see `Hidden`.
        """
        hidden = self._padded(self.embed(batch.tokens))
        rotations = [rope(batch.positions) for rope in self._ropes]
        eps = self.config.rms_norm_eps
        tapped: dict[int, Tensor] = {}
        layers = self.weights.layers
        normed = rms_norm(hidden, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            if index in taps:
                tapped[index] = hidden
            attended = self._attention(index, normed, rotations[self._rope_of_layer[index]], batch, cache)
            attended = self.communicator.all_reduce(attended)
            hidden, normed = add_rms_norm(hidden, attended, layer.mlp_norm, eps, self.kernels.add_rms_norm)
            added = self.communicator.all_reduce(layer.mlp(normed, self.kernels.silu_mul))
            if index + 1 < len(layers):
                next_norm = layers[index + 1].attention_norm
                hidden, normed = add_rms_norm(hidden, added, next_norm, eps, self.kernels.add_rms_norm)
            else:
                hidden = hidden + added  # only rows that are asked for get the last norm, see `normed`
        if self.config.num_layers in taps:
            tapped[self.config.num_layers] = hidden
        return Hidden(hidden, tapped).first(batch.tokens.shape[0])

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        """Rows [M, hidden] of `Hidden.last` after the final norm, as the head reads them."""
        return rms_norm(hidden, self.weights.final_norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [M, hidden] of `Hidden.last` -> this rank's logits, float32 [M, vocab_shard]."""
        return self.weights.head(self.normed(hidden))

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """`logits` of these rows, int64, of a forward's [N, hidden]: float32 [len(rows), vocab_shard]."""
        return self.logits(gather_rows(hidden, rows, self.kernels.gather_rows))

    def _attention(
        self,
        index: int,
        normed: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        cache: PagedCache,
    ) -> Tensor:
        layer, described = self.weights.layers[index], self.config.layers[index]
        Q, HK, D = len(self.plan.query_heads), self.plan.num_kv_heads, self.config.head_dim
        heads = layer.qkv(normed).view(-1, Q + 2 * HK, D)[: batch.tree.num_queries]
        q, k, v = heads.split((Q, HK, HK), dim=1)
        if self.config.qk_norm:
            q = rms_norm(q, layer.q_norm, self.config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, self.config.rms_norm_eps)
        q = cache.append(index, q, k, v, rotation, batch.kv_rows, self.kernels.rope_append)
        if self._query_places is not None:
            places = q.new_zeros(len(q), self.plan.num_query_places, D)
            q = places.index_copy_(1, self._query_places, q)
        use_kernel = self.kernels.tree_attention
        out = cache.attend(index, q, batch.tree, self.scale, described.window, use_kernel)  # [N, HQ, D]
        if self._query_places is not None:
            out = out.index_select(1, self._query_places)
        return layer.attention_output(self._padded(out.flatten(1)))

    def _padded(self, rows: Tensor) -> Tensor:
        """The rows that products are made of, once for all that follow; attention leaves the added ones out."""
        return pad_rows(rows) if self._pads else rows
