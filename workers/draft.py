"""The DraftWorker: owns the drafter, drives the token loop, decides what is accepted."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from outrider.configs.schema import Config
from outrider.workers.capacity import num_target_pages
from outrider.workers.draft_rank import NoOtherRanks, OtherRanks
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import MethodContext
from outrider.workers.drafting.registry import METHODS
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.judging.head import check_methods, check_models, judge_field, read_judge
from outrider.workers.judging.identity import identify
from outrider.workers.judging.rule import Judge, judge_rules
from outrider.workers.last_resort import ABORT_GRACE_S, Interruptible
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.link.distributed import Link, connect_store, join_group, open_store
from outrider.workers.link.link import DraftSender
from outrider.workers.link.lost import PeerLostError, RankLostError
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.rounds.budget import CostModel, PassProfile, Profiles
from outrider.workers.rounds.calibration import draft_alone, warning_of
from outrider.workers.rounds.growth import GrowthOptions
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import RULES
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.setup import (
    load_model,
    load_target_tensors,
    read_model_config,
    target_grammars,
    target_row_step,
    torch_device,
    transport_for,
    use_device,
    with_draft_dtype,
)
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.progress import Progress
from outrider.workers.weights.resolver import resolve_judge, resolve_tokenizer
from outrider.workers.weights.tensors import EMBEDDING

_PROFILE_REPEATS = 3
_HEARTBEAT_S = 2.0  # at most: so long after it a lost target is noticed by an idle DraftWorker


class DraftWorker:
    """One process: `load`, `connect`, `profile`, then `run` until `stop`; requests come from other threads."""

    def __init__(self, config: Config, gpus: Sequence[int] = (), others: OtherRanks | None = None) -> None:
        """
        Args:
            gpus: CUDA ordinals of the GPUs that this process was given.
            others: the `draft.tp_size - 1` further ranks of the draft model.
        """
        self.config = config
        self._gpus = tuple(gpus)
        self._tracer = Tracer("draft", config.rounds.trace)
        self._epoch = -1  # not connected
        self._others = others or NoOtherRanks()
        self._ranks: Communicator = SoloCommunicator()
        self._interruptible = Interruptible()
        self._wake: list[Callable[[], None]] = []  # what ends a wait for another process
        self._lost_rank = ""  # why the drafter's ranks cannot go on

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        """Read the draft model, where there is one, and meet its other ranks.

        `progress(what, done_bytes, total_bytes)`.

        Raises:
            ValueError: a checkpoint is missing or does not fit the configuration.
            RankLostError: another rank is gone.
        """
        torch.set_num_threads(self.config.draft.num_threads)
        self._device = torch_device("draft", self.config.draft.device, self._gpus)
        use_device(self._device)
        self.config = with_draft_dtype(self.config, self._device.type)
        self._target = target = read_model_config(self.config, "target", progress)
        self._num_pages = num_target_pages(self.config, target)
        self._drafting = self._build_drafting(target, progress)
        self._rules = {**RULES, **judge_rules(self._load_judges(progress))}

    def connect(self, host: str, port: int, epoch: int) -> None:
        """Open the link to rank 0 of the target, which must call its own `connect` or `relink` meanwhile.

        Where this is not the first one, everything about the sequences that ran is forgotten.
        """
        use_device(self._device)
        if self._epoch >= 0:
            self._forget_sequences()
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._epoch = epoch
        timeout_s = self.config.cluster.group_timeout_s
        store = connect_store(host, port, timeout_s)
        link = Link(store, epoch, False, self._device, timeout_s)
        self._link, self._abort_link = DraftSender(link), link.abort
        self._wake = [self._ranks.abort, link.abort]
        rounds, window = self.config.rounds, self._target.widest_window
        limits = SchedulerLimits(rounds.max_sequences, rounds.max_round_tokens, rounds.prefill_chunk, window)
        pool = PagePool(self._num_pages, self.config.target.page_size, rounds.prefix_sharing)
        self._scheduler = Scheduler(limits, pool, self._drafting.prefix_kept, self._drafting.finish)

    def profile(self, progress: Callable[[str, int, int], None]) -> Profiles:
        """Time the draft model, and the target for the row counts of `rounds.profile_node_counts`, before `run`.

        Each count is timed with a chain of rows and no context, all of them sampled or proposing: the median of a
        few runs.
        """
        with self._working():
            measured = self._measured(progress)
        self.take_over(measured)
        return measured

    def _measured(self, progress: Progress) -> Profiles:
        counts = self.config.rounds.profile_node_counts
        target_times: list[float] = []
        step_times: dict[str, list[float]] = {}
        for done, count in enumerate(counts):
            progress("profile", done, len(counts))
            target_times.append(_median_of(partial(self._time_target, count)))
            for method in self._drafting.methods:
                times = [method.time_step(count) for _ in range(_PROFILE_REPEATS)]
                known = [seconds for seconds in times if seconds is not None]
                if known:
                    step_times.setdefault(method.name, []).append(median(known))
        progress("profile", len(counts), len(counts))
        steps = {name: PassProfile(tuple(counts), tuple(times)) for name, times in step_times.items()}
        target = PassProfile(tuple(counts), tuple(target_times), target_row_step(self.config))
        return Profiles(target, steps)

    def take_over(self, measured: Profiles) -> None:
        """In place of `profile`, where an earlier DraftWorker has measured."""
        self._loop = RoundLoop(
            self._link,
            self._scheduler,
            self._drafting,
            CostModel(measured.target, measured.methods),
            self._loop_options(),
            self._tracer,
            self._events.put,
            self._rules,
        )

    def calibrate(self, request: Request, progress: Callable[[str, int, int], None]) -> list[str]:
        """Let draft heads draft a short text each, before `run`; returns what users should be told about them."""
        trained = [method.name for method in self._drafting.methods if method.is_trained]
        draft = self.config.draft
        checkpoints = {
            "medusa": draft.medusa.model,
            "eagle3": draft.eagle3.model,
            "mtp": draft.mtp.model,
            "parallel": draft.parallel.model,
        }
        found = []
        for index, name in enumerate(trained if self.config.tree.max_nodes else []):
            tokens = request.sampling.max_tokens
            heard = partial(self._report_calibration, progress, index * tokens, len(trained) * tokens)
            cost = CostModel(self._loop.cost.target)
            with self._working():
                stats = draft_alone(request, name, self._link, self._scheduler, self._drafting, cost, heard)
            heard(tokens)
            found.append(warning_of(name, checkpoints[name], stats))
        return [warning for warning in found if warning]

    def run(self) -> None:
        """The token loop, until `stop`, until the target is gone (PeerLostError) or another rank of the drafter
        (RankLostError)."""
        try:
            with self._working():
                self._loop.run()
        finally:
            self._link.close()
        self._drafting.close()

    def stop(self) -> None:
        """End `run` after the rounds under way."""
        self._loop.stop()

    def abort(self) -> None:
        """Another process of the deployment is lost: end `run`, which may wait for it, with PeerLostError."""
        self._abort_link()

    def lose_rank(self, reason: str, grace_s: float = ABORT_GRACE_S) -> None:
        """Another rank of the drafter is lost: end what waits for it with RankLostError.

        Called by who knows, from another thread. Where the others have not ended after `grace_s` seconds this process
        ends itself: a sum over ranks may hang in a GPU.
        """
        self._lost_rank = reason
        self._interruptible.end(self._wake, grace_s)

    def submit(self, epoch: int, requests: Sequence[Request]) -> None:
        """Queue requests that were checked at the door; their tokens come out of `next_events`.

        epoch: of the last `connect`; what was meant for an earlier one is dropped.
        """
        if epoch == self._epoch:
            for request in requests:
                self._loop.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request early; ids that are not running are ignored."""
        self._loop.cancel(request_id)

    def next_events(self, epoch: int, timeout_s: float) -> list[TokenEvent]:
        """Events since the last call; waits up to `timeout_s` for the first. None of another epoch than this."""
        if epoch != self._epoch:
            return []
        waiting, events = self._events, []
        try:
            events.append(waiting.get(timeout=timeout_s))
            while True:
                events.append(waiting.get_nowait())
        except queue.Empty:
            return events

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, measured costs, the peak memory of this process; by rule, of the
        requests that ended, what was kept against the target's own choice."""
        cost = self._loop.cost
        return {
            "busy_s": self._tracer.totals(),
            "peak_memory_bytes": peak_memory_bytes(),
            "target_pass_s": dict(zip(cost.target.num_rows, cost.target.seconds, strict=True)),
            "draft_step_s": {
                name: dict(zip(profile.num_rows, profile.seconds, strict=True))
                for name, profile in cost.methods.items()
            },
            "finished": {
                rule: {
                    "num_requests": counts.num_requests,
                    "num_tokens": counts.num_tokens,
                    "kept": counts.kept.summary(),
                }
                for rule, counts in self._loop.finished.items()
            },
            "num_available_pages": self._scheduler.pool.num_available,
            "num_pages": self._scheduler.pool.num_pages,
            "num_running": len(self._scheduler.running),
        }

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """What another rank's loss ends."""
        use_device(self._device)
        with self._interruptible.working():
            if self._lost_rank:
                raise RankLostError(self._lost_rank)
            try:
                yield
            except (PeerLostError, RankLostError) as error:
                if self._lost_rank:
                    raise RankLostError(self._lost_rank) from error
                raise

    def _join_ranks(self, device: torch.device) -> Communicator:
        """Once these have read their parts of the draft model, as this one has."""
        config, size = self.config, self.config.draft.tp_size
        if size > 1:
            transport = transport_for(config.draft.all_reduce, device, size, "draft")
            timeout_s = config.cluster.group_timeout_s
            self._others.wait_until_loaded()
            self._store = open_store(self._others.host, timeout_s)
            self._others.follow(self._others.host, self._store.port)
            try:
                self._ranks = join_group(self._store, 0, 0, size, transport, timeout_s, device, "draft")
            except PeerLostError as error:
                raise RankLostError(f"the drafter's ranks did not meet: {error}") from error
        return self._ranks

    def _build_drafting(self, target: ModelConfig, progress: Progress) -> DraftEngine:
        rounds, tree, draft = self.config.rounds, self.config.tree, self.config.draft
        num_recent = max(draft.ngram.max_match, tree.max_depth)
        grammars = target_grammars(self.config, target, progress)
        rules = self.config.acceptance.rules
        slots = DraftedSlots(rounds.max_sequences, tree.max_nodes, num_recent, rules, grammars)
        drafting = DraftEngine(slots)
        context = MethodContext(
            self.config,
            target,
            self._device,
            slots,
            drafting.estimator,
            self._tracer,
            progress,
            self._join_ranks,
        )
        for name in draft.methods:
            drafting.add(METHODS[name].build(context))
        return drafting

    def _load_judges(self, progress: Progress) -> dict[str, Judge]:
        """Those of `acceptance.judges`. Raises ValueError, naming one, if it is not for these models and methods."""
        configured = self.config.acceptance.judges
        if not configured:
            return {}
        from outrider.workers.weights.tokenizer import load_tokenizer

        cache_dir, target = Path(self.config.cluster.model_cache_dir).expanduser(), self.config.target
        speaks = resolve_tokenizer(target.tokenizer or target.model, cache_dir, progress, "target.tokenizer")
        embedding = load_target_tensors(self.config, [EMBEDDING], progress)
        served = identify(target.model, embedding, load_tokenizer(speaks).chat_template)
        drafter, methods, judges = None, self._drafting.methods, {}
        for entry in configured:
            field = judge_field(entry.name)
            head, description = read_judge(resolve_judge(entry.model, progress, field))
            if description.drafter is not None:
                check_methods(field, [method.name for method in methods if not method.has_node_rows])
                if methods and drafter is None:
                    source = load_model(self.config, "draft", progress)
                    drafter = identify(self.config.draft.model, source, None)
                    methods[0].keep_node_rows()
            check_models(field, description, served, drafter)
            judges[entry.name] = Judge(entry.name, head.to(self._device), description)
        return judges

    def _forget_sequences(self) -> None:
        """What draft methods keep by text (rows of shared pages) stays: it is as true for the next target."""
        for sequence in list(self._scheduler.running):
            sequence.in_flight = False
            self._scheduler.finish(sequence)

    def _loop_options(self) -> LoopOptions:
        rounds = self.config.rounds
        return LoopOptions(
            overlapped=rounds.loop == "overlapped",
            num_lanes=rounds.lanes,
            merge_lanes=rounds.merge_lanes,
            growth=GrowthOptions(
                draft_ahead=rounds.draft_ahead,
                fixed_budget=self.config.tree.budget == "fixed",
                draft_costs=self.config.draft.placement == "shared",
                max_round_tokens=rounds.max_round_tokens,
            ),
            heartbeat_s=min(_HEARTBEAT_S, self.config.cluster.group_timeout_s / 4),
        )

    @staticmethod
    def _report_calibration(progress: Progress, num_before: int, num_all: int, num_tokens: int) -> None:
        progress("calibrate", num_before + num_tokens, num_all)

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
