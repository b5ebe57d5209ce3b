import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from outrider.cluster.cli import bench as bench_command
from outrider.cluster.cli import check as check_command
from outrider.cluster.cli.inputs import ModelFacts
from outrider.cluster.cli.main import app
from outrider.configs.schema import Config
from support.answering_engine import AnsweringEngine
from support.fake_answerer import FakeAnswerer


class ByteTokenizer:
    """Few enough tokens for the fake model."""

    chat_template = ""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [byte % 40 for byte in text.encode()]}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> AnsweringEngine:
    """Commands get this engine instead of one with processes."""
    fake = AnsweringEngine()

    @contextmanager
    def fake_engine(config: Config) -> Iterator[AnsweringEngine]:
        yield fake

    def fake_model(config: Config) -> ModelFacts:
        return ModelFacts(ByteTokenizer(), 40, 2000, (39,))

    for command in (bench_command, check_command):
        monkeypatch.setattr(command, "running_engine", fake_engine)
        monkeypatch.setattr(command, "open_model", fake_model)
    return fake


def outrider(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_bench_prints_a_table_and_writes_json_chart_and_trace(
    engine: AnsweringEngine, tmp_path: Path
) -> None:
    files = {"json": tmp_path / "b.json", "chart": tmp_path / "b.png", "trace": tmp_path / "t.json"}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    result = outrider(
        "bench", "tiny-random", "--max-tokens", "8", "--limit", "2", "--concurrency", "1,2", *options
    )
    assert result.exit_code == 0, result.output
    assert "outrider = plain: the same tokens on 2 of 2 prompts" in result.output
    document = json.loads(files["json"].read_text())
    labels = [summary["label"] for summary in document["summaries"]]
    assert labels == ["outrider", "plain", "outrider x2", "plain x2"]
    assert document["peak_memory_bytes"] == {"draft": 2**20, "target 0": 2**21}
    assert document["settings"]["config"]["rounds"]["prefix_sharing"] is False
    assert files["chart"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["trace"].read_text())["traceEvents"]


def test_bench_uses_the_data_and_the_sampling_it_is_told(engine: AnsweringEngine, tmp_path: Path) -> None:
    data = tmp_path / "mine.txt"
    data.write_text("one\ntwo\nthree\n")
    result = outrider(
        *["bench", "tiny-random", "--data", str(data), "--max-tokens", "4", "--temperature", "0.5"],
        *["--seed", "7", "--against", "", "--repeats", "2"],
    )
    assert result.exit_code == 0, result.output
    _warm_up, *measured = engine.requests
    assert len(measured) == 6
    assert {(r.sampling["temperature"], r.sampling["seed"], r.sampling["max_tokens"]) for r in measured} == {
        (0.5, 7, 4)
    }


def test_bench_compares_mixes_of_methods(engine: AnsweringEngine) -> None:
    result = outrider(
        *["bench", "tiny-random", "draft.methods=[ngram,model]", "draft.model=random:llama"],
        *["--methods", "ngram, model+ngram", "--against", "plain", "--limit", "1", "--max-tokens", "4"],
    )
    assert result.exit_code == 0, result.output
    drafts = [dict(request.draft) for request in engine.requests[-3:]]
    assert drafts == [{"methods": ["ngram"]}, {"methods": ["model", "ngram"]}, {"max_nodes": 0}]


def test_bench_asks_for_a_lossy_rule_where_it_drafts(engine: AnsweringEngine, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    result = outrider(
        *["bench", "tiny-random", "acceptance.rules=[exact,typical]", "--limit", "1", "--max-tokens", "4"],
        *["--rule", "typical", "--delta", "0.5", "--json", str(path)],
    )
    assert result.exit_code == 0, result.output
    lossy = {"rule": "typical", "delta": 0.5}
    assert [dict(request.acceptance) for request in engine.requests[-2:]] == [lossy, {}]
    settings = json.loads(path.read_text())["settings"]
    assert settings["acceptance"] == lossy
    assert "typical 0.5" in settings["title"]


def test_prompts_that_do_not_fit_are_left_out_and_counted(engine: AnsweringEngine, tmp_path: Path) -> None:
    data = tmp_path / "mine.txt"
    data.write_text("short\n" + "long " * 500 + "\n")
    result = outrider("bench", "tiny-random", "--data", str(data), "--max-tokens", "4")
    assert result.exit_code == 0, result.output
    assert "left out: 1 prompts" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "plian"], "--against must be among"),
        (["--methods", "ngram,medusa", "draft.methods=[ngram]"], "--methods must be mixes of draft.methods"),
        (["--concurrency", "1,zero"], "--concurrency must be"),
        (["--data", "nowhere.jsonl"], "--data must be"),
        (["--json", "nowhere/bench.json"], "must be in a folder that exists"),
        (["--chart", "bench.doc"], "--chart must end with"),
        (["--top-p", "2"], "sampling.top_p must be"),
        (["--rule", "typical"], "acceptance.rule must be among the deployment's acceptance.rules (exact)"),
        (["--category", "poetry"], "--category must be one of"),
        (
            ["--against", "transformers-assisted", "draft.methods=[ngram]", "draft.model="],
            "draft.model must be",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    engine: AnsweringEngine, arguments: list[str], message: str
) -> None:
    result = outrider("bench", "tiny-random", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert engine.requests == []


def check(engine: AnsweringEngine, *arguments: str) -> Result:
    return outrider("check", "tiny-random", "--max-tokens", "8", "--limit", "3", "--draws", "200", *arguments)


def test_check_passes_an_honest_engine(engine: AnsweringEngine) -> None:
    result = check(engine)
    assert result.exit_code == 0, result.output
    assert "T = 0: 3 of 3 texts equal" in result.output
    assert "T = 0.8: 6 of 6 texts equal" in result.output
    assert "chi-square p =" in result.output
    assert "PASS" in result.output


def test_check_fails_an_engine_whose_texts_differ(engine: AnsweringEngine) -> None:
    engine.answerer = FakeAnswerer(lie_at=3)
    result = check(engine)
    assert result.exit_code == 1
    assert "token 3" in result.output
    assert "FAIL: speculative decoding gives other text" in result.output
    assert "PASS" not in result.output


def test_check_fails_an_engine_that_samples_another_law(engine: AnsweringEngine) -> None:
    engine.answerer = FakeAnswerer(sharpness=3.0)
    result = check(engine)
    assert result.exit_code == 1
    assert "FAIL: first tokens do not follow" in result.output


def test_check_counts_ties(engine: AnsweringEngine) -> None:
    engine.answerer = FakeAnswerer(num_repeats=2, rounding=1e-6)
    result = check(engine)
    assert result.exit_code == 0, result.output
    assert "T = 0: 0 of 3 texts equal" in result.output
    assert "3 parted at a tie" in result.output


def test_check_warns_when_nothing_was_drafted(engine: AnsweringEngine) -> None:
    engine.answerer = FakeAnswerer(drafts=False)
    result = check(engine)
    assert result.exit_code == 0
    assert "Nothing was accepted" in result.output


def test_check_wants_a_temperature_for_the_sampled_half(engine: AnsweringEngine) -> None:
    result = check(engine, "--temperature", "0")
    assert result.exit_code == 2
    assert "--temperature must be above 0" in result.output
