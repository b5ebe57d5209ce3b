"""Real processes, real groups, a real link; no Ray. Two target ranks and a DraftWorker with random weights."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.draft import DraftWorker
from outrider.workers.first_gpu.processes import CALL_S, Deployment, WorkerProcess, deployed
from outrider.workers.link.lost import LinkLostError, PeerLostError
from outrider.workers.rounds.budget import PassProfile, Profiles
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, RequestStats, TokenEvent
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from support.local_engine import LocalEngine, default_options, output_tokens
from support.stuck import StuckTarget

# A lost process is noticed by its broken connections, not by the time limit of the group (60 s).
NOTICED_S = 20.0
DRAFT = DraftOptions(("ngram", "model"), 8, 8)
PROMPTS = [tuple(range(5, 60)), (7, 8, 9, 7, 8, 9, 7, 8), (100,), tuple(range(200, 120, -3))]


def two_ranks(**cluster: float) -> Config:
    overrides = [f"cluster.{name}={value}" for name, value in cluster.items()]
    return load_config("tiny-random", ["target.tp_size=2", *overrides])


def requests(num_tokens: int = 24) -> list[Request]:
    """Greedy and sampled ones."""
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=num_tokens),
        SamplingParams(
            temperature=0.8, top_p=0.95, frequency_penalty=0.4, seed=2**63 + 5, max_tokens=num_tokens
        ),
    ]
    return [
        Request(f"{i} {sampling.temperature}", prompt, sampling, DRAFT)
        for i, prompt in enumerate(PROMPTS)
        for sampling in samplings
    ]


@pytest.fixture(scope="module")
def expected_texts() -> dict[str, list[int]]:
    """What one rank and the same drafter say inside one process."""
    config = two_ranks()
    target = RandomSource(config.target.model)
    draft = RandomSource(config.draft.model)
    with LocalEngine(target, draft, options=default_options(fixed_budget=True)) as engine:
        return {name: output_tokens(events) for name, events in engine.generate(requests()).items()}


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Ranks over shared memory; its tests leave it idle and whole."""
    with deployed(two_ranks()) as running:
        yield running
        running.stop()


def assert_lost(run: Future[None]) -> None:
    assert isinstance(run.exception(NOTICED_S), PeerLostError)


def test_processes_say_what_one_process_says(
    deployment: Deployment, expected_texts: dict[str, list[int]]
) -> None:
    events = deployment.generate(requests())
    assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts
    last = [list_[-1] for list_ in events.values()]
    assert all(event.finish_reason == "length" for event in last)
    assert sum(event.stats.num_accepted for event in last) > 0


def test_a_cancelled_request_ends_and_the_others_go_on(
    deployment: Deployment, expected_texts: dict[str, list[int]]
) -> None:
    endless = Request("endless", (3, 4, 5), SamplingParams(temperature=0.9, max_tokens=400), DRAFT)

    def cancel_once_it_speaks(event: TokenEvent) -> None:
        if event.request_id == "endless" and not event.finish_reason:
            deployment.draft.call("cancel", "endless")

    events = deployment.generate([endless, *requests()], cancel_once_it_speaks)
    assert events["endless"][-1].finish_reason == "cancelled"
    assert 0 < len(output_tokens(events.pop("endless"))) < 400
    assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts


def test_every_worker_says_what_it_did(deployment: Deployment) -> None:
    deployment.generate(requests(4))
    draft = deployment.draft.call("stats")
    assert list(draft["target_pass_s"]) == [1, 2]
    assert draft["busy_s"]["verify"] > 0.0
    for target in deployment.targets:
        stats = target.call("stats")
        assert stats["busy_s"]["forward"] > 0.0
        assert stats["peak_memory_bytes"] > 10 * 2**20


def test_ranks_over_gloo_and_an_idle_time_longer_than_the_group_waits(
    expected_texts: dict[str, list[int]],
) -> None:
    timeout_s = 4.0
    config = load_config(
        "tiny-random",
        ["target.tp_size=2", "target.all_reduce=gloo", f"cluster.group_timeout_s={timeout_s}"],
    )
    with deployed(config) as running:
        time.sleep(1.5 * timeout_s)
        assert not any(run.done() for run in running.runs)
        events = running.generate(requests())
        assert {name: output_tokens(list_) for name, list_ in events.items()} == expected_texts
        running.stop()


def begun(request: Request, text: list[int], num_said: int) -> Request:
    """As it goes on where its first tokens have come out."""
    return replace(request, output_tokens=tuple(text[:num_said]), stats=RequestStats(num_rounds=3))


def test_lost_processes_are_replaced_by_new_ones_and_texts_go_on(
    expected_texts: dict[str, list[int]],
) -> None:
    """First the DraftWorker, which leaves the ranks' group whole; then a rank, which leaves the others' weights."""
    config, long = two_ranks(), Request("long", (1, 2), SamplingParams(max_tokens=400), DRAFT)
    with deployed(config) as running:
        running.draft.call("submit", 1, [long])
        assert running.draft.call("next_events", 1, 10.0)  # in the middle of its work
        running.draft.kill()
        assert isinstance(running.runs[0].exception(NOTICED_S), LinkLostError)
        running.runs[1].result(NOTICED_S)
        running.draft = WorkerProcess(DraftWorker, config, (), limit_s=CALL_S)
        running.draft.call("load", silent)
        joining = [target.begin("relink", 2) for target in running.targets]
        joining.append(running.draft.begin("connect", *running.meeting, 2))
        for joined in joining:
            joined.result(CALL_S)
        running.epoch = 2
        running.runs = [target.begin("run") for target in running.targets]
        running.draft.call("take_over", Profiles(PassProfile((1, 2), (0.01, 0.01)), {}))
        running.runs.append(running.draft.begin("run"))
        going_on = [begun(request, expected_texts[request.id], 7) for request in requests()]
        events = running.generate(going_on)
        assert {
            n: expected_texts[n][:7] + output_tokens(list_) for n, list_ in events.items()
        } == expected_texts
        assert all(list_[-1].stats.num_rounds > 3 for list_ in events.values())

        running.draft.call("submit", 2, [long])
        assert running.draft.call("next_events", 2, 10.0)
        running.targets[1].kill()
        assert_lost(running.runs[0])
        assert_lost(running.runs[2])
        running.targets[1] = WorkerProcess(TargetWorker, config, 1, (), limit_s=CALL_S)
        running.targets[1].call("load", silent)
        running.meeting = running.targets[0].call("open_store", "127.0.0.1")
        running.connect(epoch=3)
        assert (
            running.draft.call("next_events", 2, 10.0) == []
        )  # those of the past are gone, and nobody waits
        running.draft.call("submit", 2, [long])
        events = running.generate([begun(request, expected_texts[request.id], 1) for request in requests()])
        assert {
            n: expected_texts[n][:1] + output_tokens(list_) for n, list_ in events.items()
        } == expected_texts
        assert running.draft.call("stats")["num_running"] == 0
        running.stop()


def test_a_rank_that_is_told_of_a_loss_ends_its_loop_and_stays() -> None:
    """Told by another thread, while the loop waits for a round."""
    with deployed(load_config("tiny-random", [])) as running:
        running.targets[0].call("abort")
        assert_lost(running.runs[0])
        assert running.targets[0].call("stats")
        running.targets[0].call("abort")  # nothing runs: nothing to end


def test_a_rank_that_cannot_be_woken_ends_its_process() -> None:
    stuck = WorkerProcess(StuckTarget, load_config("tiny-random", []), 0)
    run = stuck.begin("run")
    assert stuck.call("stats")  # other threads are served
    stuck.begin("abort", 0.2)
    with pytest.raises(EOFError, match="the process died"):
        run.result(NOTICED_S)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_everybody_notices_a_dead_target_rank(rank: int, busy: bool) -> None:
    with deployed(two_ranks()) as running:
        if busy:
            running.draft.call("submit", 1, [Request("1", (1, 2), SamplingParams(max_tokens=400), DRAFT)])
            assert running.draft.call("next_events", 1, 10.0)
        running.targets[rank].kill()
        assert_lost(running.runs[1 - rank])
        assert_lost(running.runs[2])
