"""The folder under /tmp/ray that each start of Ray leaves behind, with its logs: a third of a megabyte a run."""

import fcntl
import os
import shutil
import time
from pathlib import Path

_MARK = "outrider"
_KEPT_S = 24 * 3600.0


class SessionFolder:
    """A folder of a Ray that was started here, which goes with it unless its logs may be wanted.

    A lock on a file in it says that this process lives; locks end with their processes, however those end.
    """

    def __init__(self, path: Path) -> None:
        """Hides it from other users, too: logs, sockets and what is passed by file are in there."""
        self.path = path
        path.chmod(0o700)
        self._lock = os.open(path / _MARK, os.O_CREAT | os.O_WRONLY, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def close(self, keep: bool) -> None:
        """Its Ray has ended; keep: for a day, for whoever looks for the reason of a failure."""
        os.close(self._lock)
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)  # a process on its way out may still write


def remove_abandoned(root: Path) -> None:
    """Removes folders of processes that ended a day or more ago without doing so: those that were killed, or failed.

    root: where Ray has its sessions. Nothing is touched that no SessionFolder has marked.
    """
    for mark in root.glob(f"session_*/{_MARK}"):
        folder = mark.parent
        if folder.is_symlink() or time.time() - mark.stat().st_mtime < _KEPT_S:
            continue
        try:
            lock = os.open(mark, os.O_WRONLY)
        except OSError:
            continue  # another user's, or gone meanwhile
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # its process lives
        finally:
            os.close(lock)
