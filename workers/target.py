"""The target: one tensor-parallel rank of the large model, scoring whole trees."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from outrider.configs.schema import Config
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.link.distributed import Link, connect_store, join_group, open_store
from outrider.workers.link.link import DraftReceiver
from outrider.workers.link.messages import Draft, Scores, StepScores, decode_draft
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.model.batch import build_batch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import forward_of, target_capacities
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.setup import (
    agreed_kernels,
    kernels_for,
    load_model,
    message_capacity,
    num_target_pages,
    torch_device,
    torch_dtype,
)
from outrider.workers.target_state import TargetSequences
from outrider.workers.trace import Tracer


class TargetRank:
    """The computation of one rank. A step reads: commit, forward, sample. No branch on what the step is for."""

    def __init__(self, model: Transformer, cache: PagedCache, tracer: Tracer) -> None:
        self.model = model
        self._cache = cache
        self._forward = forward_of(model, cache, target_capacities(model, cache))
        self._tracer = tracer
        self._sequences = TargetSequences(cache.num_pages, cache.page_size)
        self._sampler = Sampler(model.config.vocab_size, model.plan.vocab, model.communicator, model.kernels)

    @torch.inference_mode()
    def step(self, draft: Draft) -> Scores:
        """One round: keep what was accepted, compute every node, sample after the nodes that ask for it."""
        times = [time.monotonic()]
        with self._tracer.span("commit"):
            self._cache.commit(*(slots.to(self.model.device) for slots in self._sequences.apply(draft)))
        times.append(time.monotonic())
        num_rows = sum(len(step.tokens) for step in draft.steps)
        sampled = _sampled_rows(draft)
        logits = torch.empty(0, len(self.model.plan.vocab))
        if num_rows:
            with self._tracer.span("forward", num_rows):
                rows = [self._sequences.rows(step) for step in draft.steps]
                hidden = self._forward(build_batch(rows, self._cache.page_size, self.model.device))
                if sampled:
                    logits = self.model.logits_of(hidden, sampled)
        times.append(time.monotonic())
        steps: tuple[StepScores, ...] = tuple(StepScores((), (), (), ()) for _ in draft.steps)
        if sampled:
            with self._tracer.span("sample", len(sampled)):
                steps = self._sample(draft, logits)
        times.append(time.monotonic())
        commit_s, forward_s, sample_s = (after - before for before, after in pairwise(times))
        return Scores(draft.round_id, steps, commit_s, forward_s, sample_s)

    def _sample(self, draft: Draft, logits: torch.Tensor) -> tuple[StepScores, ...]:
        contexts = [self._sequences.contexts(step) for step in draft.steps]
        samples = self._sampler.sample(logits, [context for rows in contexts for context in rows])
        tokens = samples.tokens.tolist()
        steps, at = [], 0
        for rows in contexts:
            part = slice(at, at + len(rows))
            at += len(rows)
            wants = rows[0].params if rows else None
            num_top = wants.top_logprobs if wants is not None and wants.logprobs else 0
            steps.append(
                StepScores(
                    tokens=tuple(tokens[part]),
                    logprobs=tuple(samples.logprobs[part].tolist()) if wants and wants.logprobs else (),
                    top_ids=tuple(map(tuple, samples.top_ids[part, :num_top].tolist())) if num_top else (),
                    top_logprobs=(
                        tuple(map(tuple, samples.top_logprobs[part, :num_top].tolist())) if num_top else ()
                    ),
                )
            )
        return tuple(steps)


class TargetWorker:
    """One process of the target: loads its slices, joins the group, serves rounds until told to stop.

    Rank 0 alone talks to the DraftWorker; the others get each round from rank 0.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank
        self._tracer = Tracer(f"target {rank}", config.rounds.trace)
        self._communicator: Communicator = SoloCommunicator()

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        """Read this rank's weights and lay out its KV cache. `progress(what, done_bytes, total_bytes)`.

        Raises:
            ValueError: the checkpoint is missing or does not fit the configuration.
        """
        target = self.config.target
        torch.set_num_threads(target.num_threads)
        device, dtype = torch_device(target.device), torch_dtype(target.dtype)
        source = load_model(self.config, "target", progress)
        plan = ShardPlan(source.config, self.rank, target.tp_size)
        total = source.total_bytes(dtype) // target.tp_size
        done = 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("load", min(done, total), total)

        kernels = kernels_for(self.config, source.config, device, dtype)
        self._model = Transformer(
            source.config,
            plan,
            source,
            SoloCommunicator(),
            dtype,
            device,
            target.packed_weights,
            count,
            kernels,
        )
        num_pages = num_target_pages(self.config, source.config)
        self._cache = PagedCache(
            source.config, plan, num_pages, target.page_size, dtype, device, kernels.kv_commit
        )

    def open_store(self, host: str) -> tuple[str, int]:
        """Rank 0: open the meeting point of all groups on a free port; returns its host and port."""
        self._store = open_store(host, self.config.cluster.group_timeout_s)
        return host, self._store.port

    def connect(self, host: str, port: int, epoch: int) -> None:
        """Join the target group and, on rank 0, the link to the DraftWorker. Every process must call it.

        Raises:
            PeerLostError: another process has not come within `cluster.group_timeout_s`.
        """
        timeout_s = self.config.cluster.group_timeout_s
        if self.rank != 0:
            self._store = connect_store(host, port, timeout_s)
        target = self.config.target
        self._communicator = join_group(
            self._store, epoch, self.rank, target.tp_size, self._transport(), timeout_s
        )
        self._model.communicator = self._communicator
        self._model.kernels = agreed_kernels(self._model.kernels, self._communicator)
        self._cache.use_kernel = self._model.kernels.kv_commit
        self._rank = TargetRank(self._model, self._cache, self._tracer)
        self._capacity = message_capacity(self.config)
        if self.rank == 0:
            capacity = self._capacity
            link = Link(self._store, epoch, True, capacity.scores_ints, capacity.draft_ints, timeout_s)
            self._link = DraftReceiver(link, capacity)

    def run(self) -> None:
        """Serve rounds until the DraftWorker says stop. Any failure wakes the other ranks and is raised."""
        try:
            buffer = torch.zeros(self._capacity.draft_ints, dtype=torch.int32)
            while True:
                with self._tracer.span("wait"):
                    if self.rank == 0:
                        buffer = self._link.receive_buffer()
                    self._communicator.broadcast(buffer)
                with self._tracer.span("communicate"):
                    draft = decode_draft(buffer)
                if draft.stop:
                    return
                scores = self._rank.step(draft)
                if self.rank == 0:
                    with self._tracer.span("communicate"):
                        self._link.send(scores)
        except BaseException:
            self._communicator.abort()
            raise
        finally:
            if self.rank == 0:
                self._link.close()
            self._communicator.close()

    def _transport(self) -> str:
        on_gpu = self._model.device.type == "cuda"
        return "nccl" if self.config.target.all_reduce == "auto" and on_gpu else self.config.target.all_reduce

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, and the peak memory of this process."""
        return {"busy_s": self._tracer.totals(), "peak_memory_bytes": peak_memory_bytes()}

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()


def _sampled_rows(draft: Draft) -> list[int]:
    rows: list[int] = []
    at = 0
    for step in draft.steps:
        rows += range(at + step.first_sampled, at + len(step.tokens))
        at += len(step.tokens)
    return rows
