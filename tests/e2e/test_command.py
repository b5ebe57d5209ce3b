"""The console command as a process: what a user types, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ray._common.utils import get_default_ray_temp_dir

from support.waiting import wait_until

OUTRIDER = Path(sys.executable).parent / "outrider"
LONG = ["target.max_context=4096", "--raw", "--prompt", "x", "--max-tokens", "4000"]

pytestmark = pytest.mark.slow


def session_processes(session: int) -> list[psutil.Process]:
    """Living processes that were started under the command."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def test_ctrl_c_in_an_answer_is_one_word_and_leaves_no_process() -> None:
    command = [OUTRIDER, "generate", "tiny-random", *LONG]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b"Interrupted\n"
        wait_until(lambda: not session_processes(process.pid))
    assert list(Path(get_default_ray_temp_dir()).glob(f"session_*_{process.pid}")) == []


def test_the_command_prints_the_answer_and_nothing_else() -> None:
    command = [OUTRIDER, "generate", "tiny-random", "--raw", "--prompt", "x", "--max-tokens", "8", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == 1
    assert run.stderr == ""
