"""Several benchmarks in one table."""

import json
from pathlib import Path

import pytest

from outrider.cluster.bench.table import markdown, read_bench_file


def written(path: Path, data: str, temperature: float, rates: dict[str, float]) -> Path:
    summaries = [
        {"mode": mode, "concurrency": 1, "tokens_per_s": rate, "acceptance_length": rate / 10}
        for mode, rate in rates.items()
    ]
    settings = {"data": data, "num_prompts": 8, "sampling": {"temperature": temperature}}
    path.write_text(json.dumps({"settings": settings, "summaries": summaries}))
    return path


def test_every_mode_is_a_row_and_is_compared_within_its_own_run(tmp_path: Path) -> None:
    rates = {"ngram": 30.0, "plain": 20.0, "transformers": 10.0, "transformers-lookup": 12.0}
    one = written(tmp_path / "a.json", "x/spec_bench.jsonl", 0.0, rates)
    two = written(tmp_path / "b.json", "x/spec_bench.jsonl", 0.8, {"ngram+eagle3": 50.0, "plain": 25.0})
    lines = markdown([read_bench_file(str(one)), read_bench_file(f"low rank={two}")]).splitlines()
    assert lines[0] == "| drafts | spec_bench, 8 prompts, greedy | spec_bench, 8 prompts, T = 0.8 |"
    assert lines[2:] == [
        "| ngram | 3.00 / 1.50x / 2.50x | - |",
        "| ngram+eagle3 (low rank) | - | 5.00 / 2.00x / - |",
    ]


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match=r"c\.json must be a file that `outrider bench --json` wrote"):
        read_bench_file(str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match="No such file"):
        read_bench_file(f"name={tmp_path}/none.json")
