"""One rank of the target: rounds, and the order in which they are planned, computed and answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.transfers import upload
from outrider.workers.link.messages import Draft, Scores, Steps
from outrider.workers.model.batch import TreeRows, lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import Staged, forward_of, target_capacities
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.model.whole_rounds import Around, WholeRounds, Written
from outrider.workers.sampling.grammars import NO_GRAMMARS, Grammars
from outrider.workers.sampling.sampler import NO_SAMPLES, Prepared, Sampler, Samples
from outrider.workers.sequences.segments import Int64Array
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.target_state import TargetSequences
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer


class PlannedRound(NamedTuple):
    """What the host works out of a draft before the device has any of it."""

    draft: Draft
    rows: TreeRows
    asking: npt.NDArray[np.bool_]  # [M], of the sampled nodes those that want log-probabilities
    prepared: Prepared | None  # None: nothing is sampled, or its law depends on the text before
    on_host: list[torch.Tensor]  # what travels with the rows, and `Around.on_host`: see `TargetRank._launch`
    staged: Staged | None  # None: there are no rows


class RunningRound(NamedTuple):
    """A round that was handed to the device. Its logits stand where those of the next one will."""

    planned: PlannedRound
    prepared: Prepared | None
    logits: torch.Tensor | None  # [M, vocab_shard]; None: nothing is sampled
    asked: Sequence[torch.Tensor]  # `Prepared.on_host`, on the device, if it was not in a graph
    sampled: Written | None  # what was sampled within a graph
    hidden: torch.Tensor | None


class TargetRank:
    """The computation of one rank. A step reads: plan, commit, forward, sample. No branch on what the step is for."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        num_slots: int,
        max_context: int,
        tracer: Tracer,
        taps: Sequence[int] = (),
        grammars: Grammars = NO_GRAMMARS,
        sampler: Sampler | None = None,
    ) -> None:
        """
        Args:
            num_slots: sequences that run at the same time.
            max_context: tokens of each, at most.
            taps: layers whose inputs rounds may ask for (`Draft.layers`), besides what leaves the last one.
            grammars: over the model's tokens.
            sampler: of what this rank's logits are; by default, of its share of the vocabulary.
        """
        self.model = model
        self._cache = cache
        self._stretches = Stretches(model.device, tracer)
        self._num_slots, self._grammars = num_slots, grammars
        self.forget_sequences()
        self._sampler = sampler or Sampler(
            model.config.vocab_size,
            VocabularyRange(model.plan.vocab.start, model.plan.vocab.stop),
            model.communicator,
            model.kernels,
        )
        whole = None
        if model.kernels.kv_commit and model.kernels.sample_shard:
            whole = WholeRounds(cache, self._sampler.ids, self._sampler.list_size)
        capacities = target_capacities(model, cache, max_context)
        self._forward = forward_of(model, cache, capacities, taps, with_logits=True, whole=whole)

    def forget_sequences(self) -> None:
        """Whoever sends drafts from now on knows none of those that ran."""
        self._sequences = TargetSequences(
            self._num_slots, self._cache.num_pages, self._cache.page_size, self._grammars
        )

    def step(self, draft: Draft) -> Scores:
        """One round: keep what was accepted, compute every node, sample after the nodes that ask for it."""
        return self.finish(self.begin(draft))

    def begin(self, draft: Draft) -> RunningRound:
        """`launch` of a round that was not planned while another ran."""
        self._stretches.begin()
        return self._launch(self.plan(draft))

    @torch.inference_mode()
    def plan(self, draft: Draft) -> PlannedRound:
        """A round of sequences that no round which is not finished computes. Asks nothing of the device."""
        steps, sequences = draft.steps, self._sequences
        sampled = steps.sampled_rows
        moves = sequences.apply(draft)
        rows = sequences.rows(steps)
        prepared, staged = None, None
        # What takes long to prepare, texts that are looked through, waits until the device is busy.
        if len(sampled) and not sequences.follow_texts(steps):
            prepared = self.prepare(steps, rows)
        around = Around(*moves, sampled, prepared.foreseen if prepared else None)
        on_host = [torch.from_numpy(sampled), torch.from_numpy(steps.hidden_rows)]
        if steps.num_rows:
            staged = self._forward.stage(lay_out(sequences.tables, rows), on_host, around)
        else:
            on_host += around.on_host()
        return PlannedRound(draft, rows, sequences.asking(steps), prepared, on_host, staged)

    def launch(self, planned: PlannedRound) -> RunningRound:
        """Hands it to the device. The round before must be finished: its logits are overwritten."""
        self._stretches.begin()
        return self._launch(planned)

    @torch.inference_mode()
    def _launch(self, planned: PlannedRound) -> RunningRound:
        stretches, draft, staged = self._stretches, planned.draft, planned.staged
        steps, sampled = draft.steps, draft.steps.sampled_rows
        there = self._forward.send(staged) if staged else upload(planned.on_host, self.model.device)
        sampled_index, hidden_index, *asked = there
        is_whole = staged is not None and staged.is_whole
        if not is_whole:
            sources, targets, *asked = asked
            self._cache.commit(sources, targets)
        stretches.end("commit")
        sent, logits, written = None, None, None
        if staged:
            hidden = self._forward.run()
            sent = self._hidden_rows(draft, hidden, hidden_index)
            if len(sampled):
                logits = self._logits(hidden, sampled, sampled_index)
                written = hidden.sampled if is_whole and planned.prepared else None
        stretches.end("forward", steps.num_rows)
        prepared = planned.prepared
        if len(sampled) and prepared is None:
            prepared = self.prepare(steps, planned.rows)
        return RunningRound(planned, prepared, logits, asked, written, sent)

    @torch.inference_mode()
    def finish(self, running: RunningRound) -> Scores:
        """Waits for the device."""
        stretches, draft, samples = self._stretches, running.planned.draft, NO_SAMPLES
        if running.logits is not None:
            samples = self.sample(running, running.logits)
        stretches.end("sample", len(draft.steps.sampled_rows))
        commit_s, forward_s, sample_s = stretches.settle()
        asking = running.planned.asking
        return Scores(
            round_id=draft.round_id,
            tokens=samples.tokens.numpy(),
            failed=~samples.valid.numpy(),
            logprobs=samples.logprobs.numpy()[asking],
            top_ids=samples.top_ids.numpy()[asking],
            top_logprobs=samples.top_logprobs.numpy()[asking],
            child_logprobs=samples.token_logprobs.numpy(),
            child_laws=samples.token_laws.numpy(),
            is_pushed_down=samples.is_pushed_down.numpy(),
            entropies=samples.entropies.numpy(),
            commit_s=commit_s,
            forward_s=forward_s,
            sample_s=sample_s,
            hidden=running.hidden,
        )

    def prepare(self, steps: Steps, rows: TreeRows) -> Prepared:
        """What the laws of the sampled nodes depend on besides the logits."""
        return self._sampler.prepare(self._sequences.sampled(steps, rows), self._sequences.questions(steps))

    def sample(self, running: RunningRound, logits: torch.Tensor) -> Samples:
        """The target's token after every sampled node, from logits [M, vocab_shard], and what else is asked."""
        prepared, sampled = running.prepared, running.sampled
        assert prepared is not None
        seen = sampled.answers(prepared.foreseen) if sampled else None
        return self._sampler.sample_prepared(logits, prepared, running.asked, seen)

    def _logits(self, hidden: Hidden, sampled: Int64Array, index: torch.Tensor) -> torch.Tensor:
        """[M, vocab_shard] of the sampled rows, which are mostly all."""
        if hidden.logits is None:
            return self.model.logits_of(hidden.last, index)
        if len(sampled) == len(hidden.logits):
            return hidden.logits
        return gather_rows(hidden.logits, index, self.model.kernels.gather_rows)

    def _hidden_rows(self, draft: Draft, hidden: Hidden, index: torch.Tensor) -> torch.Tensor | None:
        """[num_layers, num_rows, hidden_size] of the layers and rows (int64) that this round asks for, copied."""
        if not draft.layers or not len(index):
            return None
        by_layer = {**hidden.taps, self.model.config.num_layers: hidden.last}
        return torch.stack([by_layer[layer].index_select(0, index) for layer in draft.layers])


def serve_rounds(
    rank: TargetRank,
    receive: Callable[[], Draft],
    receive_early: Callable[[], Draft | None] | None,
    answer: Callable[[Scores], None],
) -> Draft:
    """Computes the rounds that come, in their order, until one says stop or pause; returns that one.

    Args:
        receive: waits for the next draft.
        receive_early: called while the device computes: the next draft, if it is here. Its round, of another lane, is
            planned meanwhile, so that the device waits for no more than the answer to the one before. None where a
            round's computation takes the host's time (a CPU): there is nothing to gain.
        answer: takes each round's scores, before the next round is launched: hidden rows among them travel behind
            what the device was handed before.
    """
    draft = receive()
    running = None if draft.ends else rank.begin(draft)
    while running is not None:
        following = receive_early() if receive_early else None
        planned = rank.plan(following) if following and not following.ends else None
        answer(rank.finish(running))
        if planned is not None:
            running = rank.launch(planned)
            continue
        draft = following or receive()
        running = None if draft.ends else rank.begin(draft)
    return draft
