"""A cluster as `outrider deploy` describes it, of raylets on this machine, and jobs in it: real Ray, started once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from support import ray_cluster

JOB = Path(__file__).parents[1] / "support" / "job"
PACKAGE = Path(__file__).parents[2] / "src" / "outrider"
OUTRIDER = [sys.executable, "-m", "outrider"]
CONFIG = [
    "tiny-random",
    "target.tp_size=2",
    "target.all_reduce=gloo",
    # A node has room for one rank.
    "cluster.num_cpus_per_target=0.6",
    "cluster.num_cpus_per_draft=0.3",
    "cluster.ray_auth=disabled",
    "cluster.start_timeout_s=240",
    "deploy.image=none",
    "deploy.num_nodes=2",
    "deploy.cpus_per_node=1",
]

# Ray with a dashboard and three raylets takes 10 s to start, and each job 10 s: more than `make test` has for it.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The job server of the cluster that is written down for CONFIG."""
    manifest = tmp_path_factory.mktemp("cluster") / "job.yaml"
    arguments = ["deploy", *CONFIG, "--to", "kuberay", "--kind", "RayJob", "--out", str(manifest)]
    result = CliRunner().invoke(app, [*arguments, "--", "true"])
    assert result.exit_code == 0, result.output
    # What runs a job must find the `python` and the `pip` of these tests.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = Path(ray_cluster.__file__)
    with subprocess.Popen(
        [sys.executable, script, str(manifest)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()
        cluster.communicate(timeout=60)


def submitted(address: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*OUTRIDER, "submit", *CONFIG, "--address", address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def job(address: str, *arguments: str) -> str:
    command = [*OUTRIDER, "job", *arguments, "--address", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def last_object(output: str) -> dict[str, Any]:
    """Of a job's log."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def test_ranks_on_two_nodes_give_the_text_of_one(address: str) -> None:
    run = submitted(address, "--working-dir", str(JOB), "--", "python", "nodes_and_tokens.py")
    assert run.returncode == 0, run.stdout + run.stderr
    spread = last_object(run.stdout)
    assert "py_modules_files" in spread["package"]  # what was sent, not what is installed here
    assert spread["nodes"]["target 0"] != spread["nodes"]["target 1"]
    assert spread["drafted"] == spread["plain"]
    assert len(spread["plain"]) == 32

    # On one node, by Ray's own command.
    ray_job = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address]
    environment = json.dumps({"py_modules": [str(PACKAGE)]})
    one_node = ["tiny-random", *CONFIG[5:7], "cluster.ray_address=auto", "cluster.placement=STRICT_PACK"]
    generate = ["generate", *one_node, "--prompt", "a b a b", "--raw", "--json"]
    command = [*ray_job, "--runtime-env-json", environment, "--", "python", "-m", "outrider", *generate]
    plain = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "RAY_AUTH_MODE": "disabled"}
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert last_object(plain.stdout)["tokens"] == spread["plain"]


def test_the_exit_code_is_the_commands(address: str) -> None:
    assert submitted(address, "--", "python", "-c", "import sys; sys.exit(7)").returncode == 7


def test_an_interrupted_client_leaves_its_job_which_is_stopped_by_its_id(address: str) -> None:
    command = [*OUTRIDER, "submit", *CONFIG, "--address", address, "--id", "sleeper", "--", "sleep", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        while "sleep 1000" not in client.stdout.readline():  # the job's log says what it runs
            assert client.poll() is None
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "job sleeper goes on" in said
    assert job(address, "status", "sleeper") == "RUNNING\n"
    assert job(address, "stop", "sleeper") == "STOPPED\n"
    assert "sleeper\tSTOPPED\tsleep 1000" in job(address, "list").splitlines()
    assert "sleep 1000" in job(address, "logs", "sleeper")


def test_an_interrupt_stops_the_job_where_that_is_asked_for(address: str) -> None:
    stops = ["--id", "stopped", "--stop-on-interrupt", "--", "sleep", "1000"]
    command = [*OUTRIDER, "submit", *CONFIG, "--address", address, *stops]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        while "sleep 1000" not in client.stdout.readline():
            assert client.poll() is None
        client.send_signal(signal.SIGINT)
        client.communicate(timeout=60)
    assert client.returncode == 130
    assert job(address, "status", "stopped") == "STOPPED\n"
