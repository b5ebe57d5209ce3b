"""Ends what a local Ray leaves behind where the program that started it is killed.

Ray's daemons end with that program, and the workers with them, but two agents stay for a minute, as long as they try
to tell Ray's head, which is gone, of its end (ray 2.60, `process_watcher.py`). This file is also the process that
ends them: with the standard library alone, for it is there as long as the program is.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_GRACE_S = 2.0  # in which those end by themselves that do


class Guard:
    """A process that waits for the end of this one, however it comes, and then kills the processes `pids`."""

    def __init__(self, pids: Sequence[int]) -> None:
        command = [sys.executable, "-I", "-S", __file__, *map(str, pids)]
        # A session of its own: Ctrl-C in a terminal is for the program, not for this one.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def release(self) -> None:
        """The processes have ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        """The processes should have ended: those that have not in two seconds are killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(pids: Sequence[int]) -> None:
    """Waits until standard input ends, which is when nobody can write to it any longer."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))  # numbers are given out again, these are not
    sys.stdin.buffer.read()
    time.sleep(_GRACE_S)
    for pidfd in found:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
