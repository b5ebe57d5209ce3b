"""A judge made by the commands, in service: labels, training and evaluation on real processes."""

import json
from pathlib import Path

from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from outrider.workers.training.judges.records import SpanRecord, write_records

NUM_TASKS = 4


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, ["judge", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_judge_is_labelled_trained_and_measured_and_at_threshold_1_it_is_exact(tmp_path: Path) -> None:
    records = [
        SpanRecord.model_validate(
            {
                "id": f"{number}",
                "domain": "letters",
                "question": f"question {number}",
                "right": f"{chr(97 + number)}bc, d{number}e",
                "wrong": f"{chr(97 + number)}bc{chr(65 + number % 3)}",
                "span": {"start": 3, "end": 4},
                "kind": "capital",
            }
        )
        for number in range(20)
    ]
    write_records(tmp_path / "records.jsonl", records)
    labels, run, out = (str(tmp_path / name) for name in ("labels", "run", "out"))
    invoke("label", "tiny-random", "--out", labels, "--records", str(tmp_path / "records.jsonl"))
    invoke("train", "tiny-random", "--labels", labels, "--out", run)
    rows = [{"question": f"task {number}", "answer": f"#### {number}"} for number in range(NUM_TASKS)]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--out", out, "--judge", f"{run}/judge", "--thresholds", "0.01,1", "--epsilons", "0.09")
    # A measured budget would draft as much as pays at the moment: lengths of the same texts would differ.
    more = ("--concurrency", "4", "--max-tokens", "24")
    invoke("eval", "tiny-random", "tree.budget=fixed", "--tasks", str(tasks), *words, *more)
    exact, typical, loose, strict = json.loads((tmp_path / "out" / "results.json").read_text())["modes"]
    assert strict["kept_fraction"] == 0.0
    assert strict["accuracy"] == exact["accuracy"]
    for lossy in (typical, loose):
        assert lossy["kept_fraction"] >= 0.0
    assert loose["kept_fraction"] > 0.0
    assert loose["acceptance_length"] > exact["acceptance_length"]
    assert exact["num_tasks"] == NUM_TASKS
    assert not any(mode["num_errors"] for mode in (exact, typical, loose, strict))
