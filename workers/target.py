"""The target: one tensor-parallel rank of the large model, scoring whole trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from outrider.configs.schema import Config
from outrider.kernels.gather_rows import gather_rows
from outrider.kernels.transfers import upload
from outrider.workers.drafting.registry import layers_needed
from outrider.workers.last_resort import ABORT_GRACE_S, Interruptible
from outrider.workers.link.communicator import (
    Communicator,
    SoloCommunicator,
    broadcast_message,
)
from outrider.workers.link.distributed import Link, connect_store, join_group, open_store
from outrider.workers.link.link import DraftReceiver
from outrider.workers.link.lost import LinkLostError, PeerLostError
from outrider.workers.link.messages import Draft, Scores, Steps, decode_draft, encode_draft
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.model.batch import TreeRows, lay_out
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import forward_of, target_capacities
from outrider.workers.model.fp8_cache import read_cache_scales
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.sizes import weight_bytes
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.sampling.grammars import NO_GRAMMARS, Grammars
from outrider.workers.sampling.sampler import NO_SAMPLES, Prepared, Sampler, Samples
from outrider.workers.sequences.segments import Int64Array
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.setup import (
    agreed_kernels,
    cache_dtype,
    counting,
    kernels_for,
    kernels_with_cache,
    load_model,
    require_memory,
    target_cache,
    target_cache_bytes,
    target_grammars,
    torch_device,
    torch_dtype,
    transport_for,
    use_device,
)
from outrider.workers.target_state import TargetSequences
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer

PAUSE = Draft(0, (), (), Steps.of([]), pause=True)


class TargetRank:
    """The computation of one rank. A step reads: commit, forward, sample. No branch on what the step is for."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        num_slots: int,
        max_context: int,
        tracer: Tracer,
        taps: Sequence[int] = (),
        grammars: Grammars = NO_GRAMMARS,
    ) -> None:
        """
        Args:
            num_slots: sequences that run at the same time.
            max_context: tokens of each, at most.
            taps: layers whose inputs rounds may ask for (`Draft.layers`), besides what leaves the last one.
            grammars: over the model's tokens.
        """
        self.model = model
        self._cache = cache
        capacities = target_capacities(model, cache, max_context)
        self._forward = forward_of(model, cache, capacities, taps, with_logits=True)
        self._stretches = Stretches(model.device, tracer)
        self._num_slots, self._grammars = num_slots, grammars
        self.forget_sequences()
        self._sampler = Sampler(
            model.config.vocab_size,
            VocabularyRange(model.plan.vocab.start, model.plan.vocab.stop),
            model.communicator,
            model.kernels,
        )

    def forget_sequences(self) -> None:
        """Whoever sends drafts from now on knows none of those that ran."""
        self._sequences = TargetSequences(
            self._num_slots, self._cache.num_pages, self._cache.page_size, self._grammars
        )

    @torch.inference_mode()
    def step(self, draft: Draft) -> Scores:
        """One round: keep what was accepted, compute every node, sample after the nodes that ask for it."""
        stretches, steps, sampled = self._stretches, draft.steps, draft.steps.sampled_rows
        stretches.begin()
        on_host = [*self._sequences.apply(draft), *map(torch.from_numpy, (sampled, steps.hidden_rows))]
        prepared, computed = None, self._sequences.rows(steps)
        # What takes long to prepare, texts that are looked through, waits until the device is busy.
        if len(sampled) and not self._sequences.follow_texts(steps):
            prepared = self.prepare(steps, computed)
            on_host += prepared.on_host
        if steps.num_rows:
            there = self._forward.take(lay_out(self._sequences.tables, computed), on_host)
        else:
            there = upload(on_host, self.model.device)
        sources, targets, sampled_index, hidden_index, *asked = there
        self._cache.commit(sources, targets)
        stretches.end("commit")
        sent, samples = None, NO_SAMPLES
        if steps.num_rows:
            hidden = self._forward.run()
            sent = self._hidden_rows(draft, hidden, hidden_index)
            if len(sampled):
                logits = self._logits(hidden, sampled, sampled_index)
        stretches.end("forward", steps.num_rows)
        if len(sampled):
            samples = self.sample(prepared or self.prepare(steps, computed), logits, asked)
        stretches.end("sample", len(sampled))
        commit_s, forward_s, sample_s = stretches.settle()
        asking = self._sequences.asking(steps)
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
            hidden=sent,
        )

    def prepare(self, steps: Steps, rows: TreeRows) -> Prepared:
        """What the laws of the sampled nodes depend on besides the logits."""
        return self._sampler.prepare(self._sequences.sampled(steps, rows), self._sequences.questions(steps))

    def sample(self, prepared: Prepared, logits: torch.Tensor, asked: Sequence[torch.Tensor]) -> Samples:
        """The target's token after every sampled node, from logits [M, vocab_shard], and what else is asked."""
        return self._sampler.sample_prepared(logits, prepared, asked)

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


class TargetWorker:
    """One process of the target: loads its slices, joins the group, serves rounds until told to stop.

    Rank 0 alone talks to the DraftWorker; the others get each round from rank 0.
    """

    def __init__(self, config: Config, rank: int, gpus: Sequence[int] = ()) -> None:
        """`gpus`: CUDA ordinals of the GPUs that this process was given."""
        self.config = config
        self.rank = rank
        self._gpus = tuple(gpus)
        self._tracer = Tracer(f"target {rank}", config.rounds.trace)
        self._communicator: Communicator = SoloCommunicator()
        self._interruptible = Interruptible()
        self._wake: list[Callable[[], None]] = []
        self._rank: TargetRank | None = None  # once connected
        self._lost_link = ""  # why rank 0 no longer hears of its DraftWorker

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        """Read this rank's weights. `progress(what, done_bytes, total_bytes)`.

        Raises:
            ValueError: the checkpoint is missing or does not fit the configuration.
        """
        target = self.config.target
        torch.set_num_threads(target.num_threads)
        device, dtype = torch_device("target", target.device, self._gpus), torch_dtype(target.dtype)
        use_device(device)
        self._transport = transport_for(target.all_reduce, device, target.tp_size)
        source = load_model(self.config, "target", progress)
        self._grammars = target_grammars(self.config, source.config, progress)
        plan = ShardPlan(source.config, self.rank, target.tp_size)
        share = weight_bytes(plan, dtype, device.type == "cuda").total
        require_memory(device, share + target_cache_bytes(self.config, plan), self.rank)
        counted = counting(progress, share)
        kernels = kernels_for(self.config, source.config, device, dtype)
        self._kernels = kernels_with_cache(kernels, cache_dtype(self.config, source.config))
        self._cache_scales = read_cache_scales(source)
        self._weights = load_weights(plan, source, dtype, device, target.packed_weights, counted)

    def open_store(self, host: str) -> tuple[str, int]:
        """Rank 0: open the meeting point of all groups on a free port; returns its host and port."""
        self._store = open_store(host, self.config.cluster.group_timeout_s)
        return host, self._store.port

    def connect(self, host: str, port: int, epoch: int) -> None:
        """Join the target group, build the model and its KV cache, and on rank 0 open the link to the DraftWorker.

        Every process must call it. A rank whose group broke may call it again, for a new store and another epoch:
        it keeps its weights.

        Raises:
            PeerLostError: another process has not come within `cluster.group_timeout_s`.
        """
        with self._interruptible.working():
            self._connect(host, port, epoch)

    def relink(self, epoch: int) -> None:
        """Where `run` has paused: forget the sequences, and on rank 0 open the link to another DraftWorker.

        Every rank must call it; the DraftWorker calls `connect` with the old store and this epoch.
        """
        assert self._rank is not None
        self._rank.forget_sequences()
        if self.rank == 0:
            with self._interruptible.working():
                self._open_link(epoch)

    def _connect(self, host: str, port: int, epoch: int) -> None:
        self._rank = None  # the cache of an earlier group, before there is another
        use_device(self._weights.device)
        timeout_s = self.config.cluster.group_timeout_s
        if self.rank != 0:
            self._store = connect_store(host, port, timeout_s)
        target = self.config.target
        self._communicator = join_group(
            self._store, epoch, self.rank, target.tp_size, self._transport, timeout_s, self._weights.device
        )
        self._wake = [self._communicator.abort]
        kernels = agreed_kernels(self._kernels, self._communicator)
        weights = self._weights
        cache = target_cache(self.config, weights, self._cache_scales, kernels)
        self._rank = TargetRank(
            Transformer(weights, self._communicator, kernels),
            cache,
            self.config.rounds.max_sequences,
            self.config.target.max_context,
            self._tracer,
            layers_needed(self.config, weights.plan.config),
            self._grammars,
        )
        if self.rank == 0:
            self._open_link(epoch)

    def _open_link(self, epoch: int) -> None:
        device, timeout_s = self._weights.device, self.config.cluster.group_timeout_s
        use_device(device)
        link = Link(self._store, epoch, True, device, timeout_s)
        self._link = DraftReceiver(link)
        self._wake = [self._communicator.abort, link.abort]

    def run(self) -> None:
        """Serve rounds until the DraftWorker says stop. Any failure wakes the other ranks and is raised.

        The loss of the DraftWorker is no failure of theirs: all ranks pause, rank 0 raises LinkLostError, the others
        return, and `relink` lets them go on.
        """
        with self._interruptible.working():
            self._run()

    def abort(self, grace_s: float = ABORT_GRACE_S) -> None:
        """Another process of the deployment is lost: end `connect` or `run`, which may wait for it, with an error.

        Called by who knows, from another thread than theirs. Where they have not ended after `grace_s` seconds this
        process ends itself.
        """
        self._interruptible.end(self._wake, grace_s)

    def _run(self) -> None:
        assert self._rank is not None
        use_device(self._weights.device)
        self._lost_link = ""
        try:
            draft = self._next_draft()
            while not (draft.stop or draft.pause):
                scores = self._rank.step(draft)
                if self.rank == 0:
                    with self._tracer.span("communicate"):
                        self._answer(scores)
                draft = self._next_draft()
        except BaseException:
            self._communicator.abort()
            self._communicator.close()
            raise
        finally:
            if self.rank == 0:
                self._link.close()
        if draft.stop:
            self._communicator.close()
        elif self.rank == 0:
            raise LinkLostError(self._lost_link)

    def _next_draft(self) -> Draft:
        with self._tracer.span("wait"):
            message = torch.empty(0, dtype=torch.int32)
            if self.rank == 0:
                try:
                    message = self._link.receive_message()
                except PeerLostError as error:
                    self._lost_link = str(error)
                    message = encode_draft(PAUSE)
            message = broadcast_message(self._communicator, message)
        with self._tracer.span("communicate"):
            return decode_draft(message)

    def _answer(self, scores: Scores) -> None:
        with suppress(PeerLostError):  # which the next draft's absence says, too
            self._link.send(scores)

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, and the peak memory of this process."""
        return {"busy_s": self._tracer.totals(), "peak_memory_bytes": peak_memory_bytes()}

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()
