"""The commands of docs/deploy.md: those that write files are run, those that need a cluster are run without one."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from outrider.cluster.jobs import client
from outrider.cluster.jobs.client import JobEnd
from outrider.configs import schema
from outrider.configs.schema import Config

TEXT = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text(encoding="utf-8")


def commands(words: str) -> list[str]:
    """Lines of its blocks that begin so."""
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(f"{words} ")]


@pytest.mark.parametrize("command", commands("outrider deploy"))
def test_files_are_written_as_the_document_says(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    place = words.index("--out") + 1
    out = tmp_path / words[place]
    words[place] = str(out)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert all(yaml.safe_load_all(out.read_text()))


class NoJobs:
    """A job server that every job ends well on."""

    def __init__(self, address: str | None, auth: str | None = None) -> None:
        pass

    def submit(self, *job: object) -> str:
        return "mine"

    def follow(self, job_id: str, show: object) -> JobEnd:
        return JobEnd("SUCCEEDED", 0, "")

    def stop(self, job_id: str) -> JobEnd:
        return JobEnd("STOPPED", 1, "")

    def details(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=JobStatus.SUCCEEDED, message="")

    def all(self) -> list[SimpleNamespace]:
        return []


@pytest.mark.parametrize("command", [*commands("outrider submit"), *commands("outrider job")])
def test_commands_for_clusters_are_ones_that_there_are(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/e2e/test_cluster.py runs their like in a cluster."""
    monkeypatch.setattr(client, "Jobs", NoJobs)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


def test_the_fields_that_it_names_exist() -> None:
    named = set(re.findall(r"(?<![/\w])(deploy|cluster|server)\.(?!yaml)(\w+)(?==|`)", TEXT))
    assert len(named) > 12
    sections = {"deploy": schema.DeployConfig, "cluster": schema.ClusterConfig, "server": schema.ServerConfig}
    assert sections.keys() <= Config.__dataclass_fields__.keys()
    for section, field in named:
        assert field in sections[section].__dataclass_fields__, f"{section}.{field}"
