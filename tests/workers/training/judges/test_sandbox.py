"""What a program may not do in the sandbox, in each of the ways that work here; each of them tries."""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from outrider.workers.training.judges.sandbox import WAYS, Limits, Sandbox, Way
from support.waiting import wait_until

LIMITS = Limits(time_s=3.0, cpu_s=2, processes=12)
AT_ONCE = replace(LIMITS, time_s=1.0, cpu_s=1)  # for programs that do not end by themselves


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the sandboxes of these tests lie, and none of other tests that run at the same time."""
    folder = Path(tempfile.mkdtemp(prefix="outrider-tests-"))
    folder.chmod(0o755)
    tmp_path_factory.getbasetemp()  # lies where temporary files did when it was first asked for
    usual, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = usual
    shutil.rmtree(folder)


def works(way: Way) -> bool:
    return Sandbox(way, LIMITS).run("").passed


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, folder: Path) -> Way:
    return request.param if works(request.param) else "audit"


@pytest.fixture(scope="module")
def sandbox(way: Way) -> Sandbox:
    return Sandbox(way, LIMITS)


def left_over(folder: Path) -> list[psutil.Process]:
    """Processes of sandboxes that are still there."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if any(str(folder) in word for word in line) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def assert_nothing_is_left(folder: Path) -> None:
    wait_until(lambda: not left_over(folder))


def test_a_program_that_ends_passes_and_one_that_fails_says_why(sandbox: Sandbox) -> None:
    usual = "import math, re, random, collections, itertools, functools, heapq, json, typing, tempfile"
    assert sandbox.run(f"{usual}\nassert math.sqrt(4) == 2").passed
    assert sandbox.run("open('a', 'w').write('x')\nassert open('a').read() == 'x'").passed
    failed = sandbox.run("assert 1 == 2, 'not\\nequal'")
    assert (failed.passed, failed.reason) == (False, "AssertionError: not equal")
    assert not sandbox.run("def f(:").passed
    # Leaving early is no proof that the tests were passed.
    for leave in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert not sandbox.run(f"{leave}\nassert False").passed


def test_the_network_is_out_of_reach(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
            f"import _socket; s = _socket.socket(); s.connect(('127.0.0.1', {port}))",
        ):
            assert not sandbox.run(program).passed
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):  # whoever had got through would still be waiting
            server.accept()


def test_nothing_outside_of_the_folder_is_written(sandbox: Sandbox, folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    tries = [
        f"open({str(kept)!r}, 'w').write('changed')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/new', 'w').write('x')",
        f"import os; f = os.open({str(tmp_path)!r}, os.O_RDONLY); os.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=f)",
        f"import pathlib; pathlib.Path({str(kept)!r}).chmod(0)",
        f"import os; os.truncate({str(kept)!r}, 0)",
    ]
    for program in tries:
        sandbox.run(program)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
        assert kept.read_text() == "as it was"
        assert kept.stat().st_mode & 0o777 == 0o666
    assert not sandbox.run("open('large', 'wb').write(bytes(1 << 26))").passed
    assert not list(folder.glob("outrider-sandbox-*"))


def test_processes_do_not_multiply_without_end(way: Way, folder: Path) -> None:
    bomb = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""
    most = 0
    over = threading.Event()

    def count() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, len(left_over(folder)))

    thread = threading.Thread(target=count)
    thread.start()
    verdict = Sandbox(way, AT_ONCE).run(bomb)
    over.set()
    thread.join()
    assert not verdict.passed
    assert most <= LIMITS.processes + 3  # and those that watch it
    assert_nothing_is_left(folder)


def test_nothing_outlives_its_limit(way: Way, folder: Path) -> None:
    grandchild = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        time.sleep(60)
    os._exit(0)
"""
    for program in (grandchild, f"{grandchild}\nwhile True: pass", "import time; time.sleep(60)"):
        begin = time.monotonic()
        Sandbox(way, AT_ONCE).run(program)
        assert time.monotonic() - begin < 30
        assert_nothing_is_left(folder)


def test_memory_is_limited(sandbox: Sandbox) -> None:
    verdict = sandbox.run("x = bytearray(8 << 30)")
    assert (verdict.passed, "MemoryError" in verdict.reason) == (False, True)


def test_nothing_runs_where_no_way_holds_it() -> None:
    with pytest.raises(ValueError, match="code cannot be run here in a way that holds it"):
        Sandbox.open(Limits(time_s=0.0))
    assert Sandbox.open(LIMITS).way in WAYS


def test_the_kernel_holds_a_program_where_there_are_namespaces(tmp_path: Path) -> None:
    """What audit hooks cannot: code that goes around Python."""
    if not works("namespaces"):
        return
    sandbox = Sandbox("namespaces", LIMITS)
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert not sandbox.run(f"open({str(secret)!r}).read()").passed
    remount = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10020000)
assert libc.mount(None, b'/', None, ctypes.c_ulong(32 | 4096), None) == 0
"""
    assert not sandbox.run(remount).passed
    assert sandbox.run(f"import os\nassert os.geteuid() != {os.getuid()} or {os.getuid()} != 0").passed
