"""Sequences whose drafting is played by hand: trees are looked at, cut and answered without a target."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC

import numpy as np

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import Verified, VerifiedStep
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import EXACT
from outrider.workers.sequences.sequence import EXACTLY, AcceptanceOptions, DraftOptions, Request, Sequence
from outrider.workers.sequences.tree import DraftTrees, GrowingTrees, Offers
from support.steps import node_scores

GREEDY = SamplingParams(temperature=0.0, max_tokens=1000)


def sequence_of(
    prompt: SequenceABC[int],
    slot: int = 0,
    methods: tuple[str, ...] = ("ngram",),
    max_nodes: int = 8,
    max_depth: int = 4,
    sampling: SamplingParams = GREEDY,
    acceptance: AcceptanceOptions = EXACTLY,
) -> Sequence:
    """A sequence that is about to run in its slot; its id is the slot's number."""
    draft = DraftOptions(methods, max_nodes, max_depth)
    request = Request(str(slot), tuple(prompt), sampling, draft, acceptance)
    return Sequence(request, list(prompt), slot=slot)


def path_of(trees: GrowingTrees, slot: int, node: int) -> list[int]:
    """Tokens from below the root down to a node."""
    tokens: list[int] = []
    while node:
        tokens.insert(0, int(trees.tokens[slot, node]))
        node = int(trees.parents[slot, node])
    return tokens


def paths_of(trees: GrowingTrees, slot: int) -> list[list[int]]:
    """Of all nodes below the root, oldest first."""
    return [path_of(trees, slot, node) for node in range(1, int(trees.num_nodes[slot]))]


def node_at(trees: GrowingTrees, slot: int, path: SequenceABC[int]) -> int:
    """The node at which these tokens from below the root end."""
    return [[], *paths_of(trees, slot)].index(list(path))


def children_of(trees: GrowingTrees, slot: int, node: int = 0) -> list[int]:
    """Tokens proposed after a node, oldest first."""
    nodes = range(1, int(trees.num_nodes[slot]))
    return [int(trees.tokens[slot, child]) for child in nodes if trees.parents[slot, child] == node]


def cut_of(trees: GrowingTrees, chosen: Mapping[int, SequenceABC[int]]) -> DraftTrees:
    """The trees of the roots and the chosen nodes, given by slot, parents first."""
    counts = np.array([len(nodes) for nodes in chosen.values()])
    nodes = np.zeros((len(counts), counts.max()), dtype=np.int64)
    for row, own in enumerate(chosen.values()):
        nodes[row, : len(own)] = own
    return trees.cut(np.array(list(chosen)), Offers(nodes, np.ones(nodes.shape)), counts)


def answer(
    engine: DraftEngine, slots: SequenceABC[int], sent: DraftTrees, said: SequenceABC[Mapping[int, int]]
) -> list[list[int]]:
    """Settle a round by the exact rule; returns what comes out of each tree of `sent`.

    said: for each slot the target's tokens by node of the growing tree; after the others it says 0.
    """
    tokens = np.array(
        [
            [own.get(node, 0) for node in nodes]
            for own, nodes in zip(said, sent.growing_nodes.tolist(), strict=True)
        ]
    )
    scores = node_scores(tokens)
    verdicts = EXACT.verdict(sent, scores)
    emitted = [
        row[: count + 1]
        for row, count in zip(verdicts.emitted(sent)[0].tolist(), verdicts.num_accepted.tolist(), strict=True)
    ]
    steps = []
    for index, (slot, came_out) in enumerate(zip(slots, emitted, strict=True)):
        sequence = engine.slots.sequence(slot)
        num_known = len(sequence.tokens) - 1
        sequence.tokens += came_out
        engine.slots.extend(sequence, came_out)
        committed = verdicts.paths[index, : len(came_out)]
        growing_nodes = sent.growing_nodes[index, : sent.counts[index]]
        steps.append(VerifiedStep(sequence, index, num_known, committed, 1, growing_nodes))
    engine.observe(Verified(tuple(steps), None))
    engine.settle(np.array(slots), sent, verdicts)
    return emitted
