"""Whole deployments on real Ray: a target of two or three ranks with random weights, a drafter, a Coordinator."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray._private import worker as ray_worker

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.bench.identity import Mismatch
from outrider.cluster.bench.prompts import Prompt
from outrider.cluster.cli.inputs import open_model
from outrider.cluster.client.client import Client
from outrider.cluster.distillation.plan import Plan
from outrider.cluster.distillation.run import Answerer, Judge, Tally, distill
from outrider.cluster.distillation.template import user_turn
from outrider.cluster.engine import Engine
from outrider.cluster.session import RaySession
from outrider.configs.loader import load_config
from outrider.configs.schema import ClusterConfig
from outrider.workers.setup import load_model
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.lines import Description, read_dropped
from outrider.workers.training.texts import TextWriter, read_texts
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source, resolve
from support.asked_engine import WARM, ask
from support.equality import PLAIN, Case, Reference, Text, assert_same_texts, assert_same_tokens, decode
from support.local_engine import LocalEngine
from support.tiny import BOTH, METHODS, tiny_cases
from support.waiting import wait_until

TWO_RANKS = [
    "target.tp_size=2",
    "target.all_reduce=gloo",
    "cluster.num_cpus_per_target=0.5",
    "tree.max_nodes=12",
]
THREE_RANKS = [
    "target.tp_size=3",
    "target.all_reduce=shm",
    "cluster.num_cpus_per_target=0.5",
    "cluster.max_restarts=0",
    "tree.max_nodes=12",
]
UNDRAFTED = {"max_nodes": 0}
PROMPTS = ["once upon a time", "one two three one two three one two", "x"]

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two CPUs")


def test_a_worker_that_cannot_have_a_place_is_refused_before_anything_starts() -> None:
    config = load_config("tiny-random", ["target.tp_size=4096"])
    with pytest.raises(ValueError, match=r"target\.tp_size must be at most \d+ on \d+ CPUs.*got 4096"):
        Engine.start(config)
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def ray_with_room() -> Iterator[None]:
    """One Ray for all tests here, with CPUs for several deployments (Ray only counts them)."""
    with RaySession(ClusterConfig(), num_cpus=8) as session:
        # Each further one is a Python that imports Ray before the first actor can.
        assert session.daemons.keys() <= {"gcs_server", "raylet", "reaper"}
        yield


@pytest.fixture(scope="module")
def engine(ray_with_room: None) -> Iterator[Engine]:
    with Engine.start(load_config("tiny-random", TWO_RANKS)) as engine:
        yield engine


@pytest.fixture(scope="module")
def without_restarts(ray_with_room: None) -> Iterator[Engine]:
    """The last test of this file kills one of its ranks."""
    with Engine.start(load_config("tiny-random", THREE_RANKS)) as engine:
        yield engine


@dataclass(frozen=True)
class Expected:
    """What one process says."""

    reference: Reference
    cases: list[Case]
    texts: Mapping[str, Text]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    config, folder = load_config("tiny-random"), tmp_path_factory.mktemp("models")
    target, drafter = (
        resolve(model, folder, silent, "model") for model in (config.target.model, config.draft.model)
    )
    cases = tiny_cases() + [replace(c, id=f"warm {c.id}") for c in tiny_cases(sampling=WARM)]
    with LocalEngine(open_source(target), open_source(drafter)) as engine:
        return Expected(Reference(target), cases, decode(engine, cases, BOTH))


@pytest.mark.parametrize("deployment", ["engine", "without_restarts"])
def test_a_deployment_gives_the_text_of_one_process_and_of_transformers(
    request: pytest.FixtureRequest, expected: Expected, ties: list[Mismatch], deployment: str
) -> None:
    """Two ranks over gloo, three over shared memory, gloo to the drafter."""
    engine: Engine = request.getfixturevalue(deployment)
    reference, cases = expected.reference, expected.cases
    plain = ask(engine, cases, PLAIN)
    drafted = {method: ask(engine, cases, draft) for method, draft in METHODS.items()}
    assert_same_texts(reference, cases, expected.texts, ties, "one process")
    assert_same_texts(reference, cases, plain, ties, "plain on Ray")
    for method, answers in drafted.items():
        for case in cases:
            assert_same_tokens(
                reference, case, plain[case.id].tokens, answers[case.id].tokens, ties, f"{method} on Ray"
            )
        assert sum(answer.stats.num_accepted for answer in answers.values()) > 0


def test_speculative_answers_are_those_of_plain_decoding(engine: Engine) -> None:
    for sampling in ({}, {"temperature": 0.8, "top_p": 0.95, "seed": 3, "frequency_penalty": 0.5}):
        drafted = engine.generate([GenerationRequest(prompt, sampling) for prompt in PROMPTS])
        plain = engine.generate([GenerationRequest(prompt, sampling, UNDRAFTED) for prompt in PROMPTS])
        assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
        assert sum(answer.stats.num_accepted for answer in drafted) > 0
        assert sum(answer.stats.num_accepted for answer in plain) == 0


def test_an_inner_block_leaves_the_engine_to_the_outer_one(engine: Engine) -> None:
    with engine:
        pass
    assert engine.generate([GenerationRequest("x")])[0].finish_reason == "length"


def test_a_forked_process_is_told_that_the_engine_is_not_its_own(engine: Engine) -> None:
    child = os.fork()
    if not child:
        refused = 0
        for call in (lambda: engine.generate([GenerationRequest("x")]), engine.stats):
            try:
                call()
            except EngineError as error:
                refused += "forked" in str(error)
        engine.close()  # which leaves it alone
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert engine.generate([GenerationRequest("x")])[0].finish_reason == "length"


def test_a_stream_gives_the_same_tokens_as_the_whole_answer(engine: Engine) -> None:
    (whole,) = engine.generate([GenerationRequest(PROMPTS[0])])
    pieces = list(engine.stream(PROMPTS[0]))
    assert tuple(token for piece in pieces for token in piece.tokens) == whole.tokens
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces[-2:]] == ["", "length"]


def test_distilled_texts_are_what_the_target_says(engine: Engine, tmp_path: Path) -> None:
    """Token for token what plain decoding gives; and its own hidden rows of a greedy text lead to that text."""
    config = load_config("tiny-random", TWO_RANKS)
    model = open_model(config)
    prompts = [Prompt(str(number), "", text) for number, text in enumerate(PROMPTS)]
    plan = Plan({"some": prompts}, (0.0, 1.0), (True, False), 4, 0, [], 2, prompts)
    answerer = Answerer(engine, model.tokenizer, user_turn(model.tokenizer), 0, 20, 100, {}, False)
    description = Description("tiny", model.vocab_size, "", {}, "")
    with TextWriter(tmp_path, description) as writer:
        tally = Tally(plan.num_texts, 0)
        distill(plan.tasks(), answerer.answer, writer, Judge(0.8), tally, 6, lambda: None)
    assert len(read_dropped(tmp_path)) + tally.num_texts == plan.num_texts
    texts = list(read_texts(tmp_path))
    tasks = {task.id: task for task in plan.tasks()}
    samplings = [
        {"temperature": text.temperature, "max_tokens": 20, "seed": tasks[text.id].seed(0, "answer")}
        for text in texts
    ]
    requests = [
        GenerationRequest(text.prompt_tokens, sampling, UNDRAFTED)
        for text, sampling in zip(texts, samplings, strict=True)
    ]
    assert [answer.tokens for answer in engine.generate(requests)] == [text.output_tokens for text in texts]
    greedy = [text for text in texts if text.temperature == 0.0]
    assert greedy
    source = load_model(config, "target", silent)
    features = TargetFeatures(source, [source.config.num_layers], torch.float32, threads=1)
    for text, rows in zip(greedy, features.rows([text.tokens for text in greedy]), strict=True):
        said = features.model.logits(rows[source.config.num_layers]).argmax(-1).tolist()
        begin = len(text.prompt_tokens)
        assert tuple(said[begin - 1 : -1]) == text.output_tokens


def test_a_bad_request_fails_alone(engine: Engine) -> None:
    good, bad = engine.generate([GenerationRequest("a"), GenerationRequest("b", {"top_p": 2.0})])
    assert len(good.tokens) == 32
    assert bad.error.startswith("sampling.top_p must be in")
    with pytest.raises(ValueError, match=r"sampling\.top_p must be in"):
        list(engine.stream("b", {"top_p": 2.0}))


def test_what_nobody_waits_for_is_cancelled(engine: Engine) -> None:
    long = {"max_tokens": 400, "ignore_eos": True}
    left = engine.stream("a", long)
    next(left)
    left.close()
    engine.stream("a", long).close()  # before the first piece
    engine.stream("a", long)  # dropped
    engine.completions([GenerationRequest("a", long)] * 3).close()
    wait_until_idle(engine)


def test_two_thousand_open_requests_do_not_keep_control_waiting(engine: Engine) -> None:
    answers = engine.completions([GenerationRequest("a", {"max_tokens": 400, "ignore_eos": True})] * 2000)
    assert engine.stats()["coordinator"]["num_open_requests"] > 1900
    (short,) = engine.generate([GenerationRequest([True])])  # type: ignore[list-item]
    assert short.error.startswith("prompt must be a text, a list of messages or a list of token ids")
    answers.close()
    wait_until_idle(engine)


def wait_until_idle(engine: Engine) -> None:
    wait_until(lambda: not engine.stats()["coordinator"]["num_open_requests"])


def test_a_ray_that_wants_another_token_says_so_at_once(ray_with_room: None) -> None:
    address = ray.get_runtime_context().gcs_address
    code = f"Engine.start(load_config('tiny-random', ['cluster.ray_address={address}']))"
    command = [sys.executable, "-c", f"from outrider import Engine, load_config; {code}"]
    env = {**os.environ, "RAY_AUTH_TOKEN": "f" * 64}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: cluster.ray_auth must suit the Ray at {address}: it wants a token")
    assert "the one here is another" in last
    assert "Failed to get cluster ID" not in run.stderr  # Ray's own warnings, one a second


def test_a_server_is_found_by_the_address_of_its_ray(engine: Engine) -> None:
    address = ray.get_runtime_context().gcs_address
    with pytest.raises(ValueError, match="must have one server of `outrider serve`, it has none"):
        Client(address)
    engine.announce("http://127.0.0.1:4711")
    with Client(address) as client:
        assert client.url == "http://127.0.0.1:4711"
    engine.announce("")


def test_nobody_prints_messages_of_rays_daemons_between_answers(ray_with_room: None) -> None:
    # Ray's driver listens for them in this thread, and prints them to its standard output when a node has died.
    assert not ray_worker.global_worker.listener_thread.is_alive()


def test_a_missing_model_is_one_line(ray_with_room: None, tmp_path: Path) -> None:
    config = load_config("tiny-random", [f"target.model={tmp_path}/nothing.gguf"])
    with pytest.raises(ValueError, match=r"target\.model: no file or directory") as caught:
        Engine.start(config)
    assert "\n" not in str(caught.value)


def test_where_nothing_is_restarted_a_killed_rank_ends_requests_with_its_name_and_close_leaves_no_process(
    without_restarts: Engine,
) -> None:
    engine = without_restarts
    stats = engine.stats()
    pids = [stats[name]["pid"] for name in ("draft", "target 0", "target 1", "target 2")]
    stream = engine.stream("a", {"max_tokens": 450, "ignore_eos": True})
    next(stream)
    os.kill(stats["target 1"]["pid"], signal.SIGKILL)
    with pytest.raises(EngineError, match="target 1 died during run"):
        list(stream)
    with pytest.raises(EngineError, match="target 1 died during run"):
        engine.generate([GenerationRequest("b")])
    engine.close()
    for call in (engine.stats, engine.trace, lambda: engine.stream("a"), lambda: engine.generate([])):
        with pytest.raises(EngineError, match="the engine was closed"):
            call()
    with pytest.raises(StopIteration):
        next(stream)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
