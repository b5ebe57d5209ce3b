"""Which tokens a trimmed LM head keeps (VocabTrim, arXiv 2506.22694): those that the target itself writes most often.

A vocabulary counted on little text misses tokens that other text has. So the end-of-text tokens stay in any case,
and where a size asks for more tokens than were seen, those of the lowest ids follow: a BPE's ids are in the order in
which its merges were found, the commonest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.lm_head import DenseLmHead, LmHead, LowRankLmHead
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import SUCCESSOR_ROWS, ParallelDrafter

Drafter = TypeVar("Drafter", bound=Eagle3Drafter | MtpDrafter | ParallelDrafter)
"""A drafter with one LM head."""


def count_tokens(texts: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """int64 [vocab_size]: how often each token occurs. ValueError for ids of another vocabulary."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        tokens = torch.tensor(text, dtype=torch.int64)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"the texts must be of a vocabulary of {vocab_size}, got token {int(tokens.max())}"
            )
        counts += torch.bincount(tokens, minlength=vocab_size)
    return counts


@dataclass(frozen=True)
class TokenOrder:
    """All tokens, the one to keep first at the front.

    Attributes:
        tokens: int64 [vocab_size]: those kept in any case, then by how often they were counted, the lower id first
            among equals.
        num_always: how many are kept in any case.
    """

    tokens: Tensor
    num_always: int

    def first(self, size: int) -> Tensor:
        """The ids of a vocabulary of this size, ascending int64. ValueError for one that cannot be."""
        least, most = max(1, self.num_always), len(self.tokens)
        if not least <= size <= most:
            raise ValueError(
                f"--size must be from {least} (tokens that are always kept) to {most}, got {size}"
            )
        return self.tokens[:size].sort().values

    def size_for(self, counts: Tensor, coverage: float) -> int:
        """The smallest vocabulary that has this fraction of the counted tokens."""
        covered = self.coverages(counts)
        return max(1, self.num_always, int((covered < coverage - 1e-12).sum()) + 1)

    def coverages(self, counts: Tensor) -> Tensor:
        """float64 [vocab_size]: the fraction of counted tokens that the first 1, 2, ... have."""
        return counts[self.tokens].cumsum(0).double() / max(1, int(counts.sum()))


def token_order(counts: Tensor, always: Sequence[int], low_ids: int) -> TokenOrder:
    """`always`: ids kept in any case, end-of-text tokens; so are the `low_ids` lowest ids."""
    kept = torch.zeros(len(counts), dtype=torch.bool)
    kept[torch.tensor(list(always), dtype=torch.int64)] = True
    kept[:low_ids] = True
    rank = torch.where(kept, int(counts.max()) + 1, counts)
    return TokenOrder(rank.argsort(descending=True, stable=True), int(kept.sum()))


def coverage(counts: Tensor, ids: Tensor) -> float:
    """The fraction of counted tokens that are among these."""
    return float(counts[ids].sum()) / max(1, int(counts.sum()))


@torch.no_grad()
def trimmed(head: LmHead, ids: Tensor) -> LmHead:
    """A head with the rows of some of its ids; `ids` ascending int64, all of them the head's."""
    places = torch.searchsorted(head.ids, ids)
    assert torch.equal(head.ids[places], ids), "a head has no row for a token that it does not have"
    match head:
        case DenseLmHead():
            dense = DenseLmHead(head.shape.hidden_size, ids)
            dense.weight.copy_(head.weight[places])
            return dense
        case LowRankLmHead():
            low_rank = LowRankLmHead(head.shape.hidden_size, head.shape.rank, ids)
            low_rank.down.weight.copy_(head.down.weight)
            low_rank.up.weight.copy_(head.up.weight[places])
            return low_rank
    raise AssertionError(type(head))


def with_head(drafter: Drafter, head: LmHead) -> Drafter:
    """The same drafter (its other weights are shared) with an LM head of its own, for the same ids or some of them.

    What a pair term has for each id goes with the ids.
    """
    shape: Any = replace(drafter.shape, lm_head=head.shape)
    with torch.device("meta"):
        changed = type(drafter)(shape, head.ids)
    places = torch.searchsorted(drafter.lm_head.ids, head.ids)
    weights = {
        name: weight[places] if name in SUCCESSOR_ROWS else weight
        for name, weight in drafter.state_dict().items()
        if not name.startswith("lm_head.")
    }
    changed.load_state_dict(weights, strict=False, assign=True)
    for name, buffer in drafter.named_buffers(recurse=False):
        setattr(changed, name, buffer)
    changed.lm_head = head
    return changed


def trimmed_drafter(drafter: Drafter, ids: Tensor) -> Drafter:
    """The same drafter (its other weights are shared) with the rows of some ids.

    A parallel drafter that shares the target's LM head goes on sharing it. A head for multi-token prediction has one
    of its own then: its checkpoints share whole ones only.
    """
    changed = with_head(drafter, trimmed(drafter.lm_head, ids))
    if isinstance(drafter, ParallelDrafter) and isinstance(changed, ParallelDrafter):
        changed.shares_lm_head = drafter.shares_lm_head
    return changed


def with_lm_heads(heads: MedusaHeads, lm_heads: Sequence[LmHead]) -> MedusaHeads:
    """The same heads (their blocks are shared) with other LM heads, as many and of the same sizes and ids."""
    with torch.device("meta"):
        changed = MedusaHeads(replace(heads.shape, lm_head=lm_heads[0].shape), lm_heads[0].ids)
    changed.blocks = heads.blocks
    changed.lm_heads = torch.nn.ModuleList(lm_heads)
    return changed


def trimmed_medusa(heads: MedusaHeads, ids: Tensor) -> MedusaHeads:
    """The same heads (their blocks are shared) with the rows of some ids."""
    lm_heads = []
    for head in heads.lm_heads:
        assert isinstance(head, LmHead)
        lm_heads.append(trimmed(head, ids))
    return with_lm_heads(heads, lm_heads)
