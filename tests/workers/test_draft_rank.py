"""A drafter of several processes over real groups; no Ray."""

import time

import pytest

from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.draft import DraftWorker
from outrider.workers.draft_rank import DraftRank
from outrider.workers.first_gpu.processes import CALL_S, WorkerProcess, deployed
from outrider.workers.link.lost import LinkLostError, RankLostError
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from support.draft_rank_processes import draft_ranks
from support.local_engine import LocalEngine, default_options, output_tokens

NOTICED_S = 20.0
DRAFT = DraftOptions(("ngram", "model"), 8, 8)
ENDLESS = Request("endless", (1, 2), SamplingParams(max_tokens=400), DRAFT)


def configured(*overrides: str) -> Config:
    return load_config("tiny-random", overrides)


def requests() -> list[Request]:
    warm = SamplingParams(temperature=0.8, top_p=0.95, frequency_penalty=0.4, seed=5, max_tokens=24)
    prompts = (tuple(range(5, 60)), (7, 8, 9, 7, 8, 9, 7, 8), (100,), tuple(range(200, 120, -3)))
    return [
        Request(f"{i} {sampling.temperature}", prompt, sampling, DRAFT)
        for i, prompt in enumerate(prompts)
        for sampling in (SamplingParams(temperature=0.0, max_tokens=24), warm)
    ]


@pytest.fixture(scope="module")
def expected_texts() -> dict[str, list[int]]:
    """What one process says."""
    config = configured()
    target, draft = RandomSource(config.target.model), RandomSource(config.draft.model)
    with LocalEngine(target, draft, options=default_options(fixed_budget=True)) as engine:
        return {name: output_tokens(events) for name, events in engine.generate(requests()).items()}


def test_ranks_outlast_idle_times_and_lost_targets_and_end_the_drafter_when_one_is_lost(
    expected_texts: dict[str, list[int]],
) -> None:
    timeout_s = 5.0
    config = configured(
        "draft.tp_size=2", "draft.all_reduce=gloo", "target.tp_size=2", f"cluster.group_timeout_s={timeout_s}"
    )
    with draft_ranks(config) as drafter, deployed(config, others=drafter.others) as running:
        time.sleep(1.3 * timeout_s)  # the drafter's ranks hear nothing meanwhile
        events = running.generate(requests())
        assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts
        assert sum(list_[-1].stats.num_accepted for list_ in events.values()) > 0
        (busy_s,) = [rank.call("stats")["busy_s"] for rank in drafter.ranks]
        assert busy_s["forward"] > 0.0

        running.targets[1].kill()
        for run in (running.runs[0], running.runs[2]):
            assert run.exception(NOTICED_S)
        running.targets[1] = WorkerProcess(TargetWorker, config, 1, (), limit_s=CALL_S)
        running.targets[1].call("load", silent)
        running.meeting = running.targets[0].call("open_store", "127.0.0.1")
        running.connect(epoch=2)
        events = running.generate(requests())
        assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts

        running.draft.call("submit", 2, [ENDLESS])
        assert running.draft.call("next_events", 2, 10.0)
        drafter.ranks[0].kill()
        assert isinstance(running.runs[2].exception(NOTICED_S), RankLostError)
        assert isinstance(running.runs[0].exception(NOTICED_S), LinkLostError)  # the target's group is whole
        running.runs[1].result(NOTICED_S)


def test_ranks_over_shared_memory_end_in_order_and_an_idle_drafter_is_told_of_a_loss(
    expected_texts: dict[str, list[int]],
) -> None:
    config = configured("draft.tp_size=3", "draft.all_reduce=shm")
    with draft_ranks(config) as drafter, deployed(config, others=drafter.others) as running:
        events = running.generate(requests())
        assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts
        running.stop()
        for run in drafter.runs:
            run.result(NOTICED_S)
    with draft_ranks(config) as drafter, deployed(config, others=drafter.others) as running:
        running.draft.call("lose_rank", "draft 2 died during run: its process is gone")
        with pytest.raises(RankLostError, match=r"^draft 2 died during run"):
            running.runs[1].result(NOTICED_S)


def test_more_ranks_than_the_draft_model_has_heads_are_refused_by_name() -> None:
    config = configured("draft.tp_size=5")
    message = r"^draft\.tp_size must be at most 4 for this model \(its query heads\), got 5$"
    for worker in (DraftWorker(config), DraftRank(config, 1)):
        with pytest.raises(ValueError, match=message):
            worker.load(silent)
