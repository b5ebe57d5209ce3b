"""The seam for draft methods: what proposes continuations, whatever it is.

There are four kinds, all with this one interface: free ones (lookup), one forward without a cache (Medusa), one
forward per level with a cache (a small model, EAGLE), one forward for all levels with a cache (parallel heads).
A method grows the trees of all its sequences at once, and keeps what it remembers of them by slot. Nothing
outside of a method's file and the registry knows its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.sequences.hidden import NO_HIDDEN_ROWS, HiddenNeeds, HiddenRows
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, DraftTrees, Floats, Ints, Survivors
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import Progress

_NO_INTS = np.zeros(0, dtype=np.int64)
_NO_FLOATS = np.zeros(0)


JoinRanks = Callable[[torch.device], Communicator]
"""Meets the other ranks of `draft.model`, once this process has read its part of it."""


def alone(device: torch.device) -> Communicator:
    """`JoinRanks` of the only rank."""
    return SoloCommunicator()


@dataclass(frozen=True)
class MethodContext:
    """What methods are built from. target: the target's shape; device: where models compute; progress: told of what
    is loaded; join_ranks: for the method that has several."""

    config: Config
    target: ModelConfig
    device: torch.device
    slots: DraftedSlots
    estimator: AcceptanceEstimator
    tracer: Tracer
    progress: Progress
    join_ranks: JoinRanks = alone


class Following(NamedTuple):
    """Steps that are taken without a look at the trees in between.

    Attributes:
        most: how many, behind the first.
        decay: gains of each over those of the one before: how often the best proposal is accepted.
        rows_per_sequence: nodes that each expands, of which each gets `num_proposals`.
    """

    most: int
    decay: float = 0.0
    rows_per_sequence: int = 0
    num_proposals: int = 0


NO_FURTHER_STEPS = Following(0)


class Forecast:
    """What a method's next `expand` would do.

    Attributes:
        num_rows: rows of its forward, tokens included that the method has not read yet; 0: nothing is left to expand.
        slots: int64 [b], those whose trees would grow.
        following: what is known of the steps that the same `expand` can take behind it.
    """

    def __init__(
        self,
        gains: Floats | Callable[[], Floats],
        num_rows: int,
        slots: Ints,
        following: Following = NO_FURTHER_STEPS,
    ) -> None:
        """gains: themselves, or what finds them, before the trees change: a fixed budget never asks."""
        self._gains = gains
        self.num_rows = num_rows
        self.slots = slots
        self.following = following

    @cached_property
    def gains(self) -> Floats:
        """float64 [M], expected accepted tokens, in this round's trees, of each proposal, descending; none of
        proposals that are too deep for it, and only good for the next."""
        return self._gains() if callable(self._gains) else self._gains


@dataclass(frozen=True)
class VerifiedStep:
    """What a round did for one sequence. Message nodes are its known tokens (the chain), then its draft tree.

    Attributes:
        sequence: with the tokens that came out already.
        index: of the step among those of the round, also of those that ended by being cancelled.
        num_known: tokens that had a KV row in the target before.
        committed: int64 [C] message nodes whose rows the target keeps: those of the tokens at positions
            num_known, num_known + 1, …
        chain_length: nodes before the draft tree; its root is the last of them.
        growing_nodes: int64 [K] of each node of the draft tree, root first, the node in the growing tree.
    """

    sequence: Sequence
    index: int
    num_known: int
    committed: Ints
    chain_length: int
    growing_nodes: Ints


@dataclass(frozen=True)
class Verified:
    """A round that was verified, before its trees are re-rooted.

    hidden: the rows that the round's methods and rules asked for, by the steps' `index`; None where nobody asked.
    """

    steps: tuple[VerifiedStep, ...]
    hidden: HiddenRows | None


class DraftMethod(ABC):
    """Proposes continuations of sequences. Never fails a request: what it cannot do it leaves undone.

    Slots come as int64 [B], distinct; they belong to sequences whose requests use the method.
    """

    name: str
    is_trained = False  # its weights (draft.NAME.model) belong to one target
    has_node_rows = False  # it can keep hidden rows of its own at the nodes of trees
    is_free = False  # `expand` costs nothing worth measuring: it is always run, and never forecast
    needs: HiddenNeeds = NO_HIDDEN_ROWS

    def __init__(self, slots: DraftedSlots, estimator: AcceptanceEstimator) -> None:
        self.slots = slots
        self.trees = slots.trees
        self.estimator = estimator

    @classmethod
    @abstractmethod
    def build(cls, context: MethodContext) -> Self:
        """The method as its section of the configuration says, with its weights loaded.

        Raises:
            ValueError: a checkpoint is missing or does not fit, or the configuration.
        """

    @classmethod
    def needs_of(cls, config: Config, target: ModelConfig) -> HiddenNeeds:
        """What `needs` of the built method will be: the target asks before anything is loaded."""
        return NO_HIDDEN_ROWS

    def prefix_kept(self, sequence: Sequence) -> int:
        """How many of the sequence's first tokens it need not see verified again: more are not shared.

        A method that lives on the target's hidden rows has them only of what it kept; one that reads tokens by
        itself, or looks at the newest row alone, needs none.
        """
        return len(sequence.tokens)

    def start(self, sequence: Sequence) -> None:
        """A sequence begins to run in its slot, with `num_committed` tokens from shared pages."""

    def finish(self, sequence: Sequence) -> None:
        """The sequence leaves its slot."""

    def close(self) -> None:
        """There will be no further call: who works for it may end."""

    def forecast(self, slots: Ints) -> Forecast:
        """What the next `expand` over these slots would do; free methods are not asked."""
        return Forecast(_NO_FLOATS, 0, _NO_INTS)

    @abstractmethod
    def expand(self, slots: Ints) -> bool:
        """Add proposals to the trees of these slots; False when there was nothing to add."""

    def expand_levels(self, slots: Ints, num_further: int) -> int:
        """`expand`, and up to so many further steps right behind it, at most `Forecast.following.most`; returns how
        many steps that were."""
        return int(self.expand(slots))

    def observe(self, verified: Verified) -> None:
        """A round was verified: true hidden rows are here."""

    def rerooted(self, survivors: Survivors) -> None:
        """Trees were re-rooted: move what is kept beside their nodes."""

    def survival(self, slots: Ints, sent: DraftTrees) -> float:
        """Probability that the next `expand`, done while the trees `sent` are verified, spares one afterwards.

        A node counts with its value if it is not verified itself. Those that are spare nothing: the verdict makes one
        of their children the root, or a node further down, and that has to be expanded.
        """
        return 0.0

    def keep_node_rows(self) -> None:
        """From now on, before any sequence starts, what `node_rows` gives is kept."""
        raise AssertionError(f"{self.name} has no rows at nodes")

    def node_rows(self, slots: Ints, nodes: Ints) -> tuple[torch.Tensor, Bools]:
        """What leaves its last layer, before the final norm, at nodes of trees, and where it has that: for judges
        that read both models.

        Args:
            slots: int64 [B]; nodes: int64 [B, K].

        Returns:
            [B, K, hidden], zeros where it has none, and bool [B, K].
        """
        raise AssertionError(f"{self.name} has no rows at nodes")

    def root_gains(self, laws: Ints) -> Floats:
        """The gains of an `expand` over trees of roots alone, of sequences with these laws ([B], see `DraftedSlots`).

        They are what was seen so far, but no less than what is assumed at first, so that a hard text does not end
        drafting for those after it.
        """
        return _NO_FLOATS

    def unread(self, slots: Ints) -> Ints:
        """How many tokens `read` has to read before proposals can follow, of each slot where it has to."""
        return _NO_INTS

    def read(self, slots: Ints) -> int:
        """Read one chunk of what is unread; returns its tokens."""
        return 0

    def time_step(self, num_rows: int) -> float | None:
        """Seconds of an `expand` over this many rows, measured before any sequence starts; None if it has no cost."""
        return None
