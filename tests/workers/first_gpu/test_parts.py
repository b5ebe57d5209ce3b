"""The check of the first GPU runs, as far as a machine without one can tell: all parts tiny on the CPU, and the parts
of one process on a pretended GPU whose kernels the source executor runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.configs.schema import Config
from outrider.kernels.kernel_cases import kernel_cases
from outrider.kernels.selection import KernelSelection
from outrider.kernels.self_test import ENTRIES
from outrider.workers.drafting import feature_levels
from outrider.workers.first_gpu import __main__ as command
from outrider.workers.first_gpu import (
    deployments,
    hidden_drafters,
    large_model,
    machine,
    one_attention,
    quantised,
)
from outrider.workers.first_gpu.__main__ import PARTS, TITLES, main, missing_wheels, run_part
from outrider.workers.first_gpu.grown_drafts import grown_drafts
from outrider.workers.first_gpu.large_model import RepeatedSource
from outrider.workers.first_gpu.narrow import LAYOUTS
from outrider.workers.first_gpu.ncu import read_metrics
from outrider.workers.first_gpu.random_heads import write_heads
from outrider.workers.first_gpu.report import PartReport, Row, read_all, summary, write
from outrider.workers.first_gpu.setting import FULL, TINY, Setting
from outrider.workers.model import cuda_graphs
from outrider.workers.model.linear import ProductKernels
from outrider.workers.model.quantized import scaled_mm_works
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.tiled_int4 import tinygemm_works
from outrider.workers.sequences.sequence import Request, RequestStats, TokenEvent, TokenLogprobs
from outrider.workers.weights.random_source import RandomSource
from support.counted_gpu import counted_gpu, moved
from support.cuda_on_cpu.kernels import source_kernels

CPU = torch.device("cpu")
MEMCHECK = "========= ERROR SUMMARY: {} errors"
NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","tree_attention_bf16_d128_rows128","GPU Speed Of Light Throughput","Duration","us","212.3"
"0","7","tree_attention_bf16_d128_rows128","GPU Speed Of Light Throughput","DRAM Throughput","%","7.5"
"0","7","tree_attention_bf16_d128_rows128","Launch Statistics","Grid Size","","6"
==PROF== Disconnected"""


class StandInGpu:
    name = "stand-in"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def launch(self, plans: Any) -> None:
        source_kernels().launch(plans)

    def synchronize(self) -> None:
        pass

    def capture(self, plans: Any) -> Any:
        return SimpleNamespace(replay=lambda: self.launch(plans))

    def median_time_s(self, plans: Any) -> float:
        return 1e-3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def verdicts(report: PartReport) -> dict[str, str]:
    assert report.traceback == ""
    return {row.what: row.verdict for row in report.rows}


@pytest.mark.parametrize("number", [4, 5, 6, 7, 8, 9, 11, 12])
def test_a_part_runs_on_a_cpu(number: int, tmp_path: Path) -> None:
    report = run_part(number, Setting(CPU, TINY, tmp_path))
    assert len(report.rows) > 1
    assert "FAILED" not in verdicts(report).values(), report.rows
    assert (tmp_path / "trace.json").exists() == (number == 9)


def test_the_kernel_cases_run_where_somebody_launches_them(tmp_path: Path) -> None:
    setting = Setting(CPU, TINY, tmp_path, StandInGpu, kernel_cases()[-3:])
    assert set(verdicts(run_part(2, setting)).values()) == {"passed"}
    assert verdicts(run_part(2, Setting(CPU, TINY, tmp_path))) == {"kernel cases": "not run"}


def test_versions_and_compilers_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.kernels.compiler.SOURCES", ("gather_rows",))
    found = verdicts(run_part(1, Setting(CPU, TINY, tmp_path)))
    assert (found["torch"], found["compile gather_rows for sm_90a"]) == ("measured", "passed")
    assert found["self-test"] == "not run"


def install_tool(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("errors", "code", "verdict"), [(0, 0, "passed"), (2, 9, "FAILED"), (0, 1, "FAILED")], ids=str
)
def test_what_the_sanitizer_says_counts(
    errors: int, code: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tool(
        tmp_path, "compute-sanitizer", f"echo $@; echo '{MEMCHECK.format(errors)}'; exit {code}", monkeypatch
    )
    found = verdicts(run_part(3, Setting(CPU, TINY, tmp_path)))
    assert found == {f"memcheck: {', '.join(ENTRIES)}": verdict, "racecheck: tree_attention": verdict}
    said = (tmp_path / "racecheck.txt").read_text()
    assert "--tool racecheck --report-api-errors no --error-exitcode 9" in said
    assert "-m outrider.kernels.self_test 0 tree_attention" in said


def test_what_ncu_measures_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_metrics(NCU) == {"Duration": "212.3 us", "DRAM Throughput": "7.5 %", "Grid Size": "6"}
    install_tool(tmp_path, "ncu", f"cat <<'END'\n{NCU}\nEND", monkeypatch)
    report = run_part(10, Setting(CPU, TINY, tmp_path))
    assert [row.measured for row in report.rows] == ["needs a GPU", "212.3 us", "7.5 %", "6"]
    install_tool(tmp_path, "ncu", "echo '==ERROR== no permission'; exit 1", monkeypatch)
    _, row = run_part(10, Setting(CPU, TINY, tmp_path)).rows
    assert (row.verdict, row.measured) == ("FAILED", "exit code 1: ==ERROR== no permission")


def test_attention_alone_is_timed_with_what_is_chosen_and_what_could_be(tmp_path: Path) -> None:
    rows = one_attention.attention_times(Setting(CPU, TINY, tmp_path, StandInGpu))
    assert len(rows) == 7 * len(TINY.attended)
    assert [row.what for row in rows if "chosen" in row.what] == [
        "3 rows, 1 sequences, context 50, all layers: chosen (64 rows a tile, wave of 4, 128 keys)",
        "8 rows, 4 sequences, context 30, all layers: chosen (64 rows a tile, wave of 4, 128 keys)",
    ]


def test_the_launch_that_ncu_looks_at_can_be_made() -> None:
    assert one_attention.attend(CPU, 5, 40, torch.float32, use_kernel=False).shape == (5, 16, 128)


def test_the_timed_rank_is_rank_0_of_a_70b_over_7() -> None:
    plan = ShardPlan(FULL.large, 0, FULL.num_ranks)
    columns = plan.mlp_columns(FULL.large.layers[0].mlp.intermediate_size)
    sizes = (plan.num_query_places, plan.num_kv_heads, len(columns), len(plan.vocab))
    assert sizes == (16, 2, 4096, 18368)
    source = RepeatedSource(FULL.large)
    norm = source.read("model.norm.weight", slice(None), slice(None), torch.bfloat16)
    assert torch.equal(norm, torch.ones(8192).bfloat16())
    part = source.read("model.layers.3.mlp.down_proj.weight", slice(0, 300), slice(0, 4096), torch.bfloat16)
    assert part.shape == (300, 4096)
    assert part.float().std() < 0.02


@contextmanager
def gpu_with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A pretended GPU on which kernels run, graphs replay and nothing takes time."""
    for name, value in (
        ("get_device_name", lambda device: "NVIDIA H100 80GB HBM3"),
        ("get_device_capability", lambda device: (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "TARGET_ROWS", (8,))
    with counted_gpu(monkeypatch) as gpu:
        yield gpu.device


def test_trees_that_grow_alone_are_timed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_heads(RandomSource(Setting(CPU, ON_GPU, tmp_path).model_spec()), tmp_path)
    monkeypatch.setattr(cuda_graphs, "DRAFT_ROWS", (8, 64))
    monkeypatch.setattr(feature_levels, "kernels_for", lambda *_: KernelSelection.of(ENTRIES))
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch.nn.Module, "requires_grad_", lambda module, _: module)
    with gpu_with_kernels(monkeypatch) as device:
        rows = grown_drafts(Setting(device, ON_GPU, tmp_path), folders["eagle3"])
    assert [row.verdict for row in rows] == ["measured", "measured", "passed"] * 2, rows


# Heads of 64, which the kernels take.
ON_GPU = replace(
    TINY,
    small="hidden_size=64&num_layers=1&num_heads=2&num_kv_heads=1&head_dim=64",
    large=replace(TINY.large, layers=TINY.large.layers[:1], head_dim=64),
    rows=(8,),
    replays=1,
)


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
# 11 takes as long as the rest.
@pytest.mark.parametrize(
    ("number", "expected"), [(1, 8), (4, 6), (7, 11), (8, 12), pytest.param(11, 43, marks=pytest.mark.slow)]
)
def test_a_part_of_one_process_runs_on_a_gpu(
    number: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "self_test", lambda index, names: {name: [] for name in names})
    monkeypatch.setattr("outrider.kernels.compiler.SOURCES", ("gather_rows",))
    # One of each class of products: FP8, three of them side by side, and dequantised ones.
    monkeypatch.setattr(quantised, "LAYOUTS", (*LAYOUTS[1:3], LAYOUTS[5]))
    with gpu_with_kernels(monkeypatch) as device:
        report = run_part(number, Setting(device, ON_GPU, tmp_path))
    found = verdicts(report)
    assert {"FAILED", "not run"}.isdisjoint(found.values()), report.rows
    assert len(found) >= expected
    assert report.device == "NVIDIA H100 80GB HBM3"
    if number == 7:
        beside = {row.what: row.beside for row in report.rows}
        assert beside["matrix products: 3 rows, 1 sequences, context 20"] == "planned 8 ms, least 6 ms"
        assert beside["attention: 3 rows, 1 sequences, context 50"] == "planned 1.2 ms, least 0.2 ms"


def test_a_layout_that_a_gpu_should_multiply_and_does_not_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pretended GPU computes on the CPU, where torch has neither scales by group nor int4 in tiles.
    small = replace(ON_GPU, small="hidden_size=256&num_layers=1&num_heads=2&num_kv_heads=1")
    scaled_mm_works.cache_clear()
    tinygemm_works.cache_clear()
    with gpu_with_kernels(monkeypatch) as device:
        setting = Setting(device, small, tmp_path)
        rows = [
            row
            for layout in LAYOUTS
            for kernels in (quantised.product_kernels(setting), ProductKernels())[
                : 2 if layout.bits == 4 else 1
            ]
            for row in quantised.attempted(
                layout.name, partial(quantised.products_beside_cpu, setting, layout, kernels)
            )
        ]
    scaled_mm_works.cache_clear()
    tinygemm_works.cache_clear()
    assert {row.what: row.measured for row in rows if row.verdict == "FAILED"} == {
        "FP8 by block of 128, kept as": "RoundedLinear in place of ScaledMmLinear",
        "int4 in groups of 32, kept as": "torch's product does not take the layout",
        "int4 in groups of 128, kept as": "torch's product does not take the layout",
    }
    told = [row.measured for row in rows if row.what.endswith(", warning")]
    assert [text.split(": ")[0] for text in told] == [
        "FP8 is not multiplied on cuda:0, but dequantised",
        "torch does not multiply int4 on cuda:0",
    ]
    by_kernel = {f"int4 in groups of {group}, 8 rows{how}" for group in (32, 128) for how in ("", ", graph")}
    assert {row.what for row in rows if row.verdict == "passed"} >= by_kernel


def test_an_exception_in_one_layout_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    one = replace(LAYOUTS[0], name="broken", narrow=broken)
    monkeypatch.setattr(quantised, "LAYOUTS", (one, LAYOUTS[5]))
    found = verdicts(run_part(11, Setting(CPU, TINY, tmp_path)))
    assert [what for what, verdict in found.items() if verdict == "FAILED"] == [
        "broken: products",
        "broken: model",
        "broken: times",
    ]
    assert found["int8 by row: products, 8 rows"] == "passed"
    assert found["int8 by row: times, layers' products of a round, 8 rows"] == "measured"


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
def test_rounds_are_profiled_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu_with_kernels(monkeypatch) as device:
        rows = deployments.profiled_rounds(Setting(device, ON_GPU, tmp_path))
    assert {row.what.split(":")[0] for row in rows} == {"host"}  # no kernel was seen on a device


def test_the_samplers_of_a_gpu_and_of_the_host_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu_with_kernels(monkeypatch) as device:
        rows = hidden_drafters.samplers(Setting(device, ON_GPU, tmp_path))
    assert len(rows) == 2 * len(hidden_drafters.LAWS)
    assert {row.verdict for row in rows} == {"passed"}, rows


class FakeDeployment:
    """Says the same whatever drafts, until somebody asks for what is broken."""

    def __init__(self, broken: str, log: list[tuple[str, ...]]) -> None:
        self.broken, self.log = broken, log
        self.runs: list[Future[None]] = [Future()]

    def generate(self, requests: list[Request]) -> dict[str, list[TokenEvent]]:
        methods = requests[0].draft.methods
        self.log.append(methods)
        if self.broken in methods:
            self.runs[0].set_exception(RuntimeError("device-side assert triggered"))
            raise AssertionError("nothing came for ten seconds")
        stats = RequestStats(num_rounds=2, num_drafted=3, num_accepted=1)
        said = [] if methods == ("mtp",) else [TokenLogprobs(-0.5, ())]
        text = (5,) if methods == ("medusa",) else (4,)
        return {r.id: [TokenEvent(r.id, text, (), tuple(said), "length", "", stats)] for r in requests}

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("when", ["while it runs", "at its start"])
def test_a_drafter_that_breaks_is_named_and_the_others_are_compared(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, ...]] = []

    @contextmanager
    def fake_deployed(config: Config, *_: object) -> Iterator[FakeDeployment]:
        if when == "at its start" and "eagle3" in config.draft.methods:
            raise ValueError("draft.eagle3.model: no such tensor")
        yield FakeDeployment("eagle3", log)

    monkeypatch.setattr(hidden_drafters, "deployed", fake_deployed)
    found = {
        row.what.removesuffix(", float32, SDPA"): row
        for row in hidden_drafters.hidden_drafters(Setting(CPU, TINY, tmp_path))
    }
    assert {name for name, row in found.items() if row.verdict == "passed"} == {"parallel"}
    told = "device-side assert triggered" if when == "while it runs" else "no such tensor"
    for name in ("eagle3", "all of them and ngram", "typical acceptance, all"):
        assert (found[name].verdict, told in found[name].measured) == ("FAILED", True)
    assert "0 of 10 texts are the same" in found["medusa"].measured
    assert "log-probabilities are inf nats off" in found["mtp"].measured
    assert {("medusa",), ("mtp",), ("parallel",)} <= set(log)


def test_a_part_that_raises_and_one_that_lacks_a_wheel_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setting: Setting) -> list[Row]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(large_model, "products", broken)
    report = run_part(8, Setting(CPU, TINY, tmp_path))
    assert report.rows[0].measured == "RuntimeError: an illegal memory access was encountered"
    assert report.failed
    assert "in broken" in report.traceback
    lacking = replace(PARTS[7], needs=("psutil", "no_such_wheel", "cuda.no_such_part"))
    assert missing_wheels(lacking, on_gpu=False) == ["no_such_wheel", "cuda.no_such_part"]
    monkeypatch.setattr(command, "PARTS", (lacking,))
    (row,) = run_part(1, Setting(CPU, TINY, tmp_path)).rows
    assert row.verdict == "not run"
    assert "pip install --target FOLDER no_such_wheel" in row.measured


def test_the_summary_puts_the_parts_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (Row("a", "1 ms", "measured", "planned 2 ms", (("time_ms", 1.0),)), Row("b", "off", "FAILED"))
    report = PartReport(7, TITLES[6], "H100", 12.0, rows)
    write(report, tmp_path)
    assert read_all(tmp_path) == [report]
    text = summary([report], TITLES)
    assert "7. replays of rank 0 of a 70B over 7: 1 FAILED, 1 measured (12 s on H100)" in text
    assert "8. matrix products and sampling of that rank: not run" in text
    assert "death of a rank during a replay" in text
    assert main(["summary", "--folder", str(tmp_path), "--device", "cpu"]) == 1
    assert "planned 2 ms" in capsys.readouterr().out
    whole = json.loads((tmp_path / "summary.json").read_text())
    assert whole["failed"]
    assert whole["parts"][0]["rows"][0]["values"] == [["time_ms", 1.0]]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "10  attention alone: times, ncu" in capsys.readouterr().out
