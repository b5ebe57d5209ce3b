"""Inputs of tree attention for checks, and its value in float64 computed the plain way.

Tests on the CPU executors, the self-test on a new GPU and `outrider doctor --gpu` run the same cases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.kernels.launch_plans import FP8
from outrider.kernels.tree_batch import MASK_WORD_BITS, TreeBatch


@dataclass(frozen=True)
class AttentionCase:
    """One batch of random trees over a shuffled page table.

    Attributes:
        context_lens: committed tokens per request.
        query_lens: nodes per request.
        cached_lens: tree rows in the cache before the queries, per request (a drafter that grows its tree).
        num_heads, num_kv_heads, head_dim, page_size, dtype, window, soft_cap: as in `tree_attention`.
        narrow: whether the cache is in FP8; its values are then twice what is stored.
        num_splits: parts the keys of a request of mean length are divided into.
        query_scale: factor on the queries; 60 makes the softmax choose single keys, and a lost maximum overflow.
        chain: every node is the next one's parent, as in a prompt chunk.
    """

    name: str
    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    cached_lens: tuple[int, ...] = ()
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    narrow: bool = False
    window: int = 0
    soft_cap: float = 0.0
    num_splits: int = 1
    query_scale: float = 1.0
    chain: bool = False
    seed: int = 0

    @property
    def tree_lens(self) -> tuple[int, ...]:
        cached = self.cached_lens or (0,) * len(self.query_lens)
        return tuple(c + n for c, n in zip(cached, self.query_lens, strict=True))

    @property
    def cache_dtype(self) -> torch.dtype:
        return FP8 if self.narrow else self.dtype

    @property
    def value_scale(self) -> float:
        return 2.0 if self.narrow else 1.0

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of a case. `parents`: of each tree row, per request (the root's is itself)."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    batch: TreeBatch
    parents: tuple[tuple[int, ...], ...]


def build_attention_inputs(case: AttentionCase) -> AttentionInputs:
    """Random inputs on the CPU. What the kernel must not read holds NaN, or a page number that does not exist:
    unused pages (page 0 among them), rows behind a request's rows, and tokens that fell out of the window."""
    random = torch.Generator().manual_seed(case.seed)
    num_requests = len(case.query_lens)
    totals = [c + t for c, t in zip(case.context_lens, case.tree_lens, strict=True)]
    num_pages = [-(-n // case.page_size) for n in totals]
    pages = torch.randperm(sum(num_pages) + 2, generator=random) + 1  # page 0 stays unused
    page_table = torch.full((num_requests, max(num_pages)), -1, dtype=torch.int32)
    cache_shape = (len(pages) + 1, case.page_size, case.num_kv_heads, case.head_dim)
    caches = [torch.full(cache_shape, math.nan, dtype=case.dtype) for _ in range(2)]
    parents = []
    for b in range(num_requests):
        taken = sum(num_pages[:b])
        page_table[b, : num_pages[b]] = pages[taken : taken + num_pages[b]].int()
        oldest = max(0, case.context_lens[b] - case.window + 1) if case.window else 0
        page_table[b, : oldest // case.page_size] = -1
        rows = torch.arange(oldest, totals[b])
        places = page_table[b].long()[rows // case.page_size] * case.page_size + rows % case.page_size
        for cache in caches:
            values = torch.randn(len(rows), *cache_shape[2:], generator=random).to(case.dtype)
            cache.view(-1, *cache_shape[2:])[places] = values
        parents.append(_random_parents(case.tree_lens[b], case.chain, random))
    q = torch.randn(sum(case.query_lens), case.num_heads, case.head_dim, generator=random) * case.query_scale
    batch = _tree_batch(case, page_table, parents)
    k_pages, v_pages = (cache.to(case.cache_dtype) for cache in caches)
    return AttentionInputs(q.to(case.dtype), k_pages, v_pages, batch, tuple(parents))


def _random_parents(num_rows: int, chain: bool, random: torch.Generator) -> tuple[int, ...]:
    def parent(row: int) -> int:
        oldest = row - 1 if chain else max(0, row - 9)
        return int(torch.randint(oldest, row, (1,), generator=random))

    return (0, *(parent(row) for row in range(1, num_rows)))


def paths_to_root(parents: Sequence[int]) -> list[list[int]]:
    """Of each tree row, the rows from the root down to it."""
    paths: list[list[int]] = []
    for row, parent in enumerate(parents):
        paths.append(paths[parent] + [row] if row else [0])
    return paths


def _tree_batch(case: AttentionCase, page_table: Tensor, parents: Sequence[Sequence[int]]) -> TreeBatch:
    num_words = -(-max(case.tree_lens) // MASK_WORD_BITS)
    words, depths = [], []
    for tree, num_queries in zip(parents, case.query_lens, strict=True):
        for path in paths_to_root(tree)[len(tree) - num_queries :]:
            bits = sum(1 << row for row in path)
            words.append([_signed64(bits >> (64 * w) & (1 << 64) - 1) for w in range(num_words)])
            depths.append(len(path) - 1)
    starts = [sum(case.query_lens[:b]) for b in range(len(case.query_lens) + 1)]
    return TreeBatch(
        page_table=page_table,
        context_lens=torch.tensor(case.context_lens, dtype=torch.int32),
        tree_lens=torch.tensor(case.tree_lens, dtype=torch.int32),
        query_indptr=torch.tensor(starts, dtype=torch.int32),
        ancestors=torch.tensor(words, dtype=torch.int64),
        depths=torch.tensor(depths, dtype=torch.int32),
        page_size=case.page_size,
        host_context_lens=case.context_lens,
        host_tree_lens=case.tree_lens,
        host_query_lens=case.query_lens,
    )


def _signed64(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def attention_in_float64(case: AttentionCase, inputs: AttentionInputs) -> Tensor:
    """[NQ, HQ, D] float64, one node at a time, from the parents and not from the bit masks."""
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    flat_shape = (-1, case.num_kv_heads, case.head_dim)
    keys, values = (pages.reshape(flat_shape).double() for pages in (inputs.k_pages, inputs.v_pages))
    query_row = 0
    for b, tree in enumerate(inputs.parents):
        context = case.context_lens[b]
        for path in paths_to_root(tree)[len(tree) - case.query_lens[b] :]:
            # (row in the cache, position) of the keys this node sees
            seen = [(n, n) for n in range(context)] + [
                (context + row, context + d) for d, row in enumerate(path)
            ]
            position = context + len(path) - 1
            if case.window:
                seen = [(row, p) for row, p in seen if position - p < case.window]
            rows = torch.tensor([row for row, _ in seen])
            places = (
                inputs.batch.page_table[b].long()[rows // case.page_size] * case.page_size
                + rows % case.page_size
            )
            group = case.num_heads // case.num_kv_heads
            k, v = (x[places].repeat_interleave(group, dim=1) for x in (keys, values))  # [n, HQ, D]
            scores = torch.einsum("hd,nhd->hn", inputs.q[query_row].double(), k) * case.scale
            if case.soft_cap:
                scores = torch.tanh(scores / case.soft_cap) * case.soft_cap
            out[query_row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v) * case.value_scale
            query_row += 1
    return out


# Small enough to run on the CPU executors in seconds, chosen so that every branch of the kernel runs: context of
# none and of many tiles, every tile, splits with no keys, tile and word boundaries, odd sizes.
_CASES = (
    AttentionCase("decode", (75, 130, 0), (1, 1, 1)),
    AttentionCase("small tree", (75, 130), (4, 3), num_splits=3),
    AttentionCase("two trees", (75, 130), (24, 7), num_splits=2),
    AttentionCase("tile boundaries", (32, 64, 63), (16, 1, 17)),
    AttentionCase("no context", (0, 0), (64, 5), num_splits=2),
    AttentionCase("two mask words", (33,), (100,), num_heads=2, num_kv_heads=1),
    AttentionCase("three mask words", (10, 3), (130, 2), num_heads=2, num_kv_heads=2, num_splits=2),
    AttentionCase("rows of 128", (70, 20), (40, 3), num_heads=4, num_kv_heads=1, head_dim=128),
    AttentionCase(
        "head size 128", (100, 9), (12, 5), num_heads=4, num_kv_heads=1, head_dim=128, num_splits=2
    ),
    AttentionCase("head size 128, decode", (100, 300), (1, 1), num_kv_heads=1, head_dim=128, num_splits=4),
    AttentionCase("window", (75, 3, 0), (24, 7, 9), window=20),
    AttentionCase("window below the tree", (75, 0), (40, 30), window=3, chain=True),
    AttentionCase("window of one", (50, 20), (9, 1), window=1, num_splits=2),
    AttentionCase("window over words", (20,), (140,), num_heads=1, num_kv_heads=1, window=70, chain=True),
    AttentionCase("soft cap", (75, 130), (8, 20), soft_cap=5.0, query_scale=8.0),
    AttentionCase("sharp softmax", (75, 200), (24, 3), query_scale=60.0, num_splits=2),
    AttentionCase("one key", (0, 0), (1, 1), query_scale=60.0),
    AttentionCase("prompt chunk", (48,), (90,), num_heads=2, num_kv_heads=1, chain=True),
    AttentionCase("growing tree", (40, 5), (6, 2), cached_lens=(30, 70)),
    AttentionCase("growing tree, window", (40, 5), (6, 2), cached_lens=(30, 70), window=6),
    AttentionCase("9 of 3 heads, pages of 7", (50, 20), (5, 11), num_heads=9, num_kv_heads=3, page_size=7),
    AttentionCase("14 of 2 heads, pages of 1", (33,), (9,), num_heads=14, num_kv_heads=2, page_size=1),
    AttentionCase(
        "more requests than a warp has lanes",
        (9,) * 30 + (300, 3, 0, 150, 20, 31),
        (1,) * 32 + (2, 9, 1, 3),
        num_heads=2,
        num_kv_heads=1,
        num_splits=2,
    ),
    AttentionCase("f16", (75, 130), (24, 7), dtype=torch.float16, num_splits=2),
    AttentionCase("f16, decode", (75, 130), (1, 2), dtype=torch.float16),
    AttentionCase("f16, rows of 64", (75, 3), (12, 16), dtype=torch.float16, window=9),
    AttentionCase(
        "f16, head size 128, rows of 128",
        (30,),
        (70,),
        num_heads=1,
        num_kv_heads=1,
        dtype=torch.float16,
        head_dim=128,
    ),
    AttentionCase("f16, head size 128, rows of 64", (40, 5), (9, 4), dtype=torch.float16, head_dim=128),
    AttentionCase("f16, head size 128", (40, 5), (3, 4), dtype=torch.float16, head_dim=128, window=16),
)


def narrowed(cases: Sequence[AttentionCase]) -> tuple[AttentionCase, ...]:
    """The same with a cache in FP8."""
    return tuple(replace(case, name=f"FP8, {case.name}", narrow=True) for case in cases)


_NARROW = (
    "decode",
    "two trees",
    "no context",
    "rows of 128",
    "head size 128",
    "head size 128, decode",
    "window",
    "soft cap",
    "one key",
    "two mask words",
    "growing tree, window",
    "9 of 3 heads, pages of 7",
    "f16, decode",
    "f16, rows of 64",
    "f16, head size 128, rows of 128",
    "f16, head size 128, rows of 64",
    "f16, head size 128",
)
ATTENTION_CASES = (
    *_CASES,
    *narrowed([case for case in _CASES if case.name in _NARROW]),
    *narrowed(
        [
            AttentionCase("f16, rows of 128", (30,), (70,), num_heads=1, num_kv_heads=1, dtype=torch.float16),
        ]
    ),
)
# A minute or so each on the CPU executors.
LARGE_ATTENTION_CASES = (
    AttentionCase("long context", (8192, 100), (2, 3), num_heads=8, num_kv_heads=1, num_splits=8),
    AttentionCase("64 of 8 heads", (300, 64), (20, 64), num_heads=64, num_kv_heads=8, head_dim=128),
    AttentionCase(
        "long context, head size 128", (8192,), (9,), num_heads=8, num_kv_heads=1, head_dim=128, num_splits=4
    ),
    AttentionCase(
        "long context and none, deep trees, pages of 7",
        (8192, 0),
        (33, 20),
        num_heads=9,
        num_kv_heads=3,
        page_size=7,
        num_splits=4,
        chain=True,
    ),
    AttentionCase(
        "long context, window below the tree, pages of 3",
        (8192,),
        (40,),
        num_heads=14,
        page_size=3,
        window=12,
        num_splits=3,
        chain=True,
    ),
    *narrowed(
        [AttentionCase("64 of 8 heads, 16k", (16_384,), (9,), num_heads=16, head_dim=128, num_splits=8)]
    ),
)
