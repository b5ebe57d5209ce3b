"""A round is planned while the one before is computed; on a pretended GPU, which counts what it is asked."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the kernels' sources are read through the compile layer")

from outrider.workers.link.messages import Draft, Scores, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model import cuda_graphs
from outrider.workers.model.whole_rounds import WholeRounds
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.target_rank import PlannedRound, RunningRound, TargetRank, serve_rounds
from outrider.workers.trace import Tracer
from support.counted_gpu import CountedGpu, Counts, counted_gpu
from support.round_counts import SAMPLINGS, model_and_cache

STOP = Draft(99, (), (), Steps.of([]), stop=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedGpu]:
    torch.set_num_threads(1)
    monkeypatch.setattr(cuda_graphs, "TARGET_ROWS", (8,))
    with counted_gpu(monkeypatch) as gpu:
        yield gpu


def new_rank(gpu: CountedGpu) -> TargetRank:
    model, cache = model_and_cache(gpu, 1)
    return TargetRank(model, cache, 2, model.config.max_context, Tracer("target", False))


def two_lanes(sampling: SamplingParams) -> list[Draft]:
    """A sequence in each of two lanes: its prompt with a tree, then a path of it that moves, with another tree."""
    drafts = []
    for slot in range(2):
        pages = tuple(range(12 * slot, 12 * slot + 12))
        prompt = SequenceStep(slot, (), pages, (5, 6, 7 + slot, 8, 9), (0, 0, 1, 2, 2), 2)
        drafts.append(Draft(slot, (SequenceStart(slot, 3, 0, sampling),), (), Steps.of([prompt])))
    for slot in range(2):
        later = SequenceStep(slot, (0, 1, 2, 4), (), (3, 4 + slot, 5), (0, 0, 0), 0)
        drafts.append(Draft(2 + slot, (), (), Steps.of([later])))
    return drafts


class WatchedRank(TargetRank):
    """Writes down what it is asked, with the number of the round."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.said: list[tuple[str, int]] = []

    def begin(self, draft: Draft) -> RunningRound:
        self.said.append(("begin", draft.round_id))
        return super().begin(draft)

    def plan(self, draft: Draft) -> PlannedRound:
        self.said.append(("plan", draft.round_id))
        return super().plan(draft)

    def launch(self, planned: PlannedRound) -> RunningRound:
        self.said.append(("launch", planned.draft.round_id))
        return super().launch(planned)

    def finish(self, running: RunningRound) -> Scores:
        self.said.append(("finish", running.planned.draft.round_id))
        return super().finish(running)


def served(rank: WatchedRank, drafts: list[Draft], early: list[bool]) -> list[Scores]:
    """Drafts that come early, or only when they are waited for."""
    coming, answers = iter([*drafts, STOP]), []
    is_early = iter(early)

    def answer(scores: Scores) -> None:
        rank.said.append(("answer", scores.round_id))
        answers.append(scores)

    def receive_early() -> Draft | None:
        return next(coming) if next(is_early) else None

    assert serve_rounds(rank, lambda: next(coming), receive_early, answer) == STOP
    return answers


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rounds_planned_early_say_what_they_say_one_after_the_other(gpu: CountedGpu, name: str) -> None:
    drafts = two_lanes(SAMPLINGS[name])
    alone = new_rank(gpu)
    expected = [alone.step(draft) for draft in drafts]
    model, cache = model_and_cache(gpu, 1)
    rank = WatchedRank(model, cache, 2, model.config.max_context, Tracer("target", False))
    for scores, other in zip(served(rank, drafts, [True] * 4), expected, strict=True):
        assert scores.round_id == other.round_id
        assert scores.tokens.tolist() == other.tokens.tolist()
        assert scores.logprobs.tolist() == other.logprobs.tolist()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rounds_that_are_one_graph_say_what_they_say_with_launches_around_it(
    gpu: CountedGpu, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts = two_lanes(SAMPLINGS[name])
    whole, apart = new_rank(gpu), new_rank(gpu)
    expected = [whole.step(draft) for draft in drafts]
    monkeypatch.setattr(WholeRounds, "takes", lambda self, around, num_rows: False)
    for draft, scores in zip(drafts, expected, strict=True):
        other = apart.step(draft)
        for field in ("tokens", "failed", "logprobs", "top_ids", "top_logprobs"):
            assert getattr(scores, field).tolist() == getattr(other, field).tolist()
    assert torch.equal(whole._cache.kv.cpu(), apart._cache.kv.cpu())


def test_a_round_is_planned_before_the_one_before_is_waited_for_and_launched_after_its_answer(
    gpu: CountedGpu,
) -> None:
    model, cache = model_and_cache(gpu, 1)
    rank = WatchedRank(model, cache, 2, model.config.max_context, Tracer("target", False))
    served(rank, two_lanes(SAMPLINGS["temperature"]), [True, False, True, True])
    of_a_round = [("begin", 0), ("plan", 0), ("plan", 1), ("finish", 0), ("answer", 0)]
    late = [("launch", 1), ("finish", 1), ("answer", 1), ("begin", 2), ("plan", 2)]
    assert rank.said == [
        *of_a_round,
        *late,
        *[("plan", 3), ("finish", 2), ("answer", 2), ("launch", 3), ("finish", 3), ("answer", 3)],
    ]


def test_planning_asks_nothing_of_the_device_and_launching_does_not_wait(gpu: CountedGpu) -> None:
    rank, drafts = new_rank(gpu), two_lanes(SAMPLINGS["top-p alone"])
    for draft in drafts[:2]:
        rank.step(draft)
    running = rank.begin(drafts[2])
    with gpu.counted() as planning:
        planned = rank.plan(drafts[3])
    assert planning == Counts()
    rank.finish(running)
    with gpu.counted() as launching:
        running = rank.launch(planned)
    assert (launching.replays, launching.uploads, launching.waits) == (1, 1, 0)
    rank.finish(running)
