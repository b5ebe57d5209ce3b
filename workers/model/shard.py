"""Who holds what: the part of a model that one tensor-parallel rank computes, without asking for divisibility."""

import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from outrider.workers.weights.config import DenseMlp, ModelConfig, RoutedMlp
from outrider.workers.weights.sizes import PLAIN_BYTES, attention_bytes, mlp_bytes

MLP_BLOCK = 128
VOCAB_BLOCK = 64


@dataclass(frozen=True)
class ShardPlan:
    """Rank `rank` of `size` of a model.

    Query heads are split contiguously and as evenly as they go. A rank holds every KV head that one of its query
    heads reads, so a KV head may be on two ranks. Kernels want the same number G of query heads for each KV head,
    so where a rank holds only some of a KV head's query heads the others' places stay empty in attention; no weight
    belongs to them. The MLP is split in blocks of 128 columns (smaller ones for small models), so that the weights of
    all ranks take the same number of bytes: who has more heads gets fewer columns. The vocabulary is split in blocks
    of 64. Experts are split by expert where their number divides, else each of them by columns, as an MLP.

    Example: 9 query heads on 3 KV heads, 2 ranks. Rank 0 has heads 0-4, KV heads 0 and 1, G = 3, places
    [0 1 2 | 3 4 .]; rank 1 has heads 5-8, KV heads 1 and 2, places [5 . . | 6 7 8].

    Raises:
        ValueError: more ranks than query heads, or than blocks to share out.
    """

    config: ModelConfig
    rank: int
    size: int
    role: Literal["target", "draft"] = "target"  # whose ranks, for the error

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)
        narrowest = min(self._num_parts(layer.mlp) for layer in self.config.layers)
        limit = min(self.config.num_heads, narrowest, self.config.vocab_size)
        if self.size > limit:
            raise ValueError(
                f"{self.role}.tp_size must be at most {limit} for this model (its query heads), got {self.size}"
            )

    @cached_property
    def query_heads(self) -> range:
        """Query heads of the whole model that this rank computes."""
        return _share(self.config.num_heads, self.rank, self.size)

    @cached_property
    def kv_heads(self) -> range:
        """KV heads of the whole model that this rank holds."""
        per_kv_head = self.config.num_heads // self.config.num_kv_heads
        return range(self.query_heads[0] // per_kv_head, self.query_heads[-1] // per_kv_head + 1)

    @cached_property
    def queries_per_kv_head(self) -> int:
        """G: places for query heads per local KV head."""
        return max(len(self._readers(kv_head)) for kv_head in self.kv_heads)

    @property
    def num_kv_heads(self) -> int:
        """Local KV heads."""
        return len(self.kv_heads)

    @property
    def num_query_places(self) -> int:
        """Places for query heads in attention, empty ones included: G * num_kv_heads."""
        return self.queries_per_kv_head * self.num_kv_heads

    @property
    def has_empty_places(self) -> bool:
        """Whether attention has more places than this rank has query heads."""
        return self.num_query_places > len(self.query_heads)

    @cached_property
    def query_places(self) -> tuple[int, ...]:
        """Local place of each of `query_heads`, in order."""
        return tuple(
            local * self.queries_per_kv_head + i
            for local, kv_head in enumerate(self.kv_heads)
            for i in range(len(self._readers(kv_head)))
        )

    def experts(self, mlp: RoutedMlp) -> range:
        """The experts of which this rank has a part."""
        if not self._splits_by_expert(mlp):
            return range(mlp.num_experts)
        return _share(mlp.num_experts, self.rank, self.size)

    def expert_columns(self, mlp: RoutedMlp) -> range:
        """Columns of this rank of each of its `experts`."""
        if self._splits_by_expert(mlp):
            return range(mlp.intermediate_size)
        return self.mlp_columns(mlp.intermediate_size)

    def mlp_columns(self, intermediate_size: int) -> range:
        """Columns of this rank of an MLP that has `intermediate_size` of them."""
        if intermediate_size not in self._columns:
            self._columns[intermediate_size] = self._share_columns(intermediate_size)
        return self._columns[intermediate_size]

    @cached_property
    def vocab(self) -> range:
        """Token ids whose embedding row and logit this rank holds."""
        return _share_blocks(self.config.vocab_size, VOCAB_BLOCK, self.rank, self.size)

    @cached_property
    def _columns(self) -> dict[int, range]:
        """What `mlp_columns` has worked out, which every layer asks for."""
        return {}

    def _share_columns(self, intermediate_size: int) -> range:
        if self.size == 1:
            return range(intermediate_size)
        block = _block_for(intermediate_size, MLP_BLOCK, self.size)
        num_blocks = -(-intermediate_size // block)
        counts = _levelled(num_blocks, self._mlp_bytes(block), self._attention_bytes)
        start = sum(counts[: self.rank])
        return range(start * block, min((start + counts[self.rank]) * block, intermediate_size))

    @cached_property
    def _attention_bytes(self) -> tuple[int, ...]:
        """Of the attention matrices of all layers, for each rank."""
        ranks = (ShardPlan(self.config, rank, self.size) for rank in range(self.size))
        heads = [(len(plan.query_heads), plan.num_kv_heads) for plan in ranks]
        by_heads = {
            counts: sum(
                attention_bytes(self.config, layer, *counts, PLAIN_BYTES)
                for layer in range(self.config.num_layers)
            )
            for counts in set(heads)
        }
        return tuple(by_heads[counts] for counts in heads)

    def _mlp_bytes(self, num_columns: int) -> int:
        """Of so many columns of the MLPs of all layers, all experts."""
        return sum(
            mlp_bytes(
                self.config,
                index,
                layer.mlp.num_experts if isinstance(layer.mlp, RoutedMlp) else 1,
                num_columns,
                PLAIN_BYTES,
            )
            for index, layer in enumerate(self.config.layers)
        )

    def _splits_by_expert(self, mlp: RoutedMlp) -> bool:
        return mlp.num_experts % self.size == 0

    def _num_parts(self, mlp: DenseMlp | RoutedMlp) -> int:
        """Ranks that an MLP can be shared out to."""
        by_expert = isinstance(mlp, RoutedMlp) and self._splits_by_expert(mlp)
        return self.size if by_expert else mlp.intermediate_size

    def _readers(self, kv_head: int) -> range:
        per_kv_head = self.config.num_heads // self.config.num_kv_heads
        first = max(self.query_heads[0], kv_head * per_kv_head)
        last = min(self.query_heads[-1], (kv_head + 1) * per_kv_head - 1)
        return range(first, last + 1)


def bytes_per_page(plan: ShardPlan, element_bytes: int, page_size: int) -> int:
    """Bytes of one page of KV rows over all layers, keys and values, on this rank."""
    config = plan.config
    return config.num_layers * 2 * page_size * plan.num_kv_heads * config.head_dim * element_bytes


def _share(total: int, rank: int, size: int) -> range:
    """Contiguous shares that differ by at most one, the larger ones first."""
    base, extra = divmod(total, size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (1 if rank < extra else 0))


def _share_blocks(total: int, block: int, rank: int, size: int) -> range:
    """Contiguous shares in whole blocks; the last may be partial."""
    if size == 1:
        return range(total)
    block = _block_for(total, block, size)
    blocks = _share(-(-total // block), rank, size)
    return range(blocks.start * block, min(blocks.stop * block, total))


def _block_for(total: int, block: int, size: int) -> int:
    """A block of this size, or a smaller one where there would be less than about four a rank."""
    while block > 1 and -(-total // block) < 4 * size:
        block //= 2
    return block


def _levelled(num_blocks: int, bytes_per_block: int, taken: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks for each rank, at least one, so that the fullest has as little as it can: each goes to who has least.

    taken: bytes that each rank has besides.
    """
    counts = [1] * len(taken)
    lightest = [(bytes_per_block + num_bytes, rank) for rank, num_bytes in enumerate(taken)]
    heapq.heapify(lightest)
    for _ in range(num_blocks - len(taken)):
        num_bytes, rank = lightest[0]
        heapq.heapreplace(lightest, (num_bytes + bytes_per_block, rank))
        counts[rank] += 1
    return tuple(counts)
