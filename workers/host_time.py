"""What a round costs on the host besides the models: the real loop over models that cost nothing.

Loop, scheduler, drafting, messages, the target's state and the sampler are those that serve; only the two models
are tables from a token and its position to logits. One thread does everything, so its processor time is the sum
of all processes'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from outrider.configs.schema import Config
from outrider.kernels.selection import REFERENCES
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.link import DraftReceiver, DraftSender, Packet
from outrider.workers.link.messages import Steps, decode_draft
from outrider.workers.model.batch import ForwardBatch, TreeRows
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.growth import GrowthOptions
from outrider.workers.rounds.loop import LoopOptions, RoundLoop
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sampling.context import SampledRows
from outrider.workers.sampling.logprobs import NO_QUESTIONS, LawQuestions
from outrider.workers.sampling.sampler import Prepared, Sampler, Samples
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, TokenEvent
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.target_rank import RunningRound, TargetRank
from outrider.workers.trace import Tracer
from outrider.workers.weights.config import ModelConfig

TREE_NODES = 32  # drafted nodes of each sequence in each round
_TREE_DEPTH = 8
_NUM_TABLE_ROWS = 509
_DRAFT_ERROR = 0.7  # standard deviation of the drafter's logits around the target's
_LOGIT_SCALE = 2.0
_PROMPT_TOKENS = 64
_NUM_WARM_UP_ROUNDS, _NUM_ROUNDS = 30, 100
_ROWS_PER_STEP = 12  # nodes of a sequence that a draft step expands
_PAGE_SIZE = 16


@dataclass(frozen=True)
class HostTime:
    """Processor milliseconds of one round: drafter and target together, without their models.

    loop: scheduling, growing and cutting trees, messages both ways, the target's state, verdicts; sampling: of the
    target's tokens and the drafter's proposals; acceptance_length: tokens that came out of a sequence's round.
    """

    loop_ms: float
    sampling_ms: float
    acceptance_length: float


def measure_host_time(
    model: ModelConfig, config: Config, num_sequences: int, sampling: SamplingParams
) -> HostTime:
    """Run `num_sequences` texts side by side with trees of `TREE_NODES` nodes, drafted by a model, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _Bench(model, config, num_sequences).run(num_sequences, sampling)
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """Processor seconds of this thread spent inside of it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.thread_time() - self._begun


class _FreeModel:
    """Stands in for a Transformer: hidden rows are numbers made of token and position, logits rows of a table."""

    def __init__(self, config: ModelConfig, table: torch.Tensor, clock: _Clock) -> None:
        self.config = config
        self.plan = ShardPlan(config, 0, 1)
        self.communicator = SoloCommunicator()
        self.kernels = REFERENCES
        self.device = torch.device("cpu")
        self._table = table
        self._clock = clock

    def forward(self, batch: ForwardBatch, cache: PagedCache, taps: Sequence[int] = ()) -> Hidden:
        with self._clock:
            return Hidden((7 * batch.tokens + batch.positions)[:, None], {})

    def logits_of(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with self._clock:
            numbers = hidden[:, 0].index_select(0, torch.as_tensor(rows))
            return self._table.index_select(0, numbers % _NUM_TABLE_ROWS)


class _FreeCache:
    """Stands in for a PagedCache that nobody reads."""

    page_size = _PAGE_SIZE

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages

    def commit(self, source_slots: torch.Tensor, target_slots: torch.Tensor) -> None:
        pass


class _TimedSampler(Sampler):
    def __init__(self, vocab_size: int, clock: _Clock) -> None:
        super().__init__(vocab_size, VocabularyRange(0, vocab_size), SoloCommunicator())
        self._clock = clock

    def prepare(
        self, groups: Sequence[SampledRows], questions: LawQuestions = NO_QUESTIONS, num: int = 1
    ) -> Prepared:
        with self._clock:
            return super().prepare(groups, questions, num)

    def propose_prepared(
        self, logits: torch.Tensor, prepared: Prepared, num: int, there: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._clock:
            return super().propose_prepared(logits, prepared, num, there)


class _TimedRank(TargetRank):
    clock: _Clock

    def prepare(self, steps: Steps, rows: TreeRows) -> Prepared:
        with self.clock:
            return super().prepare(steps, rows)

    def sample(self, running: RunningRound, logits: torch.Tensor) -> Samples:
        with self.clock:
            return super().sample(running, logits)


class _DirectLink:
    """Both ends of a link in one thread: a draft is answered when it is sent."""

    def __init__(self) -> None:
        self.rank: TargetRank | None = None
        self.num_rounds = 0
        self._answers: list[Packet] = []
        self._target_end = DraftReceiver(_Outbox(self._answers))

    def send(self, packet: Packet) -> None:
        draft = decode_draft(packet.message)
        if not draft.stop:
            assert self.rank is not None
            self._target_end.send(self.rank.step(draft))
            self.num_rounds += 1

    def receive(self) -> Packet:
        return self._answers.pop(0)

    def poll(self) -> bool:
        return bool(self._answers)

    def close(self) -> None:
        pass


class _Outbox:
    """The target's end."""

    def __init__(self, answers: list[Packet]) -> None:
        self._answers = answers

    def send(self, packet: Packet) -> None:
        self._answers.append(packet)

    def receive(self) -> Packet:
        raise AssertionError("the target is handed its drafts")

    def poll(self) -> bool:
        return False

    def close(self) -> None:
        pass


class _Bench:
    def __init__(self, model: ModelConfig, config: Config, num_sequences: int) -> None:
        self._model_clock, self._sampling_clock = _Clock(), _Clock()
        generator = torch.Generator().manual_seed(0)
        shape = (_NUM_TABLE_ROWS, model.vocab_size)
        table = _LOGIT_SCALE * torch.randn(shape, generator=generator)
        guessed = table + _DRAFT_ERROR * torch.randn(shape, generator=generator)
        num_pages = (
            num_sequences * (1 + _PROMPT_TOKENS + (_NUM_WARM_UP_ROUNDS + _NUM_ROUNDS) * _TREE_DEPTH) // 8
        )
        cache = cast(PagedCache, _FreeCache(num_pages))
        self._link = _DirectLink()
        target = cast(Transformer, _FreeModel(model, table, self._model_clock))
        rank = _TimedRank(target, cache, num_sequences, model.max_context, Tracer("target", False))
        rank.clock = self._sampling_clock
        self._link.rank = rank
        slots = DraftedSlots(num_sequences, TREE_NODES, _TREE_DEPTH)
        drafting = DraftEngine(slots)
        drafting.add(
            ModelMethod(
                slots=slots,
                estimator=drafting.estimator,
                model=cast(Transformer, _FreeModel(model, guessed, self._model_clock)),
                cache=cache,
                pool=PagePool(num_pages, _PAGE_SIZE, config.rounds.prefix_sharing),
                sampler=_TimedSampler(model.vocab_size, self._sampling_clock),
                num_target_tokens=model.vocab_size,
                max_children=config.tree.max_children,
                rows_per_sequence=_ROWS_PER_STEP,
                max_rows=num_sequences * _ROWS_PER_STEP,
                prefill_chunk=_PROMPT_TOKENS,
                tracer=Tracer("draft model", False),
            )
        )
        max_rows = num_sequences * (TREE_NODES + _PROMPT_TOKENS)
        pool = PagePool(num_pages, _PAGE_SIZE, config.rounds.prefix_sharing)
        limits = SchedulerLimits(num_sequences, max_rows, num_sequences * _PROMPT_TOKENS)
        self._events: list[TokenEvent] = []
        self._loop = RoundLoop(
            DraftSender(self._link),
            Scheduler(limits, pool, drafting.prefix_kept, drafting.finish),
            drafting,
            CostModel(PassProfile((1,), (1.0,)), {ModelMethod.name: PassProfile((1,), (0.0,))}),
            LoopOptions(
                overlapped=False,
                num_lanes=1,
                merge_lanes=False,
                growth=GrowthOptions(
                    draft_ahead=False, fixed_budget=True, draft_costs=True, max_round_tokens=max_rows
                ),
                heartbeat_s=1.0,
            ),
            Tracer("draft", False),
            self._emit,
        )
        self._begun: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._ended = self._begun
        self._num_tokens = 0

    def run(self, num_sequences: int, sampling: SamplingParams) -> HostTime:
        """Rounds of all sequences; those in which their prompts are read come before the first that counts."""
        sampling = replace(sampling, max_tokens=10**6)
        for number in range(num_sequences):
            prompt = tuple((7 * number + 3 * i) % 61 for i in range(_PROMPT_TOKENS))
            draft = DraftOptions((ModelMethod.name,), TREE_NODES, _TREE_DEPTH)
            self._loop.submit(Request(str(number), prompt, replace(sampling, seed=number), draft))
        self._loop.run()
        total, model, sampled = (b - a for a, b in zip(self._begun, self._ended, strict=True))
        per_round_ms = 1e3 / _NUM_ROUNDS
        return HostTime(
            loop_ms=(total - model - sampled) * per_round_ms,
            sampling_ms=sampled * per_round_ms,
            acceptance_length=self._num_tokens / _NUM_ROUNDS / num_sequences,
        )

    def _emit(self, event: TokenEvent) -> None:
        rounds = self._link.num_rounds
        if rounds == _NUM_WARM_UP_ROUNDS and self._begun[0] == 0.0:
            self._begun = self._spent()
        if _NUM_WARM_UP_ROUNDS < rounds <= _NUM_WARM_UP_ROUNDS + _NUM_ROUNDS:
            self._num_tokens += len(event.tokens)
        if rounds == _NUM_WARM_UP_ROUNDS + _NUM_ROUNDS and self._ended[0] == 0.0:
            self._ended = self._spent()
            self._loop.stop()

    def _spent(self) -> tuple[float, float, float]:
        return time.thread_time(), self._model_clock.seconds, self._sampling_clock.seconds
