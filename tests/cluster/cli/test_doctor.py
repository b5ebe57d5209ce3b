"""`outrider doctor`, on a machine without a GPU and with reports in place of one."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outrider.cluster.cli import doctor
from outrider.cluster.cli.main import app
from outrider.kernels.gpu_check import CaseReport, GpuReport
from outrider.workers.doctor import driver_version

CASE = CaseReport("gather_rows: x", "gather_rows", (), {"out": 0.0}, 100, 0, 2e-6, 1e-6)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "num_gpus", lambda: 0)


def with_reports(monkeypatch: pytest.MonkeyPatch, *reports: GpuReport) -> None:
    monkeypatch.setattr(doctor, "num_gpus", lambda: len(reports))
    monkeypatch.setattr(doctor, "check_gpus", lambda: list(reports))


@pytest.mark.parametrize(
    ("said", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build", "580.159.04"),
        ("NVRM version: something else", "unknown"),
    ],
)
def test_the_drivers_version_is_read(said: str, version: str) -> None:
    assert driver_version(said) == version


def test_without_a_gpu_it_says_so_and_is_content(no_gpu: None) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert doctor.NO_GPU in result.stdout
    for name in ("memory", "torch", "transports", "ray", "NVRTC", "network", "attention", "all-reduce"):
        assert f"  {name} " in result.stdout


def test_without_a_gpu_there_is_nothing_to_check(no_gpu: None) -> None:
    result = CliRunner().invoke(app, ["doctor", "--gpu"])
    assert result.exit_code == 2
    assert doctor.NO_GPU in result.stdout


def test_the_gpu_report_is_printed_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_reports(monkeypatch, GpuReport("GPU A", True, (CASE,)))
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 0
    assert "GPU A: passed" in result.stdout
    assert "gather_rows: x: 2.0 us, at least 1.00" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())[0]["cases"][0]["num_repeats"] == 100


def test_a_failed_check_is_shown_and_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = CaseReport("x", "x", ("out is off by 2",), {}, 0, 0, 0.0, 0.0)
    with_reports(monkeypatch, GpuReport("A", True, (CASE,)), GpuReport("B", False, (failed,)))
    result = CliRunner().invoke(app, ["doctor", "--gpu", "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert "out is off by 2" in result.stdout


def test_with_a_gpu_the_plain_form_points_to_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    with_reports(monkeypatch, GpuReport("A", True, ()))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "outrider doctor --gpu" in result.stdout
