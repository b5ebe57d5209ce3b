"""What attention knows of a batch: one token tree per sequence over a paged KV cache.

A root-only tree is plain decoding, a chain is a prompt chunk, so one layout serves prefill, decoding and
verification. Tree row `j` of a sequence lives in cache row `context_len + j` (through the page table), whatever
its depth; its position for rotary embedding and windows is `context_len + depth`.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from outrider.kernels.attention_plan import AttentionPlan, build_attention_plan

MASK_WORD_BITS = 64


@dataclass(eq=False)
class TreeBatch:
    """One forward's trees, sequences back to back. B sequences, NQ query rows in all, W mask words.

    The queries of sequence b are the LAST `query_lens[b]` of its `tree_lens[b]` rows: a target sends whole trees,
    a drafter that grows its tree level by level has the earlier rows in the cache already.

    Args:
        page_table: int32 [B, max_pages], page ids; entries behind a sequence's last page are ignored.
        context_lens: int32 [B], committed rows in the cache.
        tree_lens: int32 [B], tree rows in the cache when attention runs, the queries included.
        query_indptr: int32 [B + 1], queries of sequence b are rows query_indptr[b] .. query_indptr[b + 1].
        ancestors: int64 [NQ, W]; bit k of word w: tree row 64*w + k is an ancestor of this query, or is the query
            (64 unsigned bits kept in an int64).
        depths: int32 [NQ], the root has depth 0. A query's own place for windows; of its ancestors the rank counts.
        page_size: cache rows in a page.
        host_context_lens, host_tree_lens, host_query_lens: the same small integers on the host, length B.
    """

    page_table: Tensor
    context_lens: Tensor
    tree_lens: Tensor
    query_indptr: Tensor
    ancestors: Tensor
    depths: Tensor
    page_size: int
    host_context_lens: tuple[int, ...]
    host_tree_lens: tuple[int, ...]
    host_query_lens: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.host_context_lens)

    @property
    def num_queries(self) -> int:
        return self.ancestors.shape[0]

    @cached_property
    def plan(self) -> AttentionPlan:
        """Gather indices and masks of the reference attention: built once, used by every layer."""
        return build_attention_plan(
            page_table=self.page_table,
            ancestors=self.ancestors,
            depths=self.depths,
            page_size=self.page_size,
            context_lens=self.host_context_lens,
            tree_lens=self.host_tree_lens,
            query_lens=self.host_query_lens,
        )
