"""From planned steps and their trees to the message of a round."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.link.messages import Steps
from outrider.workers.link.starts import ScoreNeeds, SequenceStart
from outrider.workers.rounds.scheduler import PlannedStep
from outrider.workers.sequences.hidden import HiddenNeeds, all_layers
from outrider.workers.sequences.rules import Rule
from outrider.workers.sequences.segments import places_in, starts_of
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import DraftTrees, Ints


class Round(NamedTuple):
    """A round under verification. Message nodes of a step are its chain, then its tree without the root.

    Attributes:
        trees: a row per step; no node where the chain does not reach the last known token.
        chain_lengths: int64 [B].
        num_known: int64 [B], tokens that have a KV row in the target before this round.
        first_hidden: int64 [B], the first message node whose hidden rows come back; the number of nodes: none do.
        layers: of which layers they come back.
        expected_at: when the scores should be here, by the loop's clock.
    """

    round_id: int
    lane: int
    steps: tuple[PlannedStep, ...]
    trees: DraftTrees
    chain_lengths: Ints
    num_known: Ints
    first_hidden: Ints
    layers: tuple[int, ...]
    expected_at: float

    @property
    def num_nodes(self) -> Ints:
        """[B] message nodes."""
        return self.chain_lengths + np.maximum(self.trees.counts - 1, 0)


def start_message(sequence: Sequence, rule: Rule) -> SequenceStart:
    """What the target has to know of a sequence before its first step."""
    return SequenceStart(
        slot=sequence.slot,
        prompt_length=len(sequence.request.prompt_tokens),
        num_shared_tokens=sequence.num_committed,
        sampling=replace(sequence.request.sampling, logprobs=needs_logprobs(sequence, rule)),
        needs=score_needs(rule),
    )


def score_needs(rule: Rule) -> ScoreNeeds:
    """What the target computes for a sequence besides its samples; what kept tokens cost is told of all of them."""
    return ScoreNeeds(rule.needs.child_logprobs or not rule.is_lossless, rule.needs.entropy)


def needs_logprobs(sequence: Sequence, rule: Rule) -> bool:
    """Whether the target tells the log-probabilities of its samples: a kept token is compared with what it took the
    place of."""
    return sequence.request.sampling.logprobs or not rule.is_lossless


def hidden_wanted(
    steps: SequenceABC[PlannedStep], trees: DraftTrees, drafting: DraftEngine, rules: SequenceABC[Rule]
) -> tuple[Ints, tuple[int, ...]]:
    """From which message node on the hidden rows of each step are wanted ([B]), and of which layers."""
    firsts, all_needs = [], []
    for step, rule, count in zip(steps, rules, trees.counts.tolist(), strict=True):
        needs = drafting.hidden_needs(step.sequence)
        if rule.needs.hidden.layers:
            needs = [*needs, rule.needs.hidden]
        num_nodes = step.chain_length + max(count - 1, 0)
        firsts.append(_first_wanted(needs, step, num_nodes))
        all_needs += needs
    return np.array(firsts, dtype=np.int64), all_layers(all_needs)


def steps_message(round_: Round) -> Steps:
    """The round's nodes; what the steps' sequences owe the target (accepted rows, new pages) is taken off them."""
    chains, pages, accepted = [], [], []
    for step, length in zip(round_.steps, round_.chain_lengths.tolist(), strict=True):
        sequence = step.sequence
        chains.append(sequence.tokens[sequence.num_committed : sequence.num_committed + length])
        pages.append(sequence.pages[sequence.num_pages_sent :])
        sequence.num_pages_sent = len(sequence.pages)
        accepted.append(sequence.pending_accepted)
        sequence.pending_accepted = ()
    lengths, trees, num_nodes = round_.chain_lengths, round_.trees, round_.num_nodes
    begins = starts_of(num_nodes)
    tokens = np.empty(int(begins[-1] + num_nodes[-1]), dtype=np.int64)
    parents = np.empty_like(tokens)
    places = places_in(lengths)
    in_chain = begins.repeat(lengths) + places
    tokens[in_chain] = _flat(chains)
    parents[in_chain] = np.maximum(places - 1, 0)
    # A tree's root is the last of its chain.
    drafted = trees.exists
    drafted[:, 0] = False
    last = (lengths - 1)[:, None]
    in_tree = (begins[:, None] + last + np.arange(drafted.shape[1]))[drafted]
    tokens[in_tree] = trees.tokens[drafted]
    parents[in_tree] = (trees.parents + last)[drafted]
    return Steps(
        slots=np.array([step.sequence.slot for step in round_.steps], dtype=np.int64),
        num_accepted=np.array([len(a) for a in accepted], dtype=np.int64),
        accepted=_flat(accepted),
        num_new_pages=np.array([len(p) for p in pages], dtype=np.int64),
        new_pages=_flat(pages),
        num_nodes=num_nodes,
        tokens=tokens,
        parents=parents,
        first_sampled=lengths - (trees.counts > 0),
        first_hidden=round_.first_hidden,
    )


def _first_wanted(needs: SequenceABC[HiddenNeeds], step: PlannedStep, num_nodes: int) -> int:
    if not needs:
        return num_nodes
    if any(need.of_context for need in needs):
        return 0
    return step.chain_length - int(step.reaches_end)


def _flat(parts: SequenceABC[SequenceABC[int]]) -> Ints:
    return np.array([*chain.from_iterable(parts)], dtype=np.int64)
