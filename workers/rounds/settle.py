"""What one round's scores mean: tokens out, KV rows to keep, trees re-rooted, or the end of a text."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import numpy as np
import torch

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import Verified, VerifiedStep
from outrider.workers.link.messages import Scores
from outrider.workers.rounds.outgoing import Round, needs_logprobs, score_needs
from outrider.workers.sequences.hidden import HiddenRows, all_layers
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.rules import NodeScores, Rule, Verdicts
from outrider.workers.sequences.segments import starts_of
from outrider.workers.sequences.sequence import (
    NO_TREE,
    NONE_KEPT,
    KeptAccount,
    RequestStats,
    RoundTree,
    Sequence,
    TokenEvent,
    TokenLogprobs,
)
from outrider.workers.sequences.tree import Bools, Ints

_NOT_NUMBERS = "the target's logits after token {position} are not numbers, or nothing is left to sample from"


class Outcome(NamedTuple):
    """What came out of a step; the event is empty while a prompt is being read."""

    sequence: Sequence
    event: TokenEvent


def settle_round(
    round_: Round, scores: Scores, rules: SequenceABC[Rule], drafting: DraftEngine
) -> list[Outcome]:
    """Accept, extend the sequences, note which KV rows the next messages commit, re-root the draft trees.

    rules: of each step. A sequence that finishes keeps its tree and pages; the caller frees them.
    """
    verdicts = _Verdicts(round_, scores, rules, drafting)
    outcomes, verified, going_on = [], [], []
    for index, step in enumerate(round_.steps):
        sequence, chain = step.sequence, step.chain_length
        if sequence.cancelled:
            outcomes.append(Outcome(sequence, _event(sequence, finish_reason="cancelled")))
            continue
        committed = list(range(chain))
        if not step.reaches_end:
            event = _event(sequence)
        else:
            event = _emit(sequence, verdicts, index)
            committed += verdicts.message_nodes(index)[: len(event.tokens)]  # a stop token may come before
            if not event.finish_reason:
                going_on.append(index)
                drafting.slots.extend(sequence, list(event.tokens))
        sequence.pending_accepted = tuple(committed)
        sequence.num_committed += len(committed)
        outcomes.append(Outcome(sequence, event))
        verified.append((index, sequence, committed))
    if verified and drafting.observes:
        drafting.observe(_verified(round_, scores, verified))
    if going_on:
        slots = np.array([round_.steps[i].sequence.slot for i in going_on])
        trees, all_verdicts = round_.trees, verdicts.all
        if len(going_on) < len(round_.steps):
            chosen = np.array(going_on)
            trees, all_verdicts = trees.rows(chosen), all_verdicts.rows(chosen)
        drafting.settle(slots, trees, all_verdicts)
    return outcomes


class _Verdicts:
    """The verdicts of all steps of a round, by the rule of each, and the scores by node."""

    def __init__(
        self, round_: Round, scores: Scores, rules: SequenceABC[Rule], drafting: DraftEngine
    ) -> None:
        self.trees = round_.trees
        self.scores = _node_scores(round_, scores, rules, drafting)
        self._flat = scores
        distinct = dict.fromkeys(rules)
        if len(distinct) == 1:
            self.all = rules[0].verdict(self.trees, self.scores)
        else:
            parts = []
            for rule in distinct:
                rows = np.array([i for i, other in enumerate(rules) if other == rule])
                parts.append((rows, rule.verdict(self.trees.rows(rows), self.scores.rows(rows))))
            self.all = _merged(len(rules), parts)
        self.has_kept = np.logical_or.reduce(self.all.is_kept, axis=1).tolist()
        tokens, origins = self.all.emitted(self.trees)
        self.tokens, self.origins = tokens.tolist(), origins.tolist()
        self.num_accepted = self.all.num_accepted.tolist()
        self.failed = self.all.failed.tolist()
        self.paths = self.all.paths.tolist()
        self._chain_lengths = round_.chain_lengths.tolist()
        self._num_sampled = round_.trees.counts
        last = self.all.paths[np.arange(len(rules)), self.all.num_accepted]
        is_child = (self.trees.parents == last[:, None]) & self.trees.exists
        is_child[:, 0] = False
        self.num_offered = (self.all.num_accepted + np.logical_or.reduce(is_child, axis=1)).tolist()
        """How deep drafted tokens stood below accepted parents."""
        self.num_drafted = np.maximum(self.trees.counts - 1, 0).tolist()
        asks = [needs_logprobs(step.sequence, rule) for step, rule in zip(round_.steps, rules, strict=True)]
        self._logprob_rows = starts_of(self._num_sampled * np.array(asks)).tolist() if any(asks) else []

    def message_nodes(self, index: int) -> list[int]:
        """Message nodes of the accepted drafts of a step."""
        chain = self._chain_lengths[index]
        return [chain - 1 + node for node in self.paths[index][1 : self.num_accepted[index] + 1]]

    def logprobs(self, index: int, count: int, num_top: int) -> tuple[TokenLogprobs, ...]:
        """Of the first `count` tokens that came out of a step. Token i was chosen after node i of the path."""
        found, first = [], self._logprob_rows[index]
        for i, node in enumerate(self.paths[index][:count]):
            row = first + node
            logprob = float(self._flat.logprobs[row])
            if self.origins[index][i] == Origin.KEPT:
                logprob = float(self.scores.child_logprobs[index, self.paths[index][i + 1]])
            top = zip(
                self._flat.top_ids[row, :num_top].tolist(),
                self._flat.top_logprobs[row, :num_top].tolist(),
                strict=True,
            )
            found.append(TokenLogprobs(logprob, tuple(top)))
        return tuple(found)

    def tree(self, index: int, count: int) -> RoundTree:
        """Of a step, and which of its nodes are among the first `count` tokens that came out."""
        num_nodes, num_accepted = int(self.trees.counts[index]), min(count, self.num_accepted[index])
        return RoundTree(
            tuple(self.trees.tokens[index, :num_nodes].tolist()),
            tuple(self.trees.parents[index, :num_nodes].tolist()),
            tuple(self.paths[index][1 : num_accepted + 1]),
        )

    def kept(self, index: int, count: int) -> KeptAccount:
        """Of the first `count` tokens that came out of a step: what those cost that the target did not say."""
        account, path, first = NONE_KEPT, self.paths[index], self._logprob_rows[index]
        for i in range(count):
            if self.origins[index][i] == Origin.KEPT:
                own = float(self._flat.logprobs[first + path[i]])
                gap = own - float(self.scores.child_logprobs[index, path[i + 1]])
                score = float(self.all.judged[index, i + 1])
                account = account.plus(KeptAccount(1, gap, gap, score, score))
        return account


def _emit(sequence: Sequence, verdicts: _Verdicts, index: int) -> TokenEvent:
    """Extend the sequence by what came out, up to a stop token (included) or the length limit."""
    num_accepted = verdicts.num_accepted[index]
    failed = verdicts.failed[index]
    emitted = verdicts.tokens[index][: num_accepted + (0 if failed else 1)]
    tokens, finish_reason = _until_end(sequence, emitted)
    error = ""
    if failed and not finish_reason:
        finish_reason = "error"
        error = _NOT_NUMBERS.format(position=len(sequence.tokens) + len(tokens) - 1)
    sequence.tokens += tokens
    sequence.stats = _count(sequence.stats, verdicts, index, len(tokens))
    sampling = sequence.request.sampling
    logprobs: tuple[TokenLogprobs, ...] = ()
    if sampling.logprobs:
        logprobs = verdicts.logprobs(index, len(tokens), sampling.top_logprobs)
    origins = tuple(map(_ORIGINS.__getitem__, verdicts.origins[index][: len(tokens)]))
    tree = verdicts.tree(index, len(tokens)) if sequence.request.draft.tree else NO_TREE
    return TokenEvent(
        sequence.id, tuple(tokens), origins, logprobs, finish_reason, error, sequence.stats, tree
    )


_ORIGINS = tuple(Origin)


def _until_end(sequence: Sequence, emitted: list[int]) -> tuple[list[int], str]:
    """The tokens up to a stop token (included) or the length limit, and why the text ends there, if it does."""
    stops, num_remaining = sequence.request.sampling.stop_token_ids, sequence.num_remaining
    emitted = emitted[:num_remaining]
    for index, token in enumerate(emitted):
        if token in stops:
            return emitted[: index + 1], "stop"
    return emitted, "length" if len(emitted) == num_remaining else ""


def _count(stats: RequestStats, verdicts: _Verdicts, index: int, num_emitted: int) -> RequestStats:
    num_accepted = verdicts.num_accepted[index]
    num_levels = max(len(stats.depth_drafted), verdicts.num_offered[index])
    return RequestStats(
        num_rounds=stats.num_rounds + 1,
        num_drafted=stats.num_drafted + verdicts.num_drafted[index],
        num_accepted=stats.num_accepted + num_accepted,
        kept=stats.kept.plus(verdicts.kept(index, num_emitted)) if verdicts.has_kept[index] else stats.kept,
        num_cached_prompt_tokens=stats.num_cached_prompt_tokens,
        num_recomputed=stats.num_recomputed,
        depth_drafted=_one_more(stats.depth_drafted, verdicts.num_offered[index], num_levels),
        depth_accepted=_one_more(stats.depth_accepted, num_accepted, num_levels),
    )


def _one_more(counts: tuple[int, ...], depth: int, num_levels: int) -> tuple[int, ...]:
    """One more of each of the first `depth` counts, of which there are `num_levels` then."""
    longer = counts + (0,) * (num_levels - len(counts))
    return (*[count + 1 for count in longer[:depth]], *longer[depth:])


def _node_scores(
    round_: Round, scores: Scores, rules: SequenceABC[Rule], drafting: DraftEngine
) -> NodeScores:
    """Flat scores of the sampled nodes, padded to the trees."""
    exists = round_.trees.exists
    shape = exists.shape
    tokens, failed = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    tokens[exists], failed[exists] = scores.tokens, scores.failed
    child_logprobs = entropies = child_laws = np.zeros(shape)  # not asked
    is_pushed_down = np.zeros(shape, dtype=np.bool_)
    if len(scores.child_logprobs) or len(scores.entropies):
        child_logprobs, entropies, child_laws = (np.zeros(shape) for _ in range(3))
        needs = [score_needs(rule) for rule in rules]
        drafted = exists & np.array([need.child_logprobs for need in needs])[:, None]
        drafted[:, 0] = False
        child_logprobs[drafted], child_laws[drafted] = scores.child_logprobs, scores.child_laws
        is_pushed_down[drafted] = scores.is_pushed_down
        entropies[exists & np.array([need.entropy for need in needs])[:, None]] = scores.entropies
    draft_rows, has_draft_row = _draft_rows(round_, rules, drafting)
    return NodeScores(
        tokens,
        failed,
        child_logprobs,
        entropies,
        child_laws,
        is_pushed_down,
        draft_rows,
        has_draft_row,
        _hidden_by_node(round_, scores, rules),
    )


def _draft_rows(round_: Round, rules: SequenceABC[Rule], drafting: DraftEngine) -> tuple[torch.Tensor, Bools]:
    """[B, K, draft hidden] and [B, K], see `NodeScores`, where a rule reads them."""
    trees = round_.trees
    if not any(rule.needs.draft_rows for rule in rules):
        return torch.empty(*trees.tokens.shape, 0), np.zeros(trees.tokens.shape, dtype=np.bool_)
    slots = np.array([step.sequence.slot for step in round_.steps], dtype=np.int64)
    return drafting.node_rows(slots, trees.growing_nodes)


def _hidden_by_node(round_: Round, scores: Scores, rules: SequenceABC[Rule]) -> dict[int, torch.Tensor]:
    """By layer, [B, K, hidden] of the trees' nodes, for the layers that rules read; zero rows where nothing came."""
    layers = all_layers(rule.needs.hidden for rule in rules)
    hidden = _hidden_rows(round_, scores)
    if hidden is None or not layers:
        return {}
    nodes = np.arange(round_.trees.tokens.shape[1]) + round_.chain_lengths[:, None] - 1  # message nodes
    sent = round_.trees.exists & (nodes >= hidden.first_nodes[:, None])
    rows = np.where(sent, hidden.first_rows[:, None] + nodes - hidden.first_nodes[:, None], 0)
    index, mask = torch.from_numpy(rows), torch.from_numpy(sent)[..., None]
    return {
        layer: hidden.layers[layer][index.to(hidden.layers[layer].device)].masked_fill(
            ~mask.to(hidden.layers[layer].device), 0.0
        )
        for layer in layers
    }


def _hidden_rows(round_: Round, scores: Scores) -> HiddenRows | None:
    if scores.hidden is None:
        return None
    counts = round_.num_nodes - round_.first_hidden
    layers = dict(zip(round_.layers, scores.hidden.unbind(0), strict=True))
    return HiddenRows(layers, round_.first_hidden, np.cumsum(counts) - counts)


def _verified(
    round_: Round, scores: Scores, settled: SequenceABC[tuple[int, Sequence, list[int]]]
) -> Verified:
    steps = tuple(
        VerifiedStep(
            sequence=sequence,
            index=index,
            num_known=int(round_.num_known[index]),
            committed=np.array(committed, dtype=np.int64),
            chain_length=round_.steps[index].chain_length,
            growing_nodes=round_.trees.growing_nodes[index, : round_.trees.counts[index]],
        )
        for index, sequence, committed in settled
    )
    return Verified(steps, _hidden_rows(round_, scores))


def _merged(num_rows: int, parts: SequenceABC[tuple[Ints, Verdicts]]) -> Verdicts:
    """Verdicts of some rows each, put together."""
    width = max(verdicts.paths.shape[1] for _, verdicts in parts)
    paths, is_kept = (np.zeros((num_rows, width), dtype) for dtype in (np.int64, np.bool_))
    num_accepted, next_tokens = (np.zeros(num_rows, dtype=np.int64) for _ in range(2))
    failed, judged = np.zeros(num_rows, dtype=np.bool_), np.zeros(paths.shape)
    for rows, verdicts in parts:
        judged[rows, : verdicts.paths.shape[1]] = verdicts.judged
        paths[rows, : verdicts.paths.shape[1]] = verdicts.paths
        is_kept[rows, : verdicts.paths.shape[1]] = verdicts.is_kept
        num_accepted[rows], next_tokens[rows] = verdicts.num_accepted, verdicts.next_tokens
        failed[rows] = verdicts.failed
    return Verdicts(paths, num_accepted, next_tokens, is_kept, failed, judged)


def _event(sequence: Sequence, finish_reason: str = "") -> TokenEvent:
    return TokenEvent(sequence.id, (), (), (), finish_reason, "", sequence.stats)
