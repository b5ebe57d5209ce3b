"""Jobs on a stand-in of Ray's client: what is sent, what is shown, how it ends."""

import asyncio
import os
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

import outrider
from outrider.cluster.api import EngineError
from outrider.cluster.cli.main import app
from outrider.cluster.jobs import client
from outrider.cluster.jobs.client import Jobs


@dataclass
class Details:
    """What Ray knows of a job."""

    status: JobStatus
    driver_exit_code: int | None = None
    message: str = "said by Ray\nand more"


@dataclass
class FakeServer:
    """The job server: one job, whose log is `chunks`; the connection breaks once behind `breaks_after` of them."""

    chunks: list[str] = field(default_factory=lambda: ["one\n", "two\n", "three\n"])
    breaks_after: int = 0
    end: Details = field(default_factory=lambda: Details(JobStatus.SUCCEEDED, 0))
    sent: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    version: str = ""
    ended: bool = False

    def submit_job(self, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        self.sent = {"entrypoint": entrypoint, "submission_id": submission_id, **runtime_env}
        folder = Path(runtime_env["working_dir"])
        self.files = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        (package,) = map(Path, runtime_env["py_modules"])
        self.version = (package / "__init__.py").read_text()
        return submission_id

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        breaks_after, self.breaks_after = self.breaks_after, 0
        for number, chunk in enumerate(self.chunks):
            if breaks_after and number == breaks_after:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield chunk
            await asyncio.sleep(0)
        self.ended = True

    def get_job_info(self, job_id: str) -> Details:
        return self.end if self.ended else Details(JobStatus.RUNNING)

    def get_job_logs(self, job_id: str) -> str:
        return "".join(self.chunks)

    def stop_job(self, job_id: str) -> bool:
        raise RuntimeError(
            f"Request failed with status code 404: Job {job_id} does not exist.\nTraceback ..."
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    monkeypatch.setattr(client, "JobSubmissionClient", lambda address: fake)
    monkeypatch.setattr(client, "_POLL_S", 0.001)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    return fake


def submit(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["submit", "tiny-random", "cluster.ray_auth=disabled", *arguments])


def test_a_job_gets_the_configuration_its_files_and_the_package(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    command = ["outrider", "batch", "outrider.yaml", "--input", "a b"]
    result = submit("target.tp_size=2", "--working-dir", str(tmp_path), "--no-wait", "--", *command)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{server.sent['submission_id']}\n"
    assert server.sent["entrypoint"] == "python -m outrider batch outrider.yaml --input 'a b'"
    assert server.files.keys() == {"prompts.jsonl", "outrider.yaml"}
    config = yaml.safe_load(server.files["outrider.yaml"])
    assert config["target"]["tp_size"] == 2
    assert config["cluster"]["ray_address"] == "auto"
    assert server.sent["py_modules"] == [str(Path(outrider.__file__).parent)]


def test_other_programs_are_run_as_they_are_named(server: FakeServer) -> None:
    submit(
        "cluster.ray_address=10.0.0.1:6379", "--id", "mine", "--no-wait", "--", "python", "a.py", "--", "b=c"
    )
    assert server.sent["entrypoint"] == "python a.py -- b=c"
    assert server.sent["submission_id"] == "mine"
    assert yaml.safe_load(server.files["outrider.yaml"])["cluster"]["ray_address"] == "10.0.0.1:6379"


@pytest.mark.parametrize("breaks_after", [0, 2])
def test_a_log_is_shown_once_also_where_the_connection_breaks(server: FakeServer, breaks_after: int) -> None:
    server.breaks_after = breaks_after
    result = submit("--", "true")
    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        (Details(JobStatus.FAILED, 7), 7),
        (Details(JobStatus.FAILED, -9), 137),
        (Details(JobStatus.FAILED), 1),
        (Details(JobStatus.STOPPED), 1),
    ],
)
def test_the_exit_code_is_the_commands(server: FakeServer, end: Details, exit_code: int) -> None:
    server.end = end
    result = submit("--", "true")
    assert result.exit_code == exit_code
    assert result.stderr.endswith(f"job {end.status.value}: said by Ray\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-- COMMAND must stand at the end"),
        (["--"], "-- COMMAND must stand at the end"),
        (["--wheel", "nowhere.whl", "--", "true"], "--wheel must be a wheel, got 'nowhere.whl'"),
        (["--wheel", __file__, "--", "true"], "--wheel must be a wheel"),
        (["--working-dir", "nowhere", "--", "true"], "--working-dir must be a folder"),
    ],
)
def test_what_cannot_be_sent_is_refused(server: FakeServer, arguments: list[str], message: str) -> None:
    result = submit(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")


def test_a_folder_that_has_an_outrider_yaml_is_refused(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "outrider.yaml").write_text("")
    result = submit("--working-dir", str(tmp_path), "--", "true")
    assert result.stderr.startswith("Error: --working-dir must have no outrider.yaml")


def test_rays_errors_are_told_in_a_line(server: FakeServer) -> None:
    with pytest.raises(EngineError, match=r"^Request failed with status code 404: Job x does not exist\.$"):
        Jobs(None).stop("x")


def wheel_of(path: Path, package: str) -> str:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "another")
        wheel.writestr(f"{package}/__main__.py", "")
    return str(path)


def test_a_wheel_takes_the_place_of_the_package(server: FakeServer, tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path / "outrider-1-py3-none-any.whl", "outrider")
    assert submit("--wheel", wheel, "--no-wait", "--", "true").exit_code == 0
    assert server.sent["py_modules"][0].endswith("/outrider")
    assert server.version == "another"
    result = submit("--wheel", wheel_of(tmp_path / "x.whl", "inrider"), "--", "true")
    assert result.stderr.startswith("Error: --wheel must be one of outrider")
