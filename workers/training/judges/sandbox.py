"""Runs a program that nobody has read: apart from network and files, and for a limited time.

What is wanted needs neither root nor a container, and no library has it: `sandbox_child.py` holds the two ways.

namespaces: the program has a file system of its own (the interpreter's files, read only, and one small folder in
    memory), no network, processes that end with the first one, and no privileges; the kernel holds it there. This
    needs root, or a system that lets users make namespaces (`kernel.unprivileged_userns_clone`, containers whose
    seccomp profile allows it).
audit: Python's audit hooks refuse sockets, further processes, foreign code and writing outside of the folder. They
    hold what a language model writes by mistake, not who knows how to get around them (PEP 578 says so).

Where neither works nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Way = Literal["namespaces", "audit"]
WAYS: tuple[Way, ...] = ("namespaces", "audit")

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_VERDICT_BYTES = 4096
_PROBE = "assert 1 + 1 == 2"


@dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
        time_s: from the start of its interpreter until everything of it is ended; cpu_s: processor time.
        memory_bytes: address space of each process.
        file_bytes: of each file, and with namespaces of all together.
        processes: with namespaces, threads included; with audit hooks there is one process.
    """

    time_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    file_bytes: int = 8 << 20
    processes: int = 16


@dataclass(frozen=True)
class Verdict:
    """How a program ended: it ran to its end, or why it did not (one line)."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs in one of the ways. Its methods may be called from many threads at once.

    Attributes:
        way: that it is.
    """

    def __init__(self, way: Way, limits: Limits) -> None:
        self.way = way
        self._limits = limits

    @classmethod
    def open(cls, limits: Limits, ways: Sequence[Way] = WAYS) -> Sandbox:
        """The first way that works on this machine. Raises ValueError where none does."""
        reasons = []
        for way in ways:
            sandbox = cls(way, limits)
            verdict = sandbox.run(_PROBE)
            if verdict.passed:
                return sandbox
            reasons.append(f"{way}: {verdict.reason}")
        raise ValueError(f"code cannot be run here in a way that holds it: {'; '.join(reasons)}")

    def run(self, program: str) -> Verdict:
        """Runs Python source to its end, its limits or its first exception."""
        # Everybody may look into it, for its root belongs to a user without a name; nobody but the owner may write.
        folder = Path(tempfile.mkdtemp(prefix="outrider-sandbox-"))
        folder.chmod(0o755)
        reader, writer = os.pipe()
        try:
            said = json.dumps(
                {"way": self.way, "folder": str(folder), "verdict": writer, **asdict(self._limits)}
            )
            with subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), said],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(writer,),
                cwd="/",
                env={},
                start_new_session=True,
            ) as process:
                os.close(writer)
                writer = -1
                return self._watch(process, reader, program)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes], reader: int, program: str) -> Verdict:
        assert process.stdin is not None
        assert process.stderr is not None
        ends = time.monotonic() + self._limits.time_s
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(program.encode())
            process.stdin.close()
        said, complaint, in_time = _read(reader, process.stderr.fileno(), ends)
        with contextlib.suppress(ProcessLookupError):
            # Also where it has ended: of a program's processes none outlives its verdict.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not in_time:
            return Verdict(False, f"not done within {self._limits.time_s:g} s")
        try:
            verdict = json.loads(said)
            return Verdict(verdict["passed"] is True, str(verdict["reason"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            return Verdict(False, last[0] if last else "ended without a verdict")


def _read(verdict: int, complaints: int, ends: float) -> tuple[bytes, bytes, bool]:
    """What came from both pipes until the verdict's was closed, and whether that was in time. Of each a bit."""
    found = {verdict: b"", complaints: b""}
    with selectors.DefaultSelector() as selector:
        for pipe in found:
            selector.register(pipe, selectors.EVENT_READ)
        while verdict in selector.get_map():
            left = ends - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                return found[verdict], found[complaints], False
            for key, _ in ready:
                part = os.read(key.fd, _MAX_VERDICT_BYTES)
                found[key.fd] = (found[key.fd] + part)[:_MAX_VERDICT_BYTES]
                # A verdict is said at once, by the process that began; others may hold the pipe open.
                if not part or (key.fd == verdict and part.endswith(b"\n")):
                    selector.unregister(key.fd)
    return found[verdict], found[complaints], True
