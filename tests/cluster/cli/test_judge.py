"""`outrider judge` on a tiny target: records, labels, a judge, and what it is worth on an engine that is a fake."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.cli.main import app
from outrider.cluster.engine import Engine
from outrider.cluster.judging.evaluation import read_outcomes
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from outrider.workers.judging.head import JudgeHead, read_judge, write_judge
from outrider.workers.sequences.sequence import KeptAccount, RequestStats
from outrider.workers.training.judges.labels import iter_labels
from outrider.workers.training.judges.records import SpanRecord, read_records, write_records
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from support.started_engines import StartedEngines

TOKENIZER = tokenizer_of_size(320)  # that of tiny-random
NUM_TASKS = 6


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["judge", *words])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of texts whose mistakes are capital letters."""
    folder = tmp_path_factory.mktemp("judge")
    records = [
        SpanRecord.model_validate(
            {
                "id": f"{number}",
                "domain": "letters",
                "question": f"question {number}",
                "right": f"{chr(97 + number % 20)}bc, d{number}e and so on",
                "wrong": f"{chr(97 + number % 20)}bc{chr(65 + number % 3)}",
                "span": {"start": 3, "end": 4},
                "kind": "capital",
            }
        )
        for number in range(30)
    ]
    write_records(folder / "records.jsonl", records)
    done = invoke(
        "label", "tiny-random", "--out", str(folder / "labels"), "--records", str(folder / "records.jsonl")
    )
    assert done.exit_code == 0, done.output
    assert "60 texts" in done.output
    assert "30 bad tokens" in done.output
    return folder


@pytest.fixture(scope="module")
def trained(labelled: Path) -> Path:
    words = (
        "--labels",
        str(labelled / "labels"),
        "--out",
        str(labelled / "run"),
        "--tasks",
        "letters, for tests",
    )
    done = invoke("train", "tiny-random", *words)
    assert done.exit_code == 0, done.output
    return labelled


def test_labelling_again_changes_nothing_and_other_settings_are_refused(labelled: Path) -> None:
    before = list(iter_labels(labelled / "labels"))
    words = ("label", "tiny-random", "--out", str(labelled / "labels"), "--records")
    assert invoke(*words, str(labelled / "records.jsonl")).exit_code == 0
    assert list(iter_labels(labelled / "labels")) == before
    other = labelled / "other.jsonl"
    other.write_text((labelled / "records.jsonl").read_text().splitlines()[0] + "\n")
    done = invoke(*words, str(other))
    assert (done.exit_code, "begun with other settings: records must be" in done.stderr) == (2, True)


def test_a_judge_comes_with_its_measures_and_where_it_is_from(trained: Path) -> None:
    folder = trained / "run" / "judge"
    _, description = read_judge(folder)
    assert (description.kind, description.tasks) == ("target", ("letters, for tests",))
    assert description.target.hidden_size == 64
    assert description.threshold in [row.threshold for row in description.thresholds]
    record = json.loads((folder / "provenance.json").read_text())
    measured = record["measured"]
    assert set(measured["qualities"]) == {
        "judge",
        "token class",
        "log-prob",
        "entropy",
        "typical",
        "together",
    }
    # A capital letter is told by its embedding alone.
    assert measured["qualities"]["judge"]["auc"] > 0.95
    assert measured["by_kind"]["capital"]["num_harmful"] == measured["num_harmful"] > 0
    assert record["texts_sha256"] == description.provenance["texts_sha256"]
    assert (folder / "curves.png").stat().st_size > 10_000
    # The rows are there: training again reads no model, and comes to the same.
    words = ("--labels", str(trained / "labels"), "--out", str(trained / "run"), "--learned", "mismatches")
    done = invoke("train", "tiny-random", *words)
    assert done.exit_code == 0, done.output
    assert "judge        AUC" in done.output
    assert "not mined" in done.output


def test_a_judge_of_both_models_reads_both(trained: Path) -> None:
    words = (
        "--labels",
        str(trained / "labels"),
        "--out",
        str(trained / "both"),
        "--kind",
        "target_and_draft",
    )
    done = invoke("train", "tiny-random", *words)
    assert done.exit_code == 0, done.output
    head, description = read_judge(trained / "both" / "judge")
    assert (description.kind, head.linear.in_features) == ("target_and_draft", 128)


class RulesEngine:
    """Under exact the target answers all but the last task rightly; lossy rules lose the first one and go faster."""

    def __init__(self, config: Config, num_answers: int) -> None:
        self.config = config
        self.num_left = num_answers
        self.asked: list[GenerationRequest] = []

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        for asked in requests:
            self.num_left -= 1
            if self.num_left < 0:
                raise EngineError("target 0 died")
            self.asked.append(asked)
            yield self._answer(asked)

    def _answer(self, asked: GenerationRequest) -> Completion:
        prompt = TOKENIZER.decode([token for token in asked.prompt if isinstance(token, int)])
        number = int(prompt.split("task ")[1].split()[0])
        is_lossy = asked.acceptance.get("rule", "exact") != "exact"
        is_wrong = number == NUM_TASKS - 1 or (is_lossy and number == 0)
        kept = KeptAccount(num=2) if is_lossy else KeptAccount()
        stats = RequestStats(num_rounds=2 if is_lossy else 4, num_drafted=9, num_accepted=6, kept=kept)
        text = f"The answer is {number + is_wrong}."
        return Completion(tokens=tuple(range(8)), finish_reason="stop", text=text, stats=stats)

    def __enter__(self) -> "RulesEngine":
        return self

    def __exit__(self, *error: object) -> None: ...


Engines = StartedEngines[RulesEngine]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines(RulesEngine)
    monkeypatch.setattr(Engine, "start", engines.start)
    return engines


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    path = tmp_path / "tasks.jsonl"
    rows = [{"question": f"task {number} ?", "answer": f"#### {number}"} for number in range(NUM_TASKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rules_are_measured_on_the_same_tasks_in_turns(
    engines: Engines, tasks: str, trained: Path, tmp_path: Path
) -> None:
    words = ("--tasks", tasks, "--thresholds", "0.5,0.9", "--epsilons", "0.16")
    judge = ("--judge", str(trained / "run" / "judge"))
    out = tmp_path / "out"
    engines.num_answers = 9  # then it dies, in the middle of a block
    cut = invoke("eval", "tiny-random", "--out", str(out), *words, *judge, "--concurrency", "2")
    assert (cut.exit_code, cut.stderr.splitlines()[-1]) == (1, "Error: target 0 died")
    engines.num_answers = 10_000
    done = invoke("eval", "tiny-random", "--out", str(out), *words, *judge, "--concurrency", "2")
    assert done.exit_code == 0, done.output
    first, second = engines.started
    assert (len(first.asked), len(second.asked)) == (9, 4 * NUM_TASKS - 9)
    rules = {json.dumps(dict(asked.acceptance)) for asked in (*first.asked, *second.asked)}
    assert rules == {
        "{}",
        '{"rule": "typical", "epsilon": 0.16, "delta": 0.4}',
        '{"rule": "judge", "judge": "judge", "threshold": 0.5}',
        '{"rule": "judge", "judge": "judge", "threshold": 0.9}',
    }
    bounds = second.config.acceptance
    assert (bounds.min_threshold, bounds.min_epsilon, bounds.min_delta) == (0.5, 0.16, 0.4)
    modes = json.loads((out / "results.json").read_text())["modes"]
    assert [mode["mode"] for mode in modes] == ["exact", "typical 0.16", "judge 0.5", "judge 0.9"]
    exact, *lossy = modes
    assert exact["accuracy"]["value"] == pytest.approx(5 / 6)
    for mode in lossy:
        assert mode["difference"]["value"] == pytest.approx(-1 / 6)
        assert mode["difference"]["low"] < -1 / 6 < mode["difference"]["high"]
        assert (mode["acceptance_length"], mode["relative_length"], mode["kept_fraction"]) == (4.0, 2.0, 0.25)
    table = (out / "results.md").read_text()
    assert "| judge 0.9 | 66.7 % of 6 |" in table
    assert table in done.output
    assert (out / "trade-off.png").stat().st_size > 10_000
    answers = read_outcomes(out)
    assert len({answer.place for answer in answers}) == len(answers) == 4 * NUM_TASKS
    assert {(answer.text, answer.tokens) for answer in answers if answer.mode == "exact"} == {
        (f"The answer is {number + (number == NUM_TASKS - 1)}.", tuple(range(8)))
        for number in range(NUM_TASKS)
    }
    # All answers are there: the report alone is made again.
    assert (
        invoke("eval", "tiny-random", "--out", str(out), *words, *judge, "--concurrency", "2").exit_code == 0
    )
    assert len(engines.started) == 2
    # Another judge: what it has no part in stands.
    other = tmp_path / "other"
    write_judge(other, JudgeHead(64), read_judge(trained / "run" / "judge")[1])
    done = invoke(
        "eval", "tiny-random", "--out", str(out), *words, "--judge", str(other), "--concurrency", "2"
    )
    assert done.exit_code == 0, done.output
    assert {asked.acceptance["rule"] for asked in engines.started[2].asked} == {"judge"}


def test_records_are_made_of_solutions_and_of_programs(tmp_path: Path) -> None:
    solutions = tmp_path / "train.jsonl"
    steps = [f"It is 2+{n} = <<2+{n}={2 + n}>>{2 + n}.\n#### {2 + n}" for n in range(5)]
    rows = [{"question": f"Is it {step}?", "answer": step} for step in steps]
    solutions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    programs = tmp_path / "programs.jsonl"
    program = {
        "text": "Double.",
        "code": "def twice(x):\n    return x * 2",
        "test_list": ["assert twice(3) == 6"],
    }
    programs.write_text(json.dumps(program) + "\n")
    out = tmp_path / "records.jsonl"
    words = ("--out", str(out), "--gsm8k", str(solutions), "--programs", str(programs), "--limit", "3")
    done = invoke("records", *words, "--wrong", "2", "--right", "1")
    assert done.exit_code == 0, done.output
    found = list(read_records(out))
    assert {record.domain for record in found} == {"gsm8k", "code"}
    assert len({record.group for record in found}) == 4
    assert "code, mistake: " in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("label", "tiny-random", "--out", "x"), "judge label must get either --records or --tasks"),
        (("label", "quickstart", "--out", "x", "--tasks", "y"), "draft.model must be set for --tasks"),
        (("label", "tiny-random", "--out", "x", "--tasks", "y"), "--tasks must be a .jsonl file, got 'y'"),
        (("records", "--out", "x.jsonl"), "judge records must get at least one of --gsm8k and --programs"),
        (("train", "tiny-random", "--labels", "nowhere", "--out", "x"), "nowhere must be a directory that"),
        (
            ("train", "quickstart", "--labels", "x", "--out", "x", "--kind", "target_and_draft"),
            "draft.model must",
        ),
        (
            ("eval", "tiny-random", "--tasks", "x", "--out", "x", "--rules", "best"),
            "--rules must be among exact",
        ),
        (
            ("eval", "tiny-random", "--tasks", "x", "--out", "x"),
            "--judge must be given unless acceptance.judges",
        ),
        (
            ("eval", "tiny-random", "--tasks", "x", "--out", "x", "--thresholds", "2"),
            "--thresholds must be more",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words: tuple[str, ...], message: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {message}")
