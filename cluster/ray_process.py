"""What Ray does to the process and the home of whoever starts it, put right."""

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._private.worker import global_worker

from outrider.cluster.ray_watch import Daemon

Made = TypeVar("Made")


def stop_reports() -> None:
    """Ends the thread that prints pages of raylets' logs between our answers. What they mean for a deployment is
    noticed by the Coordinator and said by the Engine; the logs stay where they are."""
    worker: Any = global_worker
    if not hasattr(worker, "listener_thread"):
        return  # ray:// has none
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()
    worker.listener_thread.join()
    worker.threads_stopped.clear()


def keep_token_private(home: Path) -> None:
    """Makes Ray's token, which Ray itself would make readable for everybody, or takes it from others' eyes.

    Raises ValueError where there can be none.
    """
    folder = home / ".ray"
    token = folder / "auth_token"
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700)
        if not token.exists():
            with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(generate_new_authentication_token())
        elif token.stat().st_uid == os.getuid():
            token.chmod(0o600)
    except OSError as error:
        raise ValueError(
            f"cluster.ray_auth = token keeps its token in {token}, which cannot be made private: {error.strerror}"
        ) from error


def with_children(daemons: Mapping[str, Daemon]) -> list[int]:
    """Ids of these processes and of what they have started, at this time."""
    pids = {daemon.pid for daemon in daemons.values()}
    for pid in tuple(pids):
        with suppress(psutil.NoSuchProcess):
            pids.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return sorted(pids)


class Keeper(Generic[Made]):
    """A thread that starts Ray and lives as long as it does: Ray's processes end with the thread that started
    them (PR_SET_PDEATHSIG), which need not be the end of the program.

    made: what `connect` returned.
    """

    def __init__(self, connect: Callable[[], Made]) -> None:
        self._connect = connect
        self._connected: Future[Made] = Future()
        self._released = threading.Event()
        threading.Thread(target=self._run, name="ray session", daemon=True).start()
        self.made = self._connected.result()

    def release(self) -> None:
        """Ray has ended."""
        self._released.set()

    def _run(self) -> None:
        try:
            made = self._connect()
        except BaseException as error:
            self._connected.set_exception(error)
            return
        self._connected.set_result(made)
        self._released.wait()
