import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from outrider.cluster.bench.chart import write_chart
from outrider.cluster.bench.machine import describe_machine
from outrider.cluster.bench.metrics import agreements, summarise
from outrider.cluster.bench.report import BenchReport, show, write_json
from outrider.cluster.bench.runner import EncodedPrompt, Plan, run_turns
from outrider.workers.sequences.params import SamplingParams
from support.fake_decoder import FakeDecoder

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def report() -> BenchReport:
    decoders = [
        FakeDecoder("outrider", tokens_per_step=3),
        FakeDecoder("plain"),
        FakeDecoder("transformers", is_concurrent=False),
    ]
    prompts = [EncodedPrompt(f"p{index}", "qa" if index else "math", (index,)) for index in range(3)]
    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    turns = run_turns(decoders, prompts, sampling, Plan((1, 2), repeats=1))
    return BenchReport(
        machine=describe_machine(),
        settings={"title": "fake"},
        summaries=summarise(turns),
        agreements=agreements(turns, ()),
        peak_memory_bytes={"target 0": 123_000_000, "transformers": 456_000_000},
        turns=turns,
    )


def test_the_table_names_modes_factors_workers_and_agreement(report: BenchReport) -> None:
    console = Console(file=io.StringIO(), width=160)
    show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (
        "outrider x2",
        "x: against transformers",
        "target 0",
        "123",
        "transformers: 456 MB at most",
        "not in a model: sample",
        "math",
        "outrider = plain: the same tokens on 3 of 3 prompts",
    ):
        assert expected in text
    assert "nan" not in text


def test_the_json_is_strict_and_complete(report: BenchReport, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_json(report, path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert {summary["label"] for summary in document["summaries"]} >= {"outrider", "plain x2", "transformers"}
    plain = next(summary for summary in document["summaries"] if summary["label"] == "plain")
    assert plain["acceptance_rate"] is None
    assert plain["acceptance_length"] == 1.0
    machine = document["machine"]
    assert machine["num_cpus"] >= 1
    assert set(machine["versions"]) >= {"python", "torch", "transformers"}
    assert document["turns"][0]["runs"][0]["answer"]["tokens"]


def test_the_chart_is_a_picture(report: BenchReport, tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    write_chart(report, path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_a_report_without_worker_statistics_or_drafts_can_be_drawn(tmp_path: Path) -> None:
    class Silent(FakeDecoder):
        def busy_seconds(self) -> dict[str, dict[str, float]]:
            return {}

    turns = run_turns(
        [Silent("transformers")],
        [EncodedPrompt("p", "qa", (1,))],
        SamplingParams(temperature=0.0, max_tokens=2),
        Plan((1,), repeats=1),
    )
    report = BenchReport({}, {}, summarise(turns), [], {}, turns)
    write_chart(report, tmp_path / "bench.png")
    show(report, Console(file=io.StringIO()))
