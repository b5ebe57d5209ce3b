"""The DraftWorker: owns the drafter, drives the token loop, decides what is accepted."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.model import ModelDrafter
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.distributed import Link, connect_store
from outrider.workers.link.link import DraftSender
from outrider.workers.link.messages import Draft, SequenceStart, SequenceStep, Steps
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.setup import (
    kernels_for,
    load_model,
    num_draft_pages,
    num_target_pages,
    read_model_config,
    torch_device,
    torch_dtype,
)
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig

_ROWS_PER_STEP = 6  # nodes of one sequence that a drafter step expands
_PROFILE_REPEATS = 3
_HEARTBEAT_S = 2.0  # at most: so long after it a lost target is noticed by an idle DraftWorker


class DraftWorker:
    """One process: `load`, `connect`, `profile`, then `run` until `stop`; requests come from other threads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._tracer = Tracer("draft", config.rounds.trace)
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        """Read the draft model, where there is one. `progress(what, done_bytes, total_bytes)`.

        Raises:
            ValueError: a checkpoint is missing or does not fit the configuration.
        """
        torch.set_num_threads(self.config.draft.num_threads)
        target = read_model_config(self.config, "target", progress)
        num_pages = num_target_pages(self.config, target)
        self._drafting = DraftEngine(self.config.draft.ngram)
        self._model_drafter = None
        if "model" in self.config.draft.methods:
            self._model_drafter = self._load_model(target, progress)
            self._drafting.add(self._model_drafter)
        rounds = self.config.rounds
        limits = SchedulerLimits(rounds.max_sequences, rounds.max_round_tokens, rounds.prefill_chunk)
        pool = PagePool(num_pages, self.config.target.page_size, rounds.prefix_sharing)
        self._scheduler = Scheduler(limits, pool)

    def connect(self, host: str, port: int, epoch: int) -> None:
        """Open the link to rank 0 of the target, which must call its own `connect` meanwhile."""
        timeout_s = self.config.cluster.group_timeout_s
        store = connect_store(host, port, timeout_s)
        device = torch_device(self.config.draft.device)
        self._link = DraftSender(Link(store, epoch, False, device, timeout_s))

    def profile(self, progress: Callable[[str, int, int], None]) -> PassProfile:
        """Time the draft model, and the target for the row counts of `rounds.profile_node_counts`, before `run`.

        Each count is timed with a chain of rows and no context, all of them sampled or proposing: the median of a
        few runs.
        """
        counts = self.config.rounds.profile_node_counts
        target_times, drafter_times = [], []
        for done, count in enumerate(counts):
            progress("profile", done, len(counts))
            target_times.append(_median_of(partial(self._time_target, count)))
            if self._model_drafter is not None:
                drafter_times.append(_median_of(partial(self._model_drafter.time_step, count)))
        progress("profile", len(counts), len(counts))
        target = PassProfile(tuple(counts), tuple(target_times))
        drafter = PassProfile(tuple(counts), tuple(drafter_times)) if drafter_times else None
        self._loop = RoundLoop(
            self._link,
            self._scheduler,
            self._drafting,
            CostModel(target, drafter),
            self._loop_options(),
            self._tracer,
            self._events.put,
        )
        return target

    def run(self) -> None:
        """The token loop, until `stop` or until the target is gone (PeerLostError)."""
        try:
            self._loop.run()
        finally:
            self._link.close()

    def stop(self) -> None:
        """End `run` after the rounds under way."""
        self._loop.stop()

    def submit(self, request: Request) -> None:
        """Queue a request that was checked at the door; its tokens come out of `next_events`."""
        self._loop.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request early; ids that are not running are ignored."""
        self._loop.cancel(request_id)

    def next_events(self, timeout_s: float) -> list[TokenEvent]:
        """Events since the last call; waits up to `timeout_s` for the first."""
        events = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, measured costs, and the peak memory of this process."""
        cost = self._loop.cost
        return {
            "busy_s": self._tracer.totals(),
            "peak_memory_bytes": peak_memory_bytes(),
            "target_pass_s": dict(zip(cost.target.num_rows, cost.target.seconds, strict=True)),
            "draft_pass_s": dict(zip(cost.drafter.num_rows, cost.drafter.seconds, strict=True))
            if cost.drafter
            else {},
            "num_available_pages": self._scheduler.pool.num_available,
        }

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()

    def _load_model(self, target: ModelConfig, progress: Callable[[str, int, int], None]) -> ModelDrafter:
        draft, rounds = self.config.draft, self.config.rounds
        device, dtype = torch_device(draft.device), torch_dtype(draft.dtype)
        source = load_model(self.config, "draft", progress)
        plan = ShardPlan(source.config, 0, 1)
        total, done = source.total_bytes(dtype), 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress("load", min(done, total), total)

        kernels = kernels_for(self.config, source.config, device, dtype)
        weights = load_weights(plan, source, dtype, device, draft.packed_weights, count)
        model = Transformer(weights, SoloCommunicator(), kernels)
        page_size = self.config.target.page_size
        num_pages = num_draft_pages(self.config, source.config)
        cache = PagedCache(source.config, plan, num_pages, page_size, dtype, device, kernels.kv_commit)
        vocab_size = source.config.vocab_size
        return ModelDrafter(
            model=model,
            cache=cache,
            pool=PagePool(cache.num_pages, page_size, rounds.prefix_sharing),
            sampler=Sampler(vocab_size, range(vocab_size), SoloCommunicator(), kernels),
            estimator=self._drafting.estimator,
            num_target_tokens=target.vocab_size,
            max_children=self.config.tree.max_children,
            rows_per_sequence=_ROWS_PER_STEP,
            max_rows=max(_ROWS_PER_STEP, rounds.max_sequences),
            prefill_chunk=rounds.prefill_chunk,
            tracer=self._tracer,
        )

    def _loop_options(self) -> LoopOptions:
        rounds = self.config.rounds
        return LoopOptions(
            overlapped=rounds.loop == "overlapped",
            num_lanes=rounds.lanes,
            merge_lanes=rounds.merge_lanes,
            draft_ahead=rounds.draft_ahead,
            fixed_budget=self.config.tree.budget == "fixed",
            draft_costs=self.config.draft.placement == "shared",
            max_round_tokens=rounds.max_round_tokens,
            heartbeat_s=min(_HEARTBEAT_S, self.config.cluster.group_timeout_s / 4),
        )

    def _time_target(self, num_rows: int) -> float:
        """Seconds from sending a chain of `num_rows` rows to having the scores of all of them."""
        pool, sampling = self._scheduler.pool, SamplingParams(temperature=0.0)
        pages = pool.allocate(min(pool.pages_for(num_rows), pool.num_available))
        num_rows = min(num_rows, len(pages) * pool.page_size)
        step = SequenceStep(0, (), pages, [0] * num_rows, [0, *range(num_rows - 1)], 0)
        begun = time.monotonic()
        self._link.send(Draft(0, (SequenceStart(0, 1, 0, sampling),), (), Steps.of([step])))
        self._link.receive()
        seconds = time.monotonic() - begun
        self._link.send(Draft(0, (), (0,), Steps.of([])))
        self._link.receive()
        pool.release(pages)
        return seconds


def _median_of(measure: Callable[[], float]) -> float:
    return median(measure() for _ in range(_PROFILE_REPEATS))
