"""Draft method `model`: a small language model grows the tree best first, under the noise of the target.

Each step runs the nodes whose continuations promise most through the model, with their KV rows written behind
the committed prefix of the drafter's own paged cache. A verdict keeps the rows of the path that came out and
of everything that survives below it (SwiftSpec, arXiv 2506.11309).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import numpy as np
import torch

from outrider.workers.drafting.acceptance import AcceptanceEstimator, model_source
from outrider.workers.drafting.engine import StepForecast
from outrider.workers.drafting.rows import SequenceRows, batch_of, chain
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import draft_capacities, forward_of
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.trace import Tracer

MODEL_METHOD = 1
_MAX_LAG = 32  # tokens the model reads on the way to drafting; more are read in chunks beforehand
_MIN_GAIN = 0.01  # expected accepted tokens below which a node is not worth a row
_FIRST_YIELD = 0.5  # assumed of the best proposals before any was seen
_SMOOTHING = 0.05


@dataclass
class _CachedSequence:
    """The drafter's rows of one sequence: `context_len` committed ones, then one per expanded tree node."""

    penalties: PenaltyState
    pages: list[int] = field(default_factory=list)
    context_len: int = 0
    num_pages_remembered: int = 0
    rows: dict[int, int] = field(default_factory=dict)  # tree node -> tree row; row 0 is the root
    parents: list[int] = field(default_factory=list)  # tree row -> parent's tree row

    def lag(self, sequence: Sequence) -> int:
        """Known tokens without a row, the root included; 0 once the root has been expanded."""
        return 0 if self.rows else len(sequence.tokens) - self.context_len


@dataclass(frozen=True)
class _Work:
    """Rows that one sequence puts into a forward, and which tree nodes the last of them stand for."""

    sequence: Sequence
    nodes: tuple[int, ...]
    row_of: dict[int, int]  # tree node -> tree row, for all nodes that have one once this is computed
    rows: SequenceRows


class ModelDrafter:
    """Grows trees with a draft model. Never fails a request: without pages it just proposes nothing."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        pool: PagePool,
        sampler: Sampler,
        estimator: AcceptanceEstimator,
        num_target_tokens: int,
        max_children: int,
        rows_per_sequence: int,
        max_rows: int,
        prefill_chunk: int,
        tracer: Tracer,
    ) -> None:
        self._model = model
        self._run = forward_of(model, cache, draft_capacities(model, cache))
        self._tracer = tracer
        self._cache = cache
        self._pool = pool
        self._sampler = sampler
        self._estimator = estimator
        self._num_target_tokens = num_target_tokens  # a padded vocabulary may have more ids than the target
        self._max_children = max_children
        self._rows_per_sequence = rows_per_sequence
        self._max_rows = max_rows
        self._prefill_chunk = prefill_chunk
        self._cached: dict[str, _CachedSequence] = {}
        # By rank: how likely the proposal below a node is accepted, if the node is.
        self._first_yields = [_FIRST_YIELD / 4**rank for rank in range(max_children)]
        self._greedy_yields, self._sampled_yields = list(self._first_yields), list(self._first_yields)

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages that hold the beginning of the prompt."""
        pages = self._pool.share_prefix(sequence.tokens, len(sequence.tokens) - 1)
        self._cached[sequence.id] = _CachedSequence(
            penalties=PenaltyState(sequence.request.prompt_tokens),
            pages=pages,
            context_len=len(pages) * self._pool.page_size,
            num_pages_remembered=len(pages),
        )

    def finish(self, sequence: Sequence) -> None:
        """Give the pages back."""
        self._pool.release(self._cached.pop(sequence.id).pages)

    def unread(self, sequences: SequenceABC[Sequence]) -> list[int]:
        """The tokens that these sequences' caches lack, where they are too many for a step to read them."""
        missing = [self._cached[sequence.id].lag(sequence) - 1 for sequence in sequences]
        return [count for count in missing if count >= _MAX_LAG]

    def read_prompts(self, sequences: SequenceABC[Sequence]) -> int:
        """Read one chunk, shared between the sequences that lag far behind; returns its tokens."""
        room, work = self._prefill_chunk, []
        for sequence in sequences:
            cached = self._cached[sequence.id]
            missing = cached.lag(sequence) - 1  # the root is left for drafting
            count = min(missing, room)
            if missing < _MAX_LAG or count <= 0 or not self._take_pages(cached, cached.context_len + count):
                continue
            room -= count
            tokens = sequence.tokens[cached.context_len : cached.context_len + count]
            rows = SequenceRows(cached.pages, cached.context_len, chain(count), 0, tokens)
            work.append(_Work(sequence, (), {}, rows))
        if work:
            self._forward(work)
            for item in work:
                self._commit_rows(item.sequence, len(item.rows.tokens))
        return self._prefill_chunk - room

    def forecast(self, sequences: SequenceABC[Sequence]) -> StepForecast:
        """What the next step over these sequences would do."""
        gains, num_rows = [], 0
        for sequence in sequences:
            frontier = [node for _, node in self._frontier(sequence, self._rows_for_each(sequences))]
            if frontier:
                num_rows += self._cached[sequence.id].lag(sequence) + sum(node > 0 for node in frontier)
            for node in frontier:
                if sequence.tree.nodes[node].depth < sequence.request.draft.max_depth:
                    gains += self._gains(sequence, node)
        return StepForecast(sorted((gain for gain in gains if gain > 0.0), reverse=True), num_rows)

    def root_gains(self, sequences: SequenceABC[Sequence]) -> list[float]:
        """The gains of a step if these sequences' trees were only roots, at least those assumed at first."""
        return [
            max(seen, first)
            for sequence in sequences
            for seen, first in zip(self._yields_of(sequence), self._first_yields, strict=True)
        ]

    def survival(self, sequences: SequenceABC[Sequence]) -> float:
        """Of the nodes that the next step expands and that are not verified now, the best one's value."""
        values = [
            sequence.tree.nodes[node].value
            for sequence in sequences
            for _, node in self._frontier(sequence, self._rows_for_each(sequences))
            if node not in sequence.sent_tree.growing_nodes
        ]
        return max(values, default=0.0)

    @torch.inference_mode()
    def time_step(self, num_rows: int) -> float:
        """Seconds of a step over one chain of greedy rows, all proposing; call before any sequence starts."""
        pages = self._pool.allocate(min(self._pool.pages_for(num_rows), self._pool.num_available))
        num_rows = min(num_rows, len(pages) * self._pool.page_size)
        rows = SequenceRows(pages, 0, chain(num_rows), 0, [0] * num_rows)
        greedy = SampledRows(
            SamplingParams(temperature=0.0), np.zeros(num_rows, dtype=np.int64), PenaltyState(())
        )
        begun = time.monotonic()
        hidden = self._run(batch_of([rows], self._cache.page_size, self._model.device)).last
        self._sampler.propose(self._model.logits(hidden), [greedy], self._max_children)
        seconds = time.monotonic() - begun
        self._pool.release(pages)
        return seconds

    @torch.inference_mode()
    def step(self, sequences: SequenceABC[Sequence]) -> bool:
        """Expand the most promising nodes of these trees in one forward."""
        work = self._choose(sequences)
        if not work:
            return False
        hidden = self._forward(work)
        proposing: list[int] = []
        at = 0
        for item in work:
            at += len(item.rows.tokens)
            proposing += range(at - len(item.nodes), at)
        with self._tracer.span("forward", len(proposing)):
            logits = self._model.logits_of(hidden, proposing)
        with self._tracer.span("sample", len(proposing)):
            tokens, log_probs = self._sampler.propose(
                logits, [self._sampled(item) for item in work], self._max_children
            )
        proposals = zip(tokens.tolist(), log_probs.tolist(), strict=True)
        for item in work:
            self._remember_rows(item)
            for node in item.nodes:
                promised = item.sequence.tree.nodes[node].value
                values = self._add_children(item.sequence, node, *next(proposals))
                yields = self._yields_of(item.sequence)
                for rank, value in enumerate(values):
                    yields[rank] += _SMOOTHING * (value - promised * yields[rank])
        return True

    def rerooted(self, sequence: Sequence, path: list[int], survivors: dict[int, int]) -> None:
        """Keep the rows of the path that came out and of the survivors below it, contiguous again."""
        cached = self._cached[sequence.id]
        old_rows = cached.rows
        for token in sequence.tokens[len(sequence.tokens) - len(path) :]:
            cached.penalties.add(token)
        kept = [old_rows[node] for node in path if node in old_rows]
        new_root = next((old for old, new in survivors.items() if new == 0), -1)
        alive = len(kept) == len(path) and new_root in old_rows
        staying = sorted((new, old) for old, new in survivors.items() if old in old_rows) if alive else []
        kept_and_staying = kept + [old_rows[old] for _, old in staying]
        self._move_rows(cached, kept_and_staying)
        self._commit_rows(sequence, len(kept))
        cached.rows = {new: row for row, (new, _) in enumerate(staying)}
        nodes = sequence.tree.nodes
        cached.parents = [cached.rows[nodes[new].parent] for new, _ in staying]

    def _choose(self, sequences: SequenceABC[Sequence]) -> list[_Work]:
        """The rows of the next forward: the sequences that gain most, as long as there is room."""
        rows = self._rows_for_each(sequences)
        frontiers = [(sequence, self._frontier(sequence, rows)) for sequence in sequences]
        frontiers.sort(key=lambda item: -sum(gain for gain, _ in item[1]))
        work, room = [], self._max_rows
        for sequence, frontier in frontiers:
            nodes = [node for _, node in frontier]
            if nodes and len(nodes) <= room and self._take_rows(sequence, len(nodes)):
                room -= len(nodes)
                work.append(self._work(sequence, nodes))
        return work

    def _rows_for_each(self, sequences: SequenceABC[Sequence]) -> int:
        """Nodes of one sequence that a step expands: many sequences share its rows."""
        return max(1, min(self._rows_per_sequence, self._max_rows // max(1, len(sequences))))

    def _frontier(self, sequence: Sequence, max_nodes: int) -> list[tuple[float, int]]:
        """(expected gain, node) of the at most `max_nodes` nodes that the next step expands, parents first.

        The gain of a node is what the model is expected to add to what other methods proposed there already.
        The end of a looked-up chain may promise most: then the chain above it comes along, in one forward.
        """
        cached, nodes = self._cached[sequence.id], sequence.tree.nodes
        if cached.lag(sequence) > _MAX_LAG:
            return []
        # Deeper than this round can use: a path of one round, the token after it, a path of the next.
        depth_limit = min(2 * sequence.request.draft.max_depth + 1, sequence.num_remaining - 1)
        gains = {
            node: sum(self._gains(sequence, node))
            for node in range(len(nodes))
            if node not in cached.rows and nodes[node].depth < depth_limit
        }
        chosen: set[int] = set()
        for node in sorted(gains, key=lambda n: (-gains[n], n)):
            if gains[node] <= _MIN_GAIN or len(chosen) == max_nodes:
                break
            needed, above = [], node
            while above not in cached.rows and above not in chosen:
                needed.append(above)
                if above == 0:
                    break
                above = nodes[above].parent
            if len(chosen) + len(needed) <= max_nodes:
                chosen.update(needed)
        return [(gains[node], node) for node in sorted(chosen)]

    def _yields_of(self, sequence: Sequence) -> list[float]:
        """The noise chooses for sampled requests, so theirs are counted apart."""
        return self._greedy_yields if sequence.request.sampling.is_greedy else self._sampled_yields

    def _gains(self, sequence: Sequence, node: int) -> list[float]:
        """By rank, the expected accepted tokens of the model's proposals below a node, less what is there."""
        nodes, gains = sequence.tree.nodes, []
        proposed = sum(nodes[child].acceptance for child in nodes[node].children.values())
        for acceptance in self._yields_of(sequence):
            gains.append(nodes[node].value * max(0.0, acceptance - proposed))
            proposed = max(0.0, proposed - acceptance)
        return gains

    def _work(self, sequence: Sequence, nodes: list[int]) -> _Work:
        """Rows for `nodes`, parents first; before the root come the tokens that the cache lacks."""
        cached, tree = self._cached[sequence.id], sequence.tree.nodes
        tokens, parents, row_of = [], list(cached.parents), dict(cached.rows)
        if not cached.rows:
            tokens = sequence.tokens[cached.context_len :]
            parents = chain(len(tokens))
            row_of = {0: len(tokens) - 1}
        for node in nodes:
            if node:
                row_of[node] = len(parents)
                parents.append(row_of[tree[node].parent])
                tokens.append(tree[node].token)
        rows = SequenceRows(cached.pages, cached.context_len, parents, len(cached.parents), tokens)
        return _Work(sequence, tuple(nodes), row_of, rows)

    def _forward(self, work: list[_Work]) -> torch.Tensor:
        """[num_rows, hidden], valid until the next call."""
        batch = batch_of([item.rows for item in work], self._cache.page_size, self._model.device)
        with self._tracer.span("forward", len(batch.tokens)):
            return self._run(batch).last

    def _sampled(self, item: _Work) -> SampledRows:
        sampling, tree = item.sequence.request.sampling, item.sequence.tree
        return SampledRows(
            params=sampling,
            positions=np.array([tree.nodes[node].position + 1 for node in item.nodes], dtype=np.int64),
            penalties=self._cached[item.sequence.id].penalties,
            paths=[tree.path_tokens(node) for node in item.nodes] if sampling.uses_context else (),
        )

    def _remember_rows(self, item: _Work) -> None:
        """The computed rows are the tree's now; what came before the root is committed."""
        cached, root_row = self._cached[item.sequence.id], item.row_of[0]
        self._commit_rows(item.sequence, root_row)
        cached.rows = {node: row - root_row for node, row in item.row_of.items()}
        cached.parents = [max(0, parent - root_row) for parent in item.rows.parents[root_row:]]

    def _add_children(
        self, sequence: Sequence, node: int, tokens: list[int], log_probs: list[float]
    ) -> list[float]:
        """Put the proposals into the tree; returns the expected accepted tokens of each."""
        tree, values = sequence.tree, []
        is_greedy = sequence.request.sampling.is_greedy
        for rank, token in enumerate(tokens):
            if log_probs[rank] == -math.inf:  # top-k, top-p or min-p removed it: the target cannot pick it
                break
            if token >= self._num_target_tokens:
                values.append(0.0)
                continue
            source, prior = model_source(MODEL_METHOD, rank, log_probs, is_greedy)
            child = tree.add_child(node, token, self._estimator.estimate(source, prior), source)
            values.append(tree.nodes[child].value)
        return values

    def _take_rows(self, sequence: Sequence, num_nodes: int) -> bool:
        cached = self._cached[sequence.id]
        num_rows = (
            len(cached.rows) + cached.lag(sequence) + num_nodes
        )  # one too many where the root is among them
        return self._take_pages(cached, cached.context_len + num_rows)

    def _take_pages(self, cached: _CachedSequence, num_rows: int) -> bool:
        missing = self._pool.pages_for(num_rows) - len(cached.pages)
        if missing > self._pool.num_available:
            return False
        if missing > 0:
            cached.pages += self._pool.allocate(missing)
        return True

    def _commit_rows(self, sequence: Sequence, count: int) -> None:
        cached = self._cached[sequence.id]
        cached.context_len += count
        known = sequence.tokens[: cached.context_len]
        cached.num_pages_remembered = self._pool.remember_prefix(
            cached.pages, known, cached.num_pages_remembered
        )

    def _move_rows(self, cached: _CachedSequence, rows: list[int]) -> None:
        """Move tree rows `rows` to rows 0, 1, 2, …"""
        moves = [(old, new) for new, old in enumerate(rows) if old != new]
        if moves:
            sources = torch.tensor([self._slot(cached, old) for old, _ in moves])
            targets = torch.tensor([self._slot(cached, new) for _, new in moves])
            self._cache.commit(sources.to(self._model.device), targets.to(self._model.device))

    def _slot(self, cached: _CachedSequence, row: int) -> int:
        page, offset = divmod(cached.context_len + row, self._pool.page_size)
        return cached.pages[page] * self._pool.page_size + offset
