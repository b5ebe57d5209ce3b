"""Reads a rank's part of every weight, fused the way the forward uses it, one matrix at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from outrider.workers.model import memory
from outrider.workers.model.embedding import Embedding, MatrixEmbedding, StoredEmbedding
from outrider.workers.model.head import Head, LinearHead
from outrider.workers.model.linear import Linear, PackedLinear, ProductKernels, make_linear
from outrider.workers.model.mlp import (
    ExpertLoop,
    Experts,
    GatedMlp,
    GroupedExperts,
    Mlp,
    RoutedExperts,
    aligned_columns,
)
from outrider.workers.model.quantized import JoinedLinear, make_scaled_linear
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.weights.config import DenseMlp, RoutedMlp
from outrider.workers.weights.quantization import format_of
from outrider.workers.weights.scaled import ScaledMatrix, joined
from outrider.workers.weights.source import WeightSource, head_name, read_into, read_scaled
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD, ROUTER, expert_prefix

ALL = slice(None)
READ_CHUNK_BYTES = 64 << 20
NO_BIAS = torch.empty(0)
DOWN = "down_proj.weight"  # behind an MLP's prefix


@dataclass(frozen=True)
class LayerWeights:
    """One layer on one rank. Q query heads and HK KV heads of size D.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv: hidden -> (Q + 2 HK) * D.
        q_norm, k_norm: [D]; empty when the model has none.
        attention_output: Q * D -> hidden, a partial sum over ranks.
        mlp: hidden -> hidden, a partial sum over ranks.
    """

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    attention_output: Linear
    mlp_norm: Tensor
    mlp: Mlp


@dataclass(frozen=True)
class ModelWeights:
    """All that one rank keeps of a model.

    Attributes:
        plan: which part that is.
        dtype: of weights and activations.
        device: where they are.
        embedding: of the ids `plan.vocab`.
        layers: first to last.
        final_norm: [hidden].
        head: logits of the ids `plan.vocab`.
        product_kernels: which kernels the layers' products run; `Transformer` fills it.
    """

    plan: ShardPlan
    dtype: torch.dtype
    device: torch.device
    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Head
    product_kernels: ProductKernels = field(default_factory=ProductKernels)


def ignore_bytes(num_bytes: int) -> None:
    """For a loader that nobody watches."""


def load_weights(
    plan: ShardPlan,
    source: WeightSource,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    progress: Callable[[int], None] = ignore_bytes,
    head: Head | None = None,
) -> ModelWeights:
    """Reads one rank's weights, the largest matrix first, so that the peak is their size plus one matrix.

    Args:
        plan: the model and the rank's part; source: where its weights are read from.
        dtype: of weights and activations.
        packed: keep matrices in the processor's blocked layout (CPU only).
        progress: called with the bytes of each weight read.
        head: instead of the model's own, which is then not read; None: its own.

    Raises:
        ValueError: a weight is missing.
    """
    loader = WeightLoader(plan, source, dtype, device, packed, progress)
    tied = plan.config.tied_embeddings
    ids = VocabularyRange(plan.vocab.start, plan.vocab.stop)
    is_own = head is None and head_name(source) == HEAD
    if head is None and is_own:
        # It may be as large as all layers together: not beside the embedding.
        head = LinearHead(loader.head(), ids)
    embedding: Embedding = StoredEmbedding(source, EMBEDDING, ids, dtype)
    # On a CPU an embedding stays in the checkpoint where it was also the head, and cannot be read from that.
    if head is None:
        matrix = loader.vocabulary_matrix(EMBEDDING)
        linear = loader.linear(matrix, NO_BIAS)
        head = LinearHead(linear, ids)
        if not isinstance(linear, PackedLinear):
            embedding = MatrixEmbedding(matrix, ids)
        del matrix
    elif not (tied and is_own and device.type == "cpu"):
        embedding = MatrixEmbedding(loader.vocabulary_matrix(EMBEDDING), ids)
    return ModelWeights(
        plan=plan,
        dtype=dtype,
        device=device,
        embedding=embedding,
        layers=tuple(loader.layer(index) for index in range(plan.config.num_layers)),
        final_norm=loader.vector(FINAL_NORM, ALL),
        head=head,
        product_kernels=loader.product_kernels,
    )


def load_head(
    plan: ShardPlan, source: WeightSource, dtype: torch.dtype, device: torch.device, packed: bool
) -> tuple[Tensor, Head]:
    """The weights of the final norm, [hidden], and the model's own LM head, without anything else of it."""
    loader = WeightLoader(plan, source, dtype, device, packed, ignore_bytes)
    is_own = head_name(source) == HEAD
    linear = loader.head() if is_own else loader.linear(loader.vocabulary_matrix(EMBEDDING), NO_BIAS)
    ids = VocabularyRange(plan.vocab.start, plan.vocab.stop)
    return loader.vector(FINAL_NORM, ALL), LinearHead(linear, ids)


class WeightLoader:
    """Reads weights of one rank from a source."""

    def __init__(
        self,
        plan: ShardPlan,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        progress: Callable[[int], None],
    ) -> None:
        self.plan = plan
        self.source = source
        self.dtype = dtype
        self.device = device
        self.packed = packed
        self.progress = progress
        self.product_kernels = ProductKernels()
        # Where matrices are put together. A model on the meta device has sizes and takes no memory.
        self._host = torch.device("meta" if device.type == "meta" else "cpu")

    def layer(self, index: int) -> LayerWeights:
        """Weights of one layer; what reading them took beside is given back."""
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        weights = LayerWeights(
            attention_norm=self.vector(prefix + "input_layernorm.weight", ALL),
            qkv=self._qkv(attention),
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            attention_output=self._attention_output(attention + "o_proj.weight"),
            mlp_norm=self.vector(prefix + "post_attention_layernorm.weight", ALL),
            mlp=self._mlp(prefix, self.plan.config.layers[index].mlp),
        )
        memory.release_freed()
        return weights

    def vector(self, name: str, rows: slice) -> Tensor:
        """A 1-D weight, or the part of it in `rows`."""
        values = self.source.read(name, rows, ALL, self.dtype)
        self.progress(values.nbytes)
        return values.to(self.device)

    def vocabulary_matrix(self, name: str) -> Tensor:
        """This rank's rows of the embedding or the head, [vocab_shard, hidden], read in pieces."""
        config, ids = self.plan.config, self.plan.vocab
        matrix = torch.empty(len(ids), config.hidden_size, dtype=self.dtype, device=self._host)
        self._read_rows_into(matrix, name, ids)
        return matrix.to(self.device)

    def head(self) -> Linear:
        """This rank's rows of a head that is not the embedding."""
        ids = self.plan.vocab
        scaled = self.scaled(HEAD, slice(ids.start, ids.stop), ALL)
        if scaled is not None:
            return self.scaled_linear(scaled, NO_BIAS)
        return self.linear(self.vocabulary_matrix(HEAD), NO_BIAS)

    def linear(self, weight: Tensor, bias: Tensor) -> Linear:
        """A matrix in the layout asked for; a bias of no elements means none."""
        return make_linear(weight.to(self.device), bias.to(self.device), self.packed)

    def scaled(self, name: str, rows: slice, columns: slice) -> ScaledMatrix | None:
        """A part of a matrix that is stored as narrow numbers; None for others."""
        matrix = read_scaled(self.source, name, rows, columns)
        if matrix is not None:
            self.progress(matrix.num_bytes)
        return matrix

    def scaled_linear(self, matrix: ScaledMatrix, bias: Tensor) -> Linear:
        """As `linear`, of narrow numbers."""
        matrix, bias = matrix.to(self.device), bias.to(self.device)
        only_drafts = self.plan.role == "draft"
        return make_scaled_linear(matrix, bias, self.dtype, self.packed, self.product_kernels, only_drafts)

    def _joined(self, parts: Sequence[tuple[ScaledMatrix | Tensor, Tensor]]) -> Linear:
        """Matrices [out, in] with their biases as one product; as several, where they are not stored alike."""
        linears: list[Linear] = []
        for _, run in groupby(parts, key=lambda part: _kind(part[0])):
            matrices, biases = zip(*run, strict=True)
            bias = torch.cat(biases)
            first = matrices[0]
            linears.append(
                self.linear(torch.cat(matrices), bias)
                if isinstance(first, Tensor)
                else self.scaled_linear(joined(matrices), bias)
            )
        return linears[0] if len(linears) == 1 else JoinedLinear(linears)

    def _read_rows_into(self, out: Tensor, name: str, rows: range) -> None:
        step = max(1, READ_CHUNK_BYTES // (out.shape[1] * out.itemsize))
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            into = out[start : start + len(piece)]
            read_into(self.source, name, slice(piece.start, piece.stop), ALL, into)
        self.progress(out.nbytes)

    def _head_norm(self, name: str) -> Tensor:
        return self.vector(name, ALL) if self.plan.config.qk_norm else torch.empty(0)

    def _qkv(self, prefix: str) -> Linear:
        config, plan = self.plan.config, self.plan
        D = config.head_dim
        parts = [
            (prefix + name, range(heads.start * D, heads.stop * D))
            for name, heads in (
                ("q_proj", plan.query_heads),
                ("k_proj", plan.kv_heads),
                ("v_proj", plan.kv_heads),
            )
        ]
        biases = [
            self.vector(f"{name}.bias", slice(rows.start, rows.stop)) if config.qkv_bias else NO_BIAS
            for name, rows in parts
        ]
        if any(self._is_scaled(f"{name}.weight") for name, _ in parts):
            matrices = [self._rows(f"{name}.weight", rows) for name, rows in parts]
            return self._joined(list(zip(matrices, biases, strict=True)))
        num_rows = sum(len(rows) for _, rows in parts)
        weight = torch.empty(num_rows, config.hidden_size, dtype=self.dtype, device=self._host)
        start = 0
        for name, rows in parts:
            self._read_rows_into(weight[start : start + len(rows)], f"{name}.weight", rows)
            start += len(rows)
        return self.linear(weight, torch.cat(biases))

    def _is_scaled(self, name: str) -> bool:
        return format_of(self.plan.config.quantization, name) is not None

    def _attention_output(self, name: str) -> Linear:
        heads, D = self.plan.query_heads, self.plan.config.head_dim
        return self._columns_linear(name, range(heads.start * D, heads.stop * D))

    def _mlp(self, prefix: str, described: DenseMlp | RoutedMlp) -> Mlp:
        if isinstance(described, DenseMlp):
            return self._gated(prefix + "mlp.", self.plan.mlp_columns(described.intermediate_size))
        columns = self.plan.expert_columns(described)
        router = self.source.read(prefix + ROUTER, ALL, ALL, torch.float32)
        self.progress(router.nbytes)
        numbers = self.plan.experts(described)
        prefixes = [prefix + expert_prefix(i) for i in numbers]
        experts: Experts
        if self.device.type == "cuda":
            experts = self._grouped(numbers[0], prefixes, columns)
        else:
            experts = ExpertLoop(numbers[0], [self._gated(name, columns) for name in prefixes])
        return RoutedExperts(
            router.to(self.device), described.experts_per_token, described.renormalised, experts
        )

    def _gated(self, prefix: str, columns: range) -> GatedMlp:
        hidden = self.plan.config.hidden_size
        names = [f"{prefix}{name}.weight" for name in ("gate_proj", "up_proj")]
        if any(map(self._is_scaled, names)):
            return GatedMlp(
                self._joined([(self._rows(name, columns), NO_BIAS) for name in names]),
                self._columns_linear(prefix + DOWN, columns),
            )
        gate_up = torch.empty(2, len(columns), hidden, dtype=self.dtype, device=self._host)
        self._read_rows_into(gate_up[0], prefix + "gate_proj.weight", columns)
        self._read_rows_into(gate_up[1], prefix + "up_proj.weight", columns)
        fused = self.linear(gate_up.view(-1, hidden), NO_BIAS)
        del gate_up
        return GatedMlp(fused, self._columns_linear(prefix + DOWN, columns))

    def _rows(self, name: str, rows: range) -> ScaledMatrix | Tensor:
        """Some rows of a matrix."""
        scaled = self.scaled(name, slice(rows.start, rows.stop), ALL)
        if scaled is not None:
            return scaled
        weight = torch.empty(len(rows), self.plan.config.hidden_size, dtype=self.dtype, device=self._host)
        self._read_rows_into(weight, name, rows)
        return weight

    def _columns_linear(self, name: str, columns: range) -> Linear:
        """Some columns of a matrix, a partial sum over ranks."""
        scaled = self.scaled(name, ALL, slice(columns.start, columns.stop))
        if scaled is not None:
            return self.scaled_linear(scaled, NO_BIAS)
        return self.linear(self._columns(name, columns), NO_BIAS)

    def _grouped(self, first: int, prefixes: list[str], columns: range) -> GroupedExperts:
        hidden, width = self.plan.config.hidden_size, aligned_columns(len(columns))
        # Columns that are added are zero, in all three matrices, and add nothing.
        gate_up = torch.zeros(len(prefixes), 2, width, hidden, dtype=self.dtype, device=self.device)
        down = torch.zeros(len(prefixes), hidden, width, dtype=self.dtype, device=self.device)
        for expert, prefix in enumerate(prefixes):
            for matrix, name in enumerate(("gate_proj", "up_proj")):
                self._read_rows_into(
                    gate_up[expert, matrix, : len(columns)], f"{prefix}{name}.weight", columns
                )
            down[expert, :, : len(columns)] = self._columns(prefix + DOWN, columns)
        return GroupedExperts(first, gate_up.flatten(1, 2), down)

    def _columns(self, name: str, columns: range) -> Tensor:
        weight = self.source.read(name, ALL, slice(columns.start, columns.stop), self.dtype)
        self.progress(weight.nbytes)
        return weight


def _kind(matrix: ScaledMatrix | Tensor) -> object:
    """Equal for matrices whose rows can be those of one."""
    return matrix.dtype if isinstance(matrix, Tensor) else matrix.kind
