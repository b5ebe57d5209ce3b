"""Draft method `medusa` (arXiv 2401.10774): heads on the target's last hidden row guess tokens behind its next one.

One forward without a cache: every head reads the row of the newest committed token and gives its candidates, ranked
under the noise of the target at the head's own position. What combinations of them are worth a place in the tree is
decided for each row anew, from what like guesses were seen to be worth. Until a verdict brings another row there is
nothing more to propose.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceABC

import numpy as np
import torch
from torch import Tensor

from outrider.configs.schema import Config
from outrider.kernels.proposals import NUM_SAMPLED_KINDS, priors_and_kinds
from outrider.kernels.rms_norm import rms_norm
from outrider.workers.draft_heads.checkpoint import read_medusa
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.heads import check_target, read_for
from outrider.workers.drafting.laws import SlotLaws
from outrider.workers.drafting.medusa_tree import best_trees
from outrider.workers.drafting.method import DraftMethod, Forecast, MethodContext, Verified
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.drafting.yields import TreeYields
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.draft_heads import for_serving, vocabulary_of
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Floats, Ints, Survivors
from outrider.workers.setup import kernels_for, load_target_tensors, torch_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.resolver import resolve_head
from outrider.workers.weights.tensors import FINAL_NORM

_MAX_LOGIT_ROWS = 256  # of a step: those of a vocabulary of 128k take 131 MB
_FIRST_YIELD = 0.4  # assumed of a head's best guess before any was seen, where the checkpoint does not say


class MedusaMethod(DraftMethod):
    """Proposes a tree of the heads' guesses after every verdict."""

    name = "medusa"
    is_trained = True

    def __init__(
        self,
        slots: DraftedSlots,
        estimator: AcceptanceEstimator,
        target: ModelConfig,
        heads: MedusaHeads,
        final_norm: Tensor,
        accuracies: Floats,
        sampler: Sampler,
        max_children: int,
        num_nodes: int,
        tracer: Tracer,
    ) -> None:
        """
        Args:
            heads: as `for_serving` gives them.
            final_norm: [hidden] of the target, in the dtype and on the device of the heads.
            accuracies: [K, R], how often each head's guess of each rank was the target's greedy token; no columns
                where nobody counted.
            max_children: candidates of each head.
            num_nodes: of a tree, at most.
        """
        super().__init__(slots, estimator)
        self.needs = self._needs(target)
        self._eps = target.rms_norm_eps
        self._heads, self._num_heads = heads, heads.shape.num_heads
        self._final_norm = final_norm
        self._sampler = sampler
        self._max_children = min(max_children, len(heads.ids))
        self._num_nodes = num_nodes
        self._max_sequences = max(1, _MAX_LOGIT_ROWS // self._num_heads)
        self._laws = SlotLaws(slots)
        self._stretches = Stretches(final_norm.device, tracer)
        self._rows = torch.zeros(
            len(slots), target.hidden_size, dtype=final_norm.dtype, device=final_norm.device
        )
        self._has_news = np.zeros(len(slots), dtype=np.bool_)  # a row that nothing was proposed from
        self._first_source = estimator.reserve(self._num_heads * NUM_SAMPLED_KINDS)
        self._calibrated = _of_ranks(accuracies, self._num_heads, self._max_children)
        first = self._calibrated
        if not first.size:
            decline = 2.0 ** -np.arange(self._num_heads)[:, None] * 4.0 ** -np.arange(self._max_children)
            first = _FIRST_YIELD * decline
        first_yields = np.zeros(num_nodes)
        values = best_trees(first[None], num_nodes).values[0, 1:]
        first_yields[: len(values)] = values
        self._yields = TreeYields(first_yields, slots.num_laws)

    @classmethod
    def build(cls, context: MethodContext) -> MedusaMethod:
        """Load `draft.medusa.model`, and the target's final norm."""
        config, target, progress = context.config, context.target, context.progress
        draft, field = config.draft, "draft.medusa.model"
        folder = resolve_head(draft.medusa.model, progress, field)
        heads, description = read_for(field, lambda: read_medusa(folder))
        shape = heads.shape
        check_target(field, description, shape.hidden_size, shape.vocab_size, target)
        source = load_target_tensors(config, [FINAL_NORM], progress)
        dtype, device = torch_dtype(draft.dtype), context.device
        vocabulary = vocabulary_of(heads.ids.to(device), shape.vocab_size)
        kernels = kernels_for(config, target, device, dtype)
        return cls(
            slots=context.slots,
            estimator=context.estimator,
            target=target,
            heads=for_serving(heads, shape.vocab_size, dtype, device, draft.packed_weights, draft.int8_heads),
            final_norm=source.read(FINAL_NORM, slice(None), slice(None), dtype).to(device),
            accuracies=table_of(description.accuracies),
            sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator(), kernels),
            max_children=config.tree.max_children,
            num_nodes=max(1, config.tree.max_nodes),
            tracer=context.tracer,
        )

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        """The rows that leave the target's last layer."""
        return cls._needs(target)

    @staticmethod
    def _needs(target: ModelConfig) -> HiddenNeeds:
        return HiddenNeeds((target.num_layers,))

    def start(self, sequence: Sequence) -> None:
        """There is no row before the target has read the text."""
        self._has_news[sequence.slot] = False
        self._laws.start(sequence)

    def observe(self, verified: Verified) -> None:
        """Keep the rows of the newest committed tokens."""
        hidden = verified.hidden
        steps = [
            step for step in verified.steps if len(step.growing_nodes)
        ]  # the others are in their prompts
        if hidden is None or not steps:
            return
        index = np.concatenate([hidden.rows_of(step.index, step.committed[-1:]) for step in steps])
        slots = np.array([step.sequence.slot for step in steps])
        (layer,) = self.needs.layers
        source = hidden.layers[layer]
        self._rows[torch.from_numpy(slots).to(self._rows.device)] = source[
            torch.from_numpy(index).to(source.device)
        ].to(self._rows)
        self._has_news[slots] = True

    def rerooted(self, survivors: Survivors) -> None:
        """Penalties follow the text; the tree is filled up by the next step."""
        self._laws.rerooted(survivors)

    def forecast(self, slots: Ints) -> Forecast:
        """A row for each sequence with news."""
        ready = self._ready(slots)
        return Forecast(
            lambda: self._yields.gains(self.trees, ready, self.slots.laws[ready]), len(ready), ready
        )

    def root_gains(self, laws: Ints) -> Floats:
        """What trees were worth so far, at least what is assumed at first."""
        return self._yields.root_gains(laws)

    @torch.inference_mode()
    def time_step(self, num_rows: int) -> float:
        """Seconds of a step over so many greedy sequences."""
        num_rows = min(num_rows, self._max_sequences)
        rows = self._rows.new_zeros(num_rows, self._rows.shape[1])
        sampled = SampledRows(
            SamplingParams(temperature=0.0), np.arange(num_rows * self._num_heads), PenaltyState(())
        )
        begun = time.monotonic()
        self._sampler.propose(self._logits(rows), [sampled], self._max_children)
        return time.monotonic() - begun

    @torch.inference_mode()
    def expand(self, slots: Ints) -> bool:
        """Propose trees for the sequences whose newest row has not been read yet."""
        ready = self._ready(slots)
        if not len(ready):
            return False
        self._stretches.begin()
        logits = self._logits(self._rows[torch.from_numpy(ready).to(self._rows.device)])
        self._stretches.end("forward", len(ready))
        tokens, log_probs = self._sampler.propose(logits, self._sampled_rows(ready), self._max_children)
        self._stretches.end("sample", len(logits))
        self._stretches.settle()
        self._has_news[ready] = False
        shape = (len(ready), self._num_heads, self._max_children)
        self._propose(ready, tokens.numpy().reshape(shape), log_probs.numpy().reshape(shape))
        return True

    def _ready(self, slots: Ints) -> Ints:
        """Sequences with news for which a step has room; the others' turn comes with the next one."""
        has_room = (self.trees.room(slots) > 0) & (self.slots.round_depths(slots) > 0)
        return slots[self._has_news[slots] & has_room][: self._max_sequences]

    def _logits(self, rows: Tensor) -> Tensor:
        """float32 [B * K, V] of rows [B, hidden], a sequence's heads together."""
        normed = rms_norm(rows, self._final_norm, self._eps)
        logits = [self._heads.logits(head, normed) for head in range(self._num_heads)]
        return torch.stack(logits, dim=1).flatten(0, 1).float()

    def _sampled_rows(self, slots: Ints) -> list[SampledRows]:
        """Which guess of an earlier head a guess stands behind is open: penalties count the known text alone."""
        heads = np.arange(self._num_heads)
        sampled = []
        for slot, root in zip(slots.tolist(), self.trees.root_positions[slots].tolist(), strict=True):
            params, penalties = self._laws[slot]
            sampled.append(SampledRows(params, root + 1 + heads, penalties))
        return sampled

    def _propose(self, slots: Ints, tokens: Ints, log_probs: Floats) -> None:
        """Put the best trees of candidates ([B, K, children], best first) below the roots, and learn their worth."""
        acceptances, sources = self._estimates(log_probs.astype(np.float64), slots)
        limits = self.slots.round_depths(slots)
        # Deeper ones would be proposed again before they can be verified, and better.
        acceptances *= np.arange(self._num_heads)[:, None] < limits[:, None, None]
        best = best_trees(np.minimum.accumulate(acceptances, axis=2), self._num_nodes)
        nodes, is_there = np.zeros_like(best.parents), best.depths == 0
        values = np.zeros((len(slots), self._num_nodes))
        for depth in range(1, self._num_heads + 1):
            level = (best.depths == depth) & (best.values > 0.0)
            level &= is_there[np.arange(len(slots))[:, None], best.parents]  # not where the tree was full
            rows, columns = level.nonzero()
            if not len(rows):
                break
            guesses = rows, np.full(len(rows), depth - 1), best.ranks[rows, columns]
            owners, parents = slots[rows], nodes[rows, best.parents[rows, columns]]
            values[rows, columns - 1] = self.trees.add_children(
                owners, parents, tokens[guesses], acceptances[guesses], sources[guesses]
            )
            nodes[rows, columns], is_there[rows, columns] = self.trees.find_children(
                owners, parents, tokens[guesses]
            )
        met = np.zeros(values.shape, dtype=np.bool_)
        met[:, : best.values.shape[1] - 1] = best.values[:, 1:] > 0.0
        self._yields.learn(self.slots.laws[slots], values, met)

    def _estimates(self, log_probs: Floats, slots: Ints) -> tuple[Floats, Ints]:
        """Acceptances, 0 of what the law removes, and sources of guesses; all [B, K, children]."""
        shape, is_greedy = log_probs.shape, self.slots.is_greedy[slots]
        of_rows = is_greedy.repeat(self._num_heads)
        priors, kinds = priors_and_kinds(log_probs.reshape(-1, shape[2]), of_rows)
        priors, kinds = priors.reshape(shape), kinds.reshape(shape)
        if self._calibrated.size:
            priors = np.where(is_greedy[:, None, None], self._calibrated, priors)
        sources = self._first_source + np.arange(self._num_heads)[:, None] * NUM_SAMPLED_KINDS + kinds
        return self.estimator.estimate(sources, priors, self.slots.rules[slots][:, None, None]) * (
            log_probs > -np.inf
        ), sources


def table_of(accuracies: SequenceABC[SequenceABC[float]]) -> Floats:
    """[K, R] of a checkpoint's accuracies by head and rank; ranks that a head does not tell of are worth nothing."""
    table = np.zeros((len(accuracies), max(map(len, accuracies), default=0)))
    for head, of_ranks in enumerate(accuracies):
        table[head, : len(of_ranks)] = of_ranks
    return table


def _of_ranks(accuracies: Floats, num_heads: int, num_ranks: int) -> Floats:
    """[K, num_ranks], not rising with the rank; a rank that is not given is worth half of the one before. Of nothing
    nothing."""
    if not accuracies.size:
        return np.zeros((num_heads, 0))
    accuracies = accuracies[:num_heads]
    given = np.minimum.accumulate(accuracies[:, :num_ranks], axis=1)
    further = 2.0 ** -np.arange(1, num_ranks - given.shape[1] + 1)
    return np.concatenate([given, given[:, -1:] * further], axis=1)
