"""A whole deployment inside one process: target ranks as threads, the DraftWorker's loop as another.

The workers' own code runs, messages are encoded and decoded; only the transport is a queue.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import DraftMethod
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.model_ranks import ModelRank, NoHead, follow
from outrider.workers.drafting.ngram import NgramMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import Communicator, SoloCommunicator, broadcast_message
from outrider.workers.link.link import DraftReceiver, DraftSender, Packet
from outrider.workers.link.messages import Draft, Scores, decode_draft
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.fp8_cache import Fp8PagedCache, read_cache_scales
from outrider.workers.model.head import Head
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.growth import GrowthOptions
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sampling.grammars import NO_GRAMMARS, Grammars
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.hidden import HiddenNeeds, all_layers
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.rules import RULES, RuleMaker
from outrider.workers.sequences.sequence import Request, TokenEvent
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.target_rank import TargetRank, serve_rounds
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.source import WeightSource

MethodBuilder = Callable[[DraftedSlots, AcceptanceEstimator, ModelConfig], DraftMethod]

_MAX_DEPTH = 32
_RECEIVE_TIMEOUT_S = 600.0  # so long that a process which was stopped for a while can go on


class QueueLink:
    """One end of a link inside a process."""

    def __init__(self, outbox: queue.SimpleQueue[Packet], inbox: queue.SimpleQueue[Packet]) -> None:
        self._outbox, self._inbox = outbox, inbox

    def send(self, packet: Packet) -> None:
        self._outbox.put(Packet(packet.message.clone(), packet.payload.clone()))

    def receive(self) -> Packet:
        return self._inbox.get(timeout=_RECEIVE_TIMEOUT_S)

    def poll(self) -> bool:
        return not self._inbox.empty()

    def close(self) -> None:
        pass


def queue_links() -> tuple[QueueLink, QueueLink]:
    """Two ends that talk to each other."""
    there: queue.SimpleQueue[Packet] = queue.SimpleQueue()
    back: queue.SimpleQueue[Packet] = queue.SimpleQueue()
    return QueueLink(there, back), QueueLink(back, there)


class LocalEngine:
    """Runs requests through the real round loop. Use as a context manager."""

    def __init__(
        self,
        target: WeightSource,
        draft: WeightSource | None = None,
        *,
        draft_head: Head | None = None,
        draft_communicators: tuple[Communicator, ...] = (SoloCommunicator(),),
        communicators: tuple[Communicator, ...] = (SoloCommunicator(),),
        options: LoopOptions | None = None,
        num_pages: int = 512,
        page_size: int = 16,
        max_sequences: int = 8,
        max_round_tokens: int = 256,
        prefill_chunk: int = 64,
        prefix_sharing: bool = True,
        max_children: int = 3,
        ngram: NgramConfig | None = None,
        dtype: torch.dtype = torch.float32,
        profile: PassProfile | None = None,
        max_nodes: int = 32,
        methods: Iterable[MethodBuilder] = (),
        rules: Mapping[str, RuleMaker] = RULES,
        taps: tuple[int, ...] = (),
        grammars: Grammars = NO_GRAMMARS,
        fp8_cache: bool = False,
        plans_early: bool = False,
    ) -> None:
        """`draft_head`: instead of the drafter's own; `communicators`, `draft_communicators`: of the ranks of both
        models; `methods`: further ones; `rules`: those that requests name; `taps`: layers that rules read;
        `fp8_cache`: of the target; `plans_early`: a round while the one before is computed, as on a GPU."""
        self._plans_early = plans_early
        self.num_early = 0  # rounds that were planned while another was computed
        draft_end, target_end = queue_links()
        self._target_end = DraftReceiver(target_end)
        ngram = ngram or NgramConfig()
        num_recent = max(ngram.max_match, _MAX_DEPTH)
        slots = DraftedSlots(max_sequences, max_nodes, num_recent, tuple(rules), grammars)
        self.drafting = DraftEngine(slots)
        self.drafting.add(NgramMethod(slots, self.drafting.estimator, ngram))
        self._followers: list[ModelRank] = []
        if draft is not None:
            ranks = []
            for rank, communicator in enumerate(draft_communicators):
                plan = ShardPlan(draft.config, rank, len(draft_communicators), "draft")
                head = NoHead() if rank and draft_head else draft_head
                weights = load_weights(plan, draft, dtype, torch.device("cpu"), packed=True, head=head)
                model = Transformer(weights, communicator)
                cache = PagedCache(draft.config, plan, num_pages, page_size, dtype, torch.device("cpu"))
                ranks.append((model, cache))
            self._followers = [ModelRank(*parts) for parts in ranks[1:]]
            model, cache = ranks[0]
            vocabulary = draft_head.vocabulary if draft_head else VocabularyRange(0, draft.config.vocab_size)
            self.drafting.add(
                ModelMethod(
                    slots=slots,
                    estimator=self.drafting.estimator,
                    model=model,
                    cache=cache,
                    pool=PagePool(num_pages, page_size, prefix_sharing),
                    sampler=Sampler(len(vocabulary), vocabulary, SoloCommunicator()),
                    num_target_tokens=target.config.vocab_size,
                    max_children=max_children,
                    rows_per_sequence=4,
                    max_rows=16,
                    prefill_chunk=prefill_chunk,
                    tracer=Tracer("draft model", False),
                )
            )
        for build in methods:
            self.drafting.add(build(slots, self.drafting.estimator, target.config))
        layers = all_layers([*self.drafting.needs(), HiddenNeeds(taps)])
        self.ranks = []
        for rank, communicator in enumerate(communicators):
            plan = ShardPlan(target.config, rank, len(communicators))
            weights = load_weights(plan, target, dtype, torch.device("cpu"), packed=True)
            model = Transformer(weights, communicator)
            sizes = target.config, plan, num_pages, page_size
            cache = (
                Fp8PagedCache(*sizes, torch.device("cpu"), read_cache_scales(target))
                if fp8_cache
                else PagedCache(*sizes, dtype, torch.device("cpu"))
            )
            self.ranks.append(
                TargetRank(
                    model,
                    cache,
                    max_sequences,
                    target.config.max_context,
                    Tracer(f"target {rank}", False),
                    layers,
                    grammars,
                )
            )
        limits = SchedulerLimits(max_sequences, max_round_tokens, prefill_chunk, target.config.widest_window)
        self.pool = PagePool(num_pages, page_size, prefix_sharing)
        self.events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.loop = RoundLoop(
            DraftSender(draft_end),
            Scheduler(limits, self.pool, self.drafting.prefix_kept, self.drafting.finish),
            self.drafting,
            CostModel(profile or PassProfile((1, 64), (0.010, 0.012))),
            options or default_options(),
            Tracer("draft", False),
            self.events.put,
            rules,
        )
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guard, args=(self._draft,), daemon=True)]
        self._threads += [
            threading.Thread(
                target=self._guard, args=(lambda f=f: self._follow(f, max_sequences, page_size),), daemon=True
            )
            for f in self._followers
        ]
        self._threads += [
            threading.Thread(target=self._guard, args=(lambda r=r: self._serve(r),), daemon=True)
            for r in range(len(self.ranks))
        ]

    def __enter__(self) -> LocalEngine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.stop()
        for thread in self._threads:
            thread.join(timeout=30)
        if self.errors:
            raise self.errors[0]

    def generate(
        self, requests: Iterable[Request], on_event: Callable[[TokenEvent], None] | None = None
    ) -> dict[str, list[TokenEvent]]:
        """Run requests concurrently to their ends; the events of each, in order."""
        collected: dict[str, list[TokenEvent]] = {}
        for request in requests:
            collected[request.id] = []
            self.loop.submit(request)
        unfinished = set(collected)
        while unfinished:
            if self.errors:
                raise self.errors[0]
            try:
                event = self.events.get(timeout=1)
            except queue.Empty:
                continue
            collected[event.request_id].append(event)
            if on_event is not None:
                on_event(event)
            if event.finish_reason:
                unfinished.discard(event.request_id)
        return collected

    def _draft(self) -> None:
        self.loop.run()
        self.drafting.close()

    def _follow(self, follower: ModelRank, num_slots: int, page_size: int) -> None:
        stretches = Stretches(torch.device("cpu"), Tracer("draft 1", False))
        follow(follower, num_slots, page_size, stretches)

    def _serve(self, rank: int) -> None:
        communicator = self.ranks[rank].model.communicator
        nothing = torch.empty(0, dtype=torch.int32)

        def receive() -> Draft:
            message = self._target_end.receive_message() if rank == 0 else nothing
            return decode_draft(broadcast_message(communicator, message))

        def receive_early() -> Draft | None:
            is_here = rank == 0 and self._target_end.poll()
            self.num_early += is_here
            message = self._target_end.receive_message() if is_here else nothing
            message = broadcast_message(communicator, message)
            return decode_draft(message) if len(message) else None

        def answer(scores: Scores) -> None:
            if rank == 0:
                self._target_end.send(scores)

        serve_rounds(self.ranks[rank], receive, receive_early if self._plans_early else None, answer)

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            torch.set_num_threads(1)
            run()
        except BaseException as error:
            self.errors.append(error)
            raise


def default_options(**changes: float) -> LoopOptions:
    """Both lanes, everything overlapped, budget measured; `changes` name fields of LoopOptions or GrowthOptions."""
    growth = {
        "draft_ahead": True,
        "fixed_budget": False,
        "draft_costs": False,
        "max_round_tokens": 256,
    }
    values = {"overlapped": True, "num_lanes": 2, "merge_lanes": False, "heartbeat_s": 2.0}
    growth |= {name: value for name, value in changes.items() if name in growth}
    values |= {name: value for name, value in changes.items() if name not in growth}
    return LoopOptions(**values, growth=GrowthOptions(**growth))


def output_tokens(events: list[TokenEvent]) -> list[int]:
    """All tokens of one request."""
    return [token for event in events for token in event.tokens]
