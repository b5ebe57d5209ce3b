"""What a measurement has to be read with: command, machine, versions, revision."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("outrider", "torch", "transformers", "ray", "numpy")


def describe_machine() -> dict[str, Any]:
    """JSON-ready; the command line is this process's."""
    return {
        "command": ["outrider", *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "num_cpus": num_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load_average": list(psutil.getloadavg()),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def num_cpus() -> int:
    """CPUs this process may use; where the system cannot say, those that exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str:
    """As installed, or that it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    """Of the checkout this file is in, "+" if it has changes; empty for an installed package."""
    here = Path(__file__).resolve().parent
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "-uno"])
    try:
        revision, changes = (
            subprocess.run(
                command, cwd=here, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision + ("+" if changes else "")
