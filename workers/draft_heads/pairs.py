"""What the token before says about the next one: a low-rank term beside the logits of a level.

Three published kinds, all of them <a row made of the token before, the successor's row>:

- "markov" (DSpark, arXiv 2607.05147): W1[a], and W2[b].
- "gated" (DeepSpec, speculators): sigmoid(G [h; W1[a]]) * W1[a], h being the level's own row.
- "selector" (DFlash2): A[a] * (H h), and B[b], for the `top_k` tokens of highest logits alone; there are no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from outrider.workers.draft_heads.start_values import fill_normal

PairKind = Literal["none", "markov", "gated", "selector"]


@dataclass(frozen=True)
class PairShape:
    """Sizes of a pair term.

    Attributes:
        rank: columns of its matrices; 0 where there is none.
        top_k: tokens that it chooses from; 0 for all.
    """

    kind: PairKind
    rank: int
    top_k: int = 0

    @property
    def is_there(self) -> bool:
        return self.kind != "none"


NO_PAIR = PairShape("none", 0)


class PairTerm(nn.Module):
    """No pair term: rows without columns, which add nothing."""

    def rows(self, previous: Tensor, output: Tensor) -> Tensor:
        """[M, rank] of the tokens int64 [M] before, and the rows [M, hidden] of their levels."""
        return output.new_zeros(len(previous), 0)

    def forward(self, logits: Tensor, rows: Tensor) -> Tensor:
        """logits [M, V'] with what `rows` says added; -inf for tokens that are none of those chosen from."""
        return logits

    def successors(self) -> Tensor:
        """[V', rank]: the matrix that rows are multiplied with."""
        return torch.empty(0, 0)


class MarkovTerm(PairTerm):
    """`markov` and `gated`, with DeepSpec's names."""

    def __init__(self, rank: int, hidden_size: int, vocab_size: int, num_ids: int, is_gated: bool) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        fill_normal(self.markov_w1.weight, 0.01)  # next to nothing, of tokens never met for good
        self.markov_w2 = nn.Linear(rank, num_ids, bias=False)
        self.is_gated = is_gated
        if is_gated:
            self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def rows(self, previous: Tensor, output: Tensor) -> Tensor:
        rows: Tensor = self.markov_w1(previous)
        if self.is_gated:
            rows = rows * self.gate_proj(torch.cat((output, rows.to(output.dtype)), dim=-1)).sigmoid()
        return rows

    def forward(self, logits: Tensor, rows: Tensor) -> Tensor:
        out: Tensor = logits + self.markov_w2(rows)
        return out

    def successors(self) -> Tensor:
        return self.markov_w2.weight


class SelectorTerm(PairTerm):
    """`selector`, with DFlash2's names."""

    def __init__(self, shape: PairShape, hidden_size: int, vocab_size: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, shape.rank))
        self.successor_codebook = nn.Parameter(torch.empty(num_ids, shape.rank))
        self.hidden_projection = nn.Linear(hidden_size, shape.rank, bias=False)
        for weight in self.parameters():
            fill_normal(weight, 0.02)

    def rows(self, previous: Tensor, output: Tensor) -> Tensor:
        rows: Tensor = self.predecessor_codebook[previous] * self.hidden_projection(output)
        return rows

    def forward(self, logits: Tensor, rows: Tensor) -> Tensor:
        top, columns = logits.topk(self.top_k, dim=-1)
        scores = top + (self.successor_codebook[columns] @ rows[..., None])[..., 0]
        return torch.full_like(logits, -torch.inf).scatter(-1, columns, scores.to(logits.dtype))

    def successors(self) -> Tensor:
        return self.successor_codebook


def make_pair_term(shape: PairShape, hidden_size: int, vocab_size: int, num_ids: int) -> PairTerm:
    """With random weights. vocab_size: tokens that may stand before; num_ids: those of the LM head."""
    if not shape.is_there:
        return PairTerm()
    if shape.kind == "selector":
        return SelectorTerm(shape, hidden_size, vocab_size, num_ids)
    return MarkovTerm(shape.rank, hidden_size, vocab_size, num_ids, shape.kind == "gated")
