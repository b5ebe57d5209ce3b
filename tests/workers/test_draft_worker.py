"""A DraftWorker and a one-rank TargetWorker as threads of this process, over the real link."""

import dataclasses
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from outrider.configs.loader import load_config
from outrider.workers.draft import DraftWorker
from outrider.workers.draft_heads.checkpoint import write_eagle3, write_medusa, write_mtp
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.judging.head import JudgeDescription, JudgeHead, write_judge
from outrider.workers.judging.identity import identify
from outrider.workers.rounds.budget import PassProfile
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import AcceptanceOptions, DraftOptions, Request, TokenEvent
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.resolver import resolve
from outrider.workers.weights.tokenizer import load_tokenizer
from support.local_engine import output_tokens
from support.tiny_heads import eagle3_drafter, medusa_heads, mtp_drafter

DRAFT = DraftOptions(("ngram", "model"), 8, 8)
EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((5, 1.5), (6, -1.5)),
    seed=2**64 - 1,
    max_tokens=12,
    stop_token_ids=(319,),
    stop=("end",),
    ignore_eos=True,
    logprobs=True,
    top_logprobs=3,
)


class Pair:
    """Both workers, connected; the progress reports of the DraftWorker are kept."""

    def __init__(self, *overrides: str) -> None:
        config = load_config("tiny-random", list(overrides))
        self.draft, self.target = DraftWorker(config), TargetWorker(config, 0)
        self.reports: list[tuple[str, int, int]] = []
        self.draft.load(self.report)
        self.target.load(silent)
        host, port = self.target.open_store("127.0.0.1")
        joining = threading.Thread(target=self.target.connect, args=(host, port, 1))
        joining.start()
        self.draft.connect(host, port, 1)
        joining.join()
        self._threads = [threading.Thread(target=self.target.run, daemon=True)]
        self._threads[0].start()
        self.profile: PassProfile = self.draft.profile(self.report).target
        self.profiled_step_s = self.draft.stats()["draft_step_s"]

    def report(self, what: str, done: int, total: int) -> None:
        self.reports.append((what, done, total))

    def run(self) -> None:
        self._threads.append(threading.Thread(target=self.draft.run, daemon=True))
        self._threads[1].start()

    def generate(self, *requests: Request) -> dict[str, list[TokenEvent]]:
        collected: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        self.draft.submit(1, requests)
        unfinished = set(collected)
        while unfinished:
            for event in self.draft.next_events(1, 20.0):
                collected[event.request_id].append(event)
                if event.finish_reason:
                    unfinished.remove(event.request_id)
        return collected

    def stop(self) -> None:
        self.draft.stop()
        for thread in self._threads:
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair("rounds.trace=true", "rounds.profile_node_counts=[1,2,8]")
    pair.run()
    yield pair
    pair.stop()


def request(request_id: str = "a", num_tokens: int = 12, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    return Request(request_id, prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens), DRAFT)


def test_the_profile_times_each_row_count(pair: Pair) -> None:
    assert pair.profile.num_rows == (1, 2, 8)
    assert all(seconds > 0 for seconds in pair.profile.seconds)
    assert list(pair.profiled_step_s["model"]) == [1, 2, 8]
    assert all(seconds > 0 for seconds in pair.profiled_step_s["model"].values())
    assert [report for report in pair.reports if report[0] == "profile"] == [
        ("profile", 0, 3),
        ("profile", 1, 3),
        ("profile", 2, 3),
        ("profile", 3, 3),
    ]


def test_draft_heads_are_tried_before_anybody_is_served(tmp_path: Path) -> None:
    """Random heads are told of, but for one that reads the token, on which this target's law depends; where the law
    leaves one token they are right, and soon believed. Nothing of it stays behind."""
    source = RandomSource(load_config("tiny-random", []).target.model)
    none = HeadDescription()
    write_medusa(tmp_path / "medusa", medusa_heads(source), none, "vllm", torch.float32)
    names = ("medusa", "eagle3", "mtp")
    drafter = eagle3_drafter(source, (0, 1, 2))
    write_eagle3(tmp_path / "eagle3", drafter, none, "speculators", torch.float32)
    write_mtp(tmp_path / "mtp", mtp_drafter(source), none, "speculators", torch.float32)
    models = [f"draft.{name}.model={tmp_path / name}" for name in names]
    pair = Pair("draft.methods=[model,medusa,eagle3,mtp]", *models, "draft.dtype=bfloat16")
    try:
        assert set(pair.profiled_step_s) == {"model", *names}
        asked = request(num_tokens=40)
        certain = dataclasses.replace(asked.sampling, logit_bias=((5, 1000.0),))
        assert pair.draft.calibrate(dataclasses.replace(asked, sampling=certain), pair.report) == []
        assert max(done % 40 for what, done, _ in pair.reports if what == "calibrate") < 20
        said = pair.draft.calibrate(asked, pair.report)
        assert [warning.split()[0] for warning in said] == ["draft.medusa.model", "draft.eagle3.model"]
        assert pair.reports[-1] == ("calibrate", 120, 120)
        pair.run()
        drafts = (DraftOptions((), 0, 0), *(DraftOptions((name,), 8, 8) for name in names))
        asks = [dataclasses.replace(asked, id=str(i), draft=draft) for i, draft in enumerate(drafts)]
        texts = [output_tokens(events) for events in pair.generate(*asks).values()]
        assert texts == [texts[0]] * 4
        assert pair.draft.stats()["num_available_pages"] == pair.draft._scheduler.pool.num_pages
    finally:
        pair.stop()


def write_some_judge(folder: Path, model: str, drafter: str = "") -> None:
    """A judge that likes everything, of these random models."""
    target, template = RandomSource(model), load_tokenizer(resolve(model, folder, silent, "")).chat_template
    read_besides = identify("drafter", RandomSource(drafter), None) if drafter else None
    kind = "target_and_draft" if drafter else "target"
    description = JudgeDescription(
        kind, identify("elsewhere", target, template), read_besides, 0.5, (), ("nothing",)
    )
    head = JudgeHead(description.num_columns)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.constant_(head.linear.bias, 2.0)
    write_judge(folder, head, description)


JUDGED = ("acceptance.rules=[exact,judge]", "draft.methods=[model]")
MODELS = load_config("tiny-random", [])


@pytest.mark.parametrize("kind", ["target", "target_and_draft"])
def test_requests_name_judges_that_are_loaded(tmp_path: Path, kind: str) -> None:
    write_some_judge(tmp_path, MODELS.target.model, MODELS.draft.model if kind == "target_and_draft" else "")
    # A drafter that is mostly wrong, but for the judge of both, which belongs to one.
    poor = MODELS.draft.model.replace("perturb=0.2", "perturb=0.8")
    drafter = MODELS.draft.model if kind == "target_and_draft" else poor
    pair = Pair(*JUDGED, f"draft.model={drafter}", f"acceptance.judges=[{{name: all, model: {tmp_path}}}]")
    try:
        pair.run()
        options = AcceptanceOptions("judge", judge="all", threshold=0.5)
        draft = DraftOptions(("model",), 8, 8)
        asked = [
            dataclasses.replace(request(name, 60), draft=draft, acceptance=acceptance)
            for name, acceptance in (
                ("judged", options),
                ("strict", dataclasses.replace(options, threshold=1.0)),
                ("exact", AcceptanceOptions()),
            )
        ]
        found = pair.generate(*asked)
        kept = found["judged"][-1].stats.kept
        assert kept.num > 0
        assert kept.mean_score == pytest.approx(0.8808, abs=1e-3)
        assert output_tokens(found["strict"]) == output_tokens(found["exact"])
        finished = pair.draft.stats()["finished"]
        assert finished["judge"] == {"num_requests": 2, "num_tokens": 120, "kept": kept.summary()}
        assert finished["exact"]["kept"]["num"] == 0
        assert_plain(finished)
        assert_plain(found["judged"])
    finally:
        pair.stop()


def test_judges_of_other_models_or_beside_other_methods_are_refused(tmp_path: Path) -> None:
    def load(*overrides: str) -> None:
        judges = f"acceptance.judges=[{{name: mine, model: {tmp_path}}}]"
        DraftWorker(load_config("tiny-random", [*JUDGED, judges, *overrides])).load(silent)

    write_some_judge(tmp_path, MODELS.target.model.replace("seed=0", "seed=1"))
    with pytest.raises(
        ValueError, match=r"^acceptance\.judges mine must be a judge of .*embedding has other"
    ):
        load()
    write_some_judge(tmp_path, MODELS.target.model.replace("num_layers=2", "num_layers=3"))
    with pytest.raises(ValueError, match=r"^acceptance\.judges mine must be .*number of layers 3, not 2$"):
        load()
    write_some_judge(tmp_path, MODELS.target.model, MODELS.draft.model)
    load()
    with pytest.raises(ValueError, match=r"mine .*draft\.methods must be \[model\], got also ngram"):
        load("draft.methods=[ngram,model]")
    with pytest.raises(ValueError, match=r"mine .*reads a draft model's rows, and draft\.methods has no"):
        load("draft.methods=[]")


def test_loading_reports_bytes_up_to_the_total(pair: Pair) -> None:
    loading = [(done, total) for what, done, total in pair.reports if what == "load"]
    assert loading[-1][0] == loading[-1][1] > 0
    assert loading == sorted(loading)


def test_profiling_leaves_no_page_taken() -> None:
    pair = Pair()
    try:
        pool = pair.draft._scheduler.pool
        assert pool.num_available == pool.num_pages
    finally:
        pair.run()
        pair.stop()


def test_the_same_request_gives_the_same_text_at_any_time(pair: Pair) -> None:
    alone = output_tokens(pair.generate(request("1"))["1"])
    together = pair.generate(*(request(str(i), prompt=(5 + i % 2, 6, 7)) for i in range(6)))
    assert [output_tokens(together[str(i)]) for i in (0, 2, 4)] == [alone] * 3


def test_pages_are_back_when_all_is_said(pair: Pair) -> None:
    pair.generate(*(request(str(i), prompt=tuple(range(1, 60))) for i in range(5)))
    pool = pair.draft._scheduler.pool
    assert pair.draft.stats()["num_available_pages"] == pool.num_pages


def test_waiting_for_events_ends_with_the_first_or_with_the_time(pair: Pair) -> None:
    assert pair.draft.next_events(1, 0.01) == []
    begun = time.monotonic()
    pair.draft.submit(1, [request("a", num_tokens=1)])
    (event,) = pair.draft.next_events(1, 20.0)
    assert time.monotonic() - begun < 15.0
    assert (event.request_id, event.finish_reason) == ("a", "length")


def test_a_trace_has_the_work_of_both(pair: Pair) -> None:
    pair.generate(request("a"))
    draft = {event["name"] for event in pair.draft.trace_events()}
    target = {event["name"] for event in pair.target.trace_events()}
    assert {"draft", "verify", "wait", "communicate", "schedule"} <= draft
    assert {"commit", "forward", "sample", "wait", "communicate"} <= target


def test_log_probabilities_come_with_every_token(pair: Pair) -> None:
    events = pair.generate(Request("a", (5, 6, 7), EVERYTHING, DRAFT))["a"]
    logprobs = [entry for event in events for entry in event.logprobs]
    assert len(logprobs) == len(output_tokens(events)) > 0
    assert all(entry.logprob <= 0.0 and len(entry.top) == 3 for entry in logprobs)
    assert all(entry.top[0][1] >= entry.logprob - 1e-4 for entry in logprobs)


def test_the_heartbeat_is_quicker_than_a_group_loses_patience() -> None:
    for timeout_s, heartbeat_s in ((60.0, 2.0), (2.0, 0.5)):
        config = load_config("tiny-random", [f"cluster.group_timeout_s={timeout_s}"])
        assert DraftWorker(config)._loop_options().heartbeat_s == heartbeat_s


PLAIN_TYPES = (str, int, float, bool, Origin)


def assert_plain(value: object) -> None:
    """Built-in values all the way down: no tensor, no array, no number of either."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            assert_plain(getattr(value, field.name))
    elif type(value) in (tuple, list):
        for item in value:
            assert_plain(item)
    elif type(value) is dict:
        for key, item in value.items():
            assert_plain(key)
            assert_plain(item)
    else:
        assert type(value) in PLAIN_TYPES, f"{value!r} is a {type(value)}"


def test_the_control_plane_carries_no_tensors(pair: Pair) -> None:
    asked = Request("a", (5, 6, 7), EVERYTHING, DRAFT)
    events = pair.generate(asked, request("b"))
    crossing = [
        asked,
        *events["a"],
        *events["b"],
        pair.profile,
        pair.draft.stats(),
        pair.target.stats(),
        pair.draft.trace_events(),
        pair.target.trace_events(),
    ]
    for value in crossing:
        assert_plain(value)
        pickled = pickle.dumps(value)
        assert b"torch" not in pickled
        assert b"numpy" not in pickled


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.model=random:llama?layers=2", r"has no option layers"),
        ("draft.model=/nowhere/draft.gguf", r"draft\.model"),
        ("target.kv_cache_bytes=100", r"target\.kv_cache_bytes must be at least \d+ \(one page\), got 100"),
        ("draft.kv_cache_bytes=100", r"draft\.kv_cache_bytes must be at least \d+ \(one page\), got 100"),
    ],
)
def test_what_cannot_be_loaded_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DraftWorker(load_config("tiny-random", [override])).load(silent)
    assert "\n" not in str(error.value)
