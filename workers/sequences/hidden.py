"""Hidden rows of the target: which ones somebody needs, and those that came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from outrider.workers.sequences.tree import Ints


@dataclass(frozen=True)
class HiddenNeeds:
    """What a draft method or a rule reads of the target's hidden rows.

    Attributes:
        layers: the rows that enter these layers, in the order in which they are read. Layer 0 reads the embedding;
            the number of layers stands for what leaves the last one, before the final norm.
        of_context: rows of known tokens, too (prompts, recomputed text), not only of the nodes that are sampled.
    """

    layers: tuple[int, ...] = ()
    of_context: bool = False


NO_HIDDEN_ROWS = HiddenNeeds()


def all_layers(needs: Iterable[HiddenNeeds]) -> tuple[int, ...]:
    """Every layer that anybody reads, each once, ascending."""
    return tuple(sorted({layer for need in needs for layer in need.layers}))


@dataclass(frozen=True)
class HiddenRows:
    """What the target sent of one round: for each step its message nodes from `first_nodes` on.

    Attributes:
        layers: by layer, [R, hidden] in the target's dtype; R rows, those of the steps back to back.
        first_nodes, first_rows: int64 [B], of each step the first node sent and its row.
    """

    layers: Mapping[int, torch.Tensor]
    first_nodes: Ints
    first_rows: Ints

    def rows_of(self, step: int, nodes: Ints) -> Ints:
        """Rows of message nodes of a step, none of them before the first that was sent."""
        assert not len(nodes) or nodes.min() >= self.first_nodes[step]
        return self.first_rows[step] + nodes - self.first_nodes[step]
