"""Steps of a drafter on the target's hidden rows as CUDA graphs: a step reads features, runs the layer, keeps its
outputs as features for the next one, and gives the logits of all its rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kernels.transfers import Part
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cuda_graphs import draft_capacities, recorded, warm_up
from outrider.workers.model.embedding import MatrixEmbedding
from outrider.workers.model.feature_drafter import CachedDrafter
from outrider.workers.model.grown_steps import MAX_GROWN_STEPS
from outrider.workers.model.static_batch import StaticBatch


class GraphedSteps:
    """One table of features: of nodes, kept by earlier steps; then of the rows of a step, for known tokens, whose
    features the target gave; then of rows that have no node yet, see `GrownSteps`; then one row that takes what
    nobody reads. A `LevelForward`.

    Attributes:
        features: [num_nodes + max_rows + num_nodeless + 1, hidden].
        max_rows: of a step that fits a graph.
        capacities: of the graphs, the smallest first.
        pool: their memory.
    """

    def __init__(self, drafter: CachedDrafter, num_nodes: int) -> None:
        """Records the graphs.

        Raises:
            Exception: something cannot be captured, a kernel does not run, or there is no memory left.
        """
        capacities = sorted(draft_capacities(drafter, drafter.cache), key=lambda capacity: capacity.num_rows)
        self.capacities = capacities
        self.max_rows = capacities[-1].num_rows
        self._drafter = drafter
        self._num_nodes = num_nodes
        self.features = torch.zeros(
            num_nodes + self.max_rows * (1 + MAX_GROWN_STEPS) + 1,
            drafter.model.hidden_size,
            dtype=drafter.dtype,
            device=drafter.device,
        )
        statics = []
        for capacity in capacities:
            rows = (Part((capacity.num_rows,), torch.int64), self.nobodys)
            statics.append(StaticBatch(capacity, drafter.cache.page_size, drafter.device, (rows, rows)))
        for static in statics:
            self._computed(static).cpu()  # waits, so that errors come up here
        warm_up(statics, self._computed, drafter.device)
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs = recorded(statics, self._computed, self.pool)

    @property
    def of_nodes(self) -> Tensor:
        """[num_nodes, hidden], kept by the nodes' steps."""
        return self.features[: self._num_nodes]

    @property
    def of_known(self) -> Tensor:
        """[max_rows, hidden]: row i is read by row i of a step, unless `take` was told otherwise."""
        return self.features[self._num_nodes : self._num_nodes + self.max_rows]

    @property
    def first_nodeless(self) -> int:
        """Index of the first of the features without nodes."""
        return self._num_nodes + self.max_rows

    @property
    def nobodys(self) -> int:
        """Index of what nobody reads."""
        return len(self.features) - 1

    @property
    def num_moves(self) -> int:
        """As many as rows may have had no node."""
        return MAX_GROWN_STEPS * self.max_rows

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Features, by index."""
        self.features.index_copy_(0, targets, self.features[sources])

    @torch.inference_mode()
    def level(self, batch: ForwardBatch, reads: Tensor, writes: Tensor) -> Tensor:
        """float32 [N, V'] of rows that read and leave these features (int64 [N])."""
        output = self._drafter.forward(batch, self.features[reads])
        self.features.index_copy_(0, writes, output)
        return self._drafter.logits(output)

    def reads(self, num_rows: int, below: tuple[Tensor, Tensor]) -> Tensor:
        """int64 [num_rows]: what the rows of a step read; `below` as in `take`."""
        reads = torch.arange(self._num_nodes, self._num_nodes + num_rows)
        reads[below[0]] = below[1]
        return reads

    def take(
        self,
        batch: ForwardBatch,
        below: tuple[Tensor, Tensor],
        kept: tuple[Tensor, Tensor],
        others: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """Takes a batch of the host to the device, and other tensors in the same copy.

        Args:
            below: int64 on the host: rows that read features of nodes, and which.
            kept: likewise rows whose outputs are kept, and for which nodes.

        Returns:
            The others on the device, valid until the next call; None, and nothing is done, where no graph takes the
            batch.
        """
        num_rows = batch.tree.num_queries
        for static, graph, logits in self._graphs:
            if static.capacity.holds(batch):
                reads = self.reads(num_rows, below)
                writes = torch.full((num_rows,), self.nobodys)
                writes[kept[0]] = kept[1]
                self._taken = graph, logits[:num_rows]
                return static.fill(batch, others, (reads, writes))
        return None

    def run(self) -> Tensor:
        """float32 [rows, V'], the logits of all rows that were taken; valid until the next call."""
        graph, logits = self._taken
        graph.replay()
        return logits

    def _computed(self, static: StaticBatch) -> Tensor:
        return self.level(static.batch, *static.extras)


def graphed_steps(drafter: CachedDrafter, num_nodes: int) -> GraphedSteps | None:
    """None where steps cannot be captured, or are not: then a warning says why."""
    kernels, embedding = drafter.kernels, drafter.embedding
    on_device = isinstance(embedding, MatrixEmbedding) and embedding.matrix.device == drafter.device
    if drafter.device.type != "cuda" or not (kernels.tree_attention and kernels.rope_append and on_device):
        return None
    try:
        return GraphedSteps(drafter, num_nodes)
    except Exception as error:  # of torch, the CUDA driver or NVRTC, which have no class in common
        warnings.warn(f"the drafter's steps run without CUDA graphs: {error}", stacklevel=2)
        return None
