"""Jobs of a Ray cluster: sent, followed, stopped, through Ray's job server."""

import asyncio
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray._raylet import Config as RayCoreConfig  # type: ignore[attr-defined]  # a compiled module
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from outrider.cluster.api import EngineError
from outrider.cluster.jobs.package import package_folder
from outrider.configs.loader import config_to_yaml
from outrider.configs.schema import Config

CONFIG_FILE = "outrider.yaml"
"""What the configuration is called in a job's working directory."""

_POLL_S = 0.5
_TALKERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    status: SUCCEEDED, FAILED or STOPPED. exit_code: of its command, as a shell would say it; 1 where it did not get
    so far. message: Ray's, in one line.
    """

    status: str
    exit_code: int
    message: str


class Jobs:
    """The job server of a cluster."""

    def __init__(self, address: str | None, auth: str | None = None) -> None:
        """
        Args:
            address: http://HEAD:8265, or what else `ray job submit` takes; None: what RAY_API_SERVER_ADDRESS or
                RAY_ADDRESS say, else the cluster of this machine.
            auth: as `cluster.ray_auth`; None: as Ray's own commands do.

        Raises ValueError where the extra packages are missing, ConnectionError where nobody answers, EngineError.
        """
        if auth is not None:
            # Ray takes this from the environment alone and has read it when it was imported.
            os.environ["RAY_AUTH_MODE"] = auth
            RayCoreConfig.initialize("")
        for talker in _TALKERS:
            logging.getLogger(talker).setLevel(logging.WARNING)
        with _errors_told():
            self._client = JobSubmissionClient(address)

    def submit(
        self,
        config: Config,
        command: Sequence[str],
        working_dir: Path | None,
        wheel: Path | None,
        job_id: str,
    ) -> str:
        """Sends a job; returns its id.

        Args:
            config: is `outrider.yaml` in the job's working directory.
            command: program and arguments. `outrider` stands for the package that is sent.
            working_dir: its files are in the job's working directory, too, without those that its .gitignore names.
            wheel: of the package; None: the one that runs here.
            job_id: a name for it; empty: a new one.
        """
        program = ["python", "-m", "outrider"] if command[0] == "outrider" else [command[0]]
        with TemporaryDirectory(prefix="outrider-job-") as folder:
            files = Path(folder) / "files"
            _gather(files, config, working_dir)
            environment: dict[str, Any] = {
                "working_dir": str(files),
                "py_modules": [str(package_folder(wheel, Path(folder) / "wheel"))],
                "excludes": ["__pycache__/"],
            }
            with _errors_told():
                sent: str = self._client.submit_job(
                    entrypoint=shlex.join([*program, *command[1:]]),
                    submission_id=job_id or f"outrider-{uuid.uuid4().hex[:12]}",
                    runtime_env=environment,
                )
        return sent

    def follow(self, job_id: str, show: Callable[[str], None]) -> JobEnd:
        """Shows what the job prints, from its beginning, until it has ended."""
        from aiohttp import ClientError  # came with the client

        num_shown = 0

        async def tail() -> None:
            nonlocal num_shown
            num_seen = 0
            async for text in self._client.tail_job_logs(job_id):
                fresh = text[max(num_shown - num_seen, 0) :]
                num_seen += len(text)
                num_shown = max(num_shown, num_seen)
                show(fresh)

        while not self.details(job_id).status.is_terminal():
            try:
                asyncio.run(tail())
            except (RuntimeError, ClientError):
                # The connection broke, which is not the end of the job. It is seen again from its beginning.
                time.sleep(_POLL_S)
        end = self.wait(job_id)
        show(self.logs(job_id)[num_shown:])
        return end

    def logs(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with _errors_told():
            text: str = self._client.get_job_logs(job_id)
        return text

    def stop(self, job_id: str) -> JobEnd:
        """Asks the job to end, and waits until it has."""
        with _errors_told():
            self._client.stop_job(job_id)
        return self.wait(job_id)

    def wait(self, job_id: str) -> JobEnd:
        """Waits until the job has ended."""
        while not (details := self.details(job_id)).status.is_terminal():
            time.sleep(_POLL_S)
        return JobEnd(details.status.value, _exit_code(details), _first_line(details.message))

    def details(self, job_id: str) -> JobDetails:
        """What Ray knows of the job."""
        with _errors_told():
            return self._client.get_job_info(job_id)

    def all(self) -> list[JobDetails]:
        """The jobs that were sent to this server, the oldest first."""
        with _errors_told():
            jobs = self._client.list_jobs()
        return sorted((job for job in jobs if job.submission_id), key=lambda job: job.start_time or 0)


def _gather(files: Path, config: Config, working_dir: Path | None) -> None:
    """A folder that stands for `working_dir` with the configuration in it; Ray packs what links lead to."""
    files.mkdir()
    if working_dir is not None:
        if not working_dir.is_dir():
            raise ValueError(f"--working-dir must be a folder, got {str(working_dir)!r}")
        for entry in working_dir.iterdir():
            (files / entry.name).symlink_to(entry.resolve())
    if (files / CONFIG_FILE).exists():
        raise ValueError(f"--working-dir must have no {CONFIG_FILE}: that is the configuration in the job")
    (files / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8")


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code  # ended by a signal


@contextmanager
def _errors_told() -> Iterator[None]:
    """What Ray raises as RuntimeError, as errors that are told in one line."""
    try:
        yield
    except AuthenticationError as error:
        raise ValueError(
            "cluster.ray_auth must suit the cluster, which refuses this client's token: ~/.ray/auth_token, or the "
            "file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if "ray[default]" in text:
            raise ValueError("jobs need more of Ray: pip install 'outrider[cluster]'") from error
        raise EngineError(_first_line(text)) from error


def _first_line(text: str | None) -> str:
    """Ray goes on with the job's last output, or with a traceback of its own."""
    return (text or "").strip().partition("\n")[0].partition(", last available logs")[0]
