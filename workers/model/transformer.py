"""The transformer, for target and drafter alike: Llama, Qwen2 and Qwen3 on one tensor-parallel rank."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.rope_append import rope_append
from outrider.kernels.selection import REFERENCES, KernelSelection
from outrider.kernels.tree_attention import tree_attention
from outrider.workers.link.communicator import Communicator
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.linear import pad_rows
from outrider.workers.model.loader import EMBEDDING, HEAD, NO_BIAS, LayerWeights, WeightLoader
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource


def _no_progress(num_bytes: int) -> None:
    pass


class Transformer:
    """One rank's part of a model; every rank runs the same calls in the same order.

    Three sums over ranks: after the vocabulary-parallel embedding, after each attention, after each MLP.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: ShardPlan,
        source: WeightSource,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        progress: Callable[[int], None] = _no_progress,
        kernels: KernelSelection = REFERENCES,
    ) -> None:
        """Loads this rank's weights, the largest matrix first, so that the peak is their size plus one matrix.

        Args:
            config: the model; plan: this rank's part; source: where its weights are read from.
            communicator: of the ranks that share this model.
            dtype: of weights and activations.
            packed: keep matrices in the processor's blocked layout (CPU only).
            progress: called with the bytes of each weight read.
            kernels: which CUDA kernels to run, see `select_kernels`.

        Raises:
            ValueError: a weight is missing or has another shape than the configuration says.
        """
        self.config = config
        self.plan = plan
        self.source = source
        self.communicator = communicator
        self.dtype = dtype
        self.kernels = kernels
        self.device = device
        self.rope = RotaryEmbedding(config, dtype, device)
        self.scale = config.head_dim**-0.5
        loader = WeightLoader(plan, source, dtype, device, packed, progress)
        matrix = loader.vocabulary_matrix(EMBEDDING if config.tied_embeddings else HEAD)
        self.head = loader.linear(matrix, NO_BIAS)
        # Rows cannot be read from a packed matrix: tied embedding rows then come from the source on demand.
        self.embeds_from_source = config.tied_embeddings and self.head.packed
        if self.embeds_from_source:
            matrix = torch.empty(0)
        elif not config.tied_embeddings:
            matrix = loader.vocabulary_matrix(EMBEDDING)
        self.embedding = matrix
        self.final_norm = loader.vector("model.norm.weight", slice(None))
        self.layers = [loader.layer(index) for index in range(config.num_layers)]

    @torch.inference_mode()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N] -> [N, hidden]."""
        if self.plan.size == 1:
            return self._embedding_rows(tokens)
        first, last = self.plan.vocab.start, self.plan.vocab.stop
        foreign = (tokens < first) | (tokens >= last)
        rows = self._embedding_rows(tokens.masked_fill(foreign, first))
        return self.communicator.all_reduce(rows.masked_fill_(foreign[:, None], 0.0))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: PagedCache) -> Tensor:
        """Runs all layers, writing the rows' keys and values: [N, hidden] before the final norm."""
        num_rows = batch.tokens.shape[0]
        hidden = self._padded(self.embed(batch.tokens))
        cos, sin = self.rope(batch.positions)
        eps = self.config.rms_norm_eps
        width = (self.config.hidden_size,)
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(hidden, width, layer.attention_norm, eps)
            attended = self._attention(layer, normed, cos, sin, batch, cache.keys(index), cache.values(index))
            hidden = hidden + self.communicator.all_reduce(attended)
            normed = F.rms_norm(hidden, width, layer.mlp_norm, eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + self.communicator.all_reduce(layer.down(F.silu(gate) * up))
        return hidden[:num_rows]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows [M, hidden] as `forward` returns them -> this rank's logits, float32 [M, vocab_shard]."""
        normed = F.rms_norm(hidden, (self.config.hidden_size,), self.final_norm, self.config.rms_norm_eps)
        return self.head(normed).float()

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """`logits` of these rows of a forward's [N, hidden]: float32 [len(rows), vocab_shard]."""
        index = torch.tensor(rows, dtype=torch.int64, device=hidden.device)
        return self.logits(gather_rows(hidden, index, self.kernels.gather_rows))

    def _attention(
        self,
        layer: LayerWeights,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        k_pages: Tensor,
        v_pages: Tensor,
    ) -> Tensor:
        HQ, HK, D = self.plan.num_query_places, self.plan.num_kv_heads, self.config.head_dim
        heads = layer.qkv(normed).view(-1, HQ + 2 * HK, D)[: batch.tree.num_queries]
        q, k, v = heads.split((HQ, HK, HK), dim=1)
        if self.config.qk_norm:
            q = F.rms_norm(q, (D,), layer.q_norm, self.config.rms_norm_eps)
            k = F.rms_norm(k, (D,), layer.k_norm, self.config.rms_norm_eps)
        q = rope_append(q, k, v, cos, sin, batch.slots, k_pages, v_pages, self.kernels.rope_append)
        out = tree_attention(  # [N, HQ, D]
            q, k_pages, v_pages, batch.tree, self.scale, use_kernel=self.kernels.tree_attention
        )
        return layer.attention_output(self._padded(out.flatten(1)))

    def _padded(self, rows: Tensor) -> Tensor:
        """The rows that products are made of, once for all that follow; attention leaves the added ones out."""
        return pad_rows(rows) if self.head.pads else rows

    def _embedding_rows(self, tokens: Tensor) -> Tensor:
        """Rows of ids that this rank holds, [N, hidden]."""
        if self.embeds_from_source:
            return self.source.read_rows(EMBEDDING, tokens, self.dtype)
        return gather_rows(self.embedding, tokens - self.plan.vocab.start, self.kernels.gather_rows)
