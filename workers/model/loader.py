"""Reads a rank's part of every weight, fused the way the forward uses it, one matrix at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.workers.model import memory
from outrider.workers.model.linear import Linear
from outrider.workers.model.shard import ShardPlan
from outrider.workers.weights.source import WeightSource

ALL = slice(None)
READ_CHUNK_BYTES = 64 << 20
NO_BIAS = torch.empty(0)


@dataclass(frozen=True)
class LayerWeights:
    """One layer on one rank. HQ query places and HK KV heads of size D, I MLP columns.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv: hidden -> (HQ + 2 HK) * D.
        q_norm, k_norm: [D]; empty when the model has none.
        attention_output: HQ * D -> hidden, a partial sum over ranks.
        gate_up: hidden -> 2 I, gates first.
        down: I -> hidden, a partial sum over ranks.
    """

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor
    k_norm: Tensor
    attention_output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


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

    def layer(self, index: int) -> LayerWeights:
        """Weights of one layer; what reading them took beside is given back."""
        prefix = f"model.layers.{index}."
        attention = prefix + "self_attn."
        columns = self.plan.mlp_columns(self.plan.config.layers[index].mlp.intermediate_size)
        weights = LayerWeights(
            attention_norm=self.vector(prefix + "input_layernorm.weight", ALL),
            qkv=self._qkv(attention),
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            attention_output=self._attention_output(attention + "o_proj.weight"),
            mlp_norm=self.vector(prefix + "post_attention_layernorm.weight", ALL),
            gate_up=self._gate_up(prefix + "mlp.", columns),
            down=self._down(prefix + "mlp.down_proj.weight", columns),
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
        matrix = torch.empty(len(ids), config.hidden_size, dtype=self.dtype)
        self._read_rows_into(matrix, name, ids)
        return matrix.to(self.device)

    def linear(self, weight: Tensor, bias: Tensor) -> Linear:
        """A matrix in the layout asked for; a bias of no elements means none."""
        return Linear(weight.to(self.device), bias.to(self.device), self.packed)

    def _read_rows_into(self, out: Tensor, name: str, rows: range) -> None:
        step = max(1, READ_CHUNK_BYTES // (out.shape[1] * out.itemsize))
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            out[start : start + len(piece)] = self.source.read(
                name, slice(piece.start, piece.stop), ALL, self.dtype
            )
        self.progress(out.nbytes)

    def _head_norm(self, name: str) -> Tensor:
        return self.vector(name, ALL) if self.plan.config.qk_norm else torch.empty(0)

    def _qkv(self, prefix: str) -> Linear:
        config, plan = self.plan.config, self.plan
        D, HQ, HK = config.head_dim, plan.num_query_places, plan.num_kv_heads
        weight = torch.zeros(HQ + 2 * HK, D, config.hidden_size, dtype=self.dtype)
        bias = torch.zeros(HQ + 2 * HK, D, dtype=self.dtype)
        places = {
            "q_proj": (plan.query_heads, list(plan.query_places)),
            "k_proj": (plan.kv_heads, list(range(HQ, HQ + HK))),
            "v_proj": (plan.kv_heads, list(range(HQ + HK, HQ + 2 * HK))),
        }
        for name, (heads, into) in places.items():
            rows = slice(heads.start * D, heads.stop * D)
            read = self.source.read(f"{prefix}{name}.weight", rows, ALL, self.dtype)
            weight[into] = read.view(len(heads), D, -1)
            self.progress(read.nbytes)
            if config.qkv_bias:
                bias[into] = self.vector(f"{prefix}{name}.bias", rows).cpu().view(len(heads), D)
        bias = bias.view(-1) if config.qkv_bias else NO_BIAS
        return self.linear(weight.view(-1, config.hidden_size), bias)

    def _attention_output(self, name: str) -> Linear:
        config, plan = self.plan.config, self.plan
        D, heads = config.head_dim, plan.query_heads
        weight = torch.zeros(config.hidden_size, plan.num_query_places, D, dtype=self.dtype)
        read = self.source.read(name, ALL, slice(heads.start * D, heads.stop * D), self.dtype)
        weight[:, list(plan.query_places)] = read.view(config.hidden_size, len(heads), D)
        self.progress(read.nbytes)
        return self.linear(weight.view(config.hidden_size, -1), NO_BIAS)

    def _gate_up(self, prefix: str, columns: range) -> Linear:
        hidden = self.plan.config.hidden_size
        weight = torch.empty(2, len(columns), hidden, dtype=self.dtype)
        self._read_rows_into(weight[0], prefix + "gate_proj.weight", columns)
        self._read_rows_into(weight[1], prefix + "up_proj.weight", columns)
        return self.linear(weight.view(-1, hidden), NO_BIAS)

    def _down(self, name: str, columns: range) -> Linear:
        read = self.source.read(name, ALL, slice(columns.start, columns.stop), self.dtype)
        self.progress(read.nbytes)
        return self.linear(read, NO_BIAS)
