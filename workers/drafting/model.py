"""Draft method `model`: a small language model grows the tree best first, under the noise of the target.

A row depends on tokens alone, so a verdict keeps the rows of the path that came out and of everything that survives
below it (SwiftSpec, arXiv 2506.11309), and a node comes along with all that is above it, in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.transfers import upload
from outrider.workers.draft_heads.checkpoint import read_lm_head
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.growing_levels import GrowingLevelMethod
from outrider.workers.drafting.levels import ROWS_PER_STEP, LevelLimits
from outrider.workers.drafting.method import MethodContext
from outrider.workers.drafting.model_ranks import load_rank, rank_0_of
from outrider.workers.drafting.row_cache import Expansion, RowCache
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.batch import TreeRows
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import draft_capacities
from outrider.workers.model.draft_heads import served_head
from outrider.workers.model.grown_steps import TransformerLevels
from outrider.workers.model.head import Head
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.tree import Bools, Ints, Survivors
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.setup import read_model_config, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.resolver import resolve_head


class ModelMethod(GrowingLevelMethod):
    """Grows trees with a draft model. Without pages it just proposes nothing."""

    name = "model"
    has_node_rows = True

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        model: Transformer,
        cache: PagedCache,
        pool: PagePool,
        sampler: Sampler,
        num_target_tokens: int,
        max_children: int,
        rows_per_sequence: int,
        max_rows: int,
        prefill_chunk: int,
        tracer: Tracer,
    ) -> None:
        """
        Args:
            model, cache: of rank 0; ranks that share it `follow`.
            sampler: over all tokens.
            num_target_tokens: a padded vocabulary may have more ids than the target's.
            max_rows: of a step's nodes.
        """
        limits = LevelLimits(max_children, rows_per_sequence, max_rows, prefill_chunk)
        stretches = Stretches(model.device, tracer)
        rows = RowCache(slots, pool, window=model.config.widest_window)
        super().__init__(slots, estimator, rows, sampler, num_target_tokens, limits, stretches)
        self._model = model
        self._rank = rank_0_of(model, cache, len(slots))
        if self._rank.pool is not None:
            levels, capacities = TransformerLevels(model, cache), draft_capacities(model, cache)
            self.grow_by(levels, model.kernels, cache, capacities, self._rank.pool)
        # By slot and node, what left the last layer, where somebody reads it.
        self._node_rows: Tensor | None = None

    @classmethod
    def build(cls, context: MethodContext) -> ModelMethod:
        """Load `draft.model`, meet its other ranks and lay out its cache."""
        config, device = context.config, context.device
        rounds = config.rounds
        head = _load_head(context) if config.draft.head else None
        loaded = load_rank(config, 0, device, context.progress, head)
        model, cache = loaded.built(config, context.join_ranks(device))
        vocabulary = VocabularyRange(0, model.config.vocab_size) if head is None else head.vocabulary
        return cls(
            slots=context.slots,
            estimator=context.estimator,
            model=model,
            cache=cache,
            pool=PagePool(cache.num_pages, cache.page_size, rounds.prefix_sharing),
            sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator(), model.kernels),
            num_target_tokens=context.target.vocab_size,
            max_children=config.tree.max_children,
            rows_per_sequence=ROWS_PER_STEP,
            max_rows=max(ROWS_PER_STEP, rounds.max_sequences),
            prefill_chunk=rounds.prefill_chunk,
            tracer=context.tracer,
        )

    def keep_node_rows(self) -> None:
        """A row for each place in a tree. Levels wait for the host then, which keeps them."""
        self._grown = None
        model, num_places = self._model, self.trees.tokens.size
        self._node_rows = torch.zeros(
            num_places, model.config.hidden_size, dtype=model.dtype, device=model.device
        )

    def node_rows(self, slots: Ints, nodes: Ints) -> tuple[Tensor, Bools]:
        """Of the nodes that were expanded."""
        places = (slots * self.trees.capacity)[:, None] + nodes
        has_row = self._rows.flat_has_row[places]
        assert self._node_rows is not None, "keep_node_rows comes first"
        rows = self._node_rows[torch.from_numpy(places).to(self._node_rows.device)]
        return rows * torch.from_numpy(has_row).to(rows)[..., None], has_row

    def rerooted(self, survivors: Survivors) -> None:
        """Keep the rows of the paths that came out and of the survivors below them."""
        sources, targets = self._rows.reroot(survivors)
        if self._node_rows is not None:
            firsts = (survivors.slots * self.trees.capacity)[:, None]
            before = torch.from_numpy((firsts + survivors.old_nodes)[survivors.exists])
            after = torch.from_numpy((firsts + np.arange(survivors.old_nodes.shape[1]))[survivors.exists])
            before, after = upload((before, after), self._node_rows.device)
            self._node_rows[after] = self._node_rows[before]
        if len(sources):
            self._rank.commit(sources, targets)
        self._laws.rerooted(survivors)

    def close(self) -> None:
        """The other ranks end."""
        self._rank.close()

    def _read_known(self, rows: TreeRows) -> None:
        batch = self._rank.batch(self._rows.tables, rows)
        self._stretches.begin()
        self._rank.forward(batch)

    def _logits(self, expansion: Expansion, others: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        batch = self._rank.batch(self._rows.tables, expansion.rows, expansion.node_rows)
        self._stretches.begin()
        indices = [torch.from_numpy(expansion.node_rows)]
        if self._node_rows is not None:
            indices.append(torch.from_numpy(expansion.places))
        hidden, (node_rows, *there) = self._rank.forward(batch, [*indices, *others])
        if self._node_rows is not None:
            self._node_rows[there.pop(0)] = hidden.last[node_rows]
        return self._rank.logits(hidden, node_rows), there

    def _timed_logits(self, rows: TreeRows) -> Tensor:
        wanted = np.arange(len(rows.tokens))
        batch = self._rank.batch(self._rows.tables, rows, wanted)
        hidden, (index,) = self._rank.forward(batch, [torch.from_numpy(wanted)])
        return self._rank.logits(hidden, index)


def _load_head(context: MethodContext) -> Head:
    """`draft.head`. Raises ValueError, naming it, for one that is not for `draft.model`."""
    draft = context.config.draft
    model = read_model_config(context.config, "draft", context.progress)
    lm_head, description = read_lm_head(resolve_head(draft.head, context.progress, "draft.head"))
    found = lm_head.shape.hidden_size, description.target_vocab_size
    if found != (model.hidden_size, model.vocab_size):
        raise ValueError(
            f"draft.head must be a head for draft.model, whose rows have {model.hidden_size} columns and whose "
            f"vocabulary has {model.vocab_size} tokens, got one for {found[0]} columns and {found[1]} tokens"
        )
    lm_head.to(context.device, torch_dtype(draft.dtype)).requires_grad_(False)
    return served_head(lm_head, model.vocab_size, draft.packed_weights, draft.int8_heads)
