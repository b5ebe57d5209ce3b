"""Where a drafter comes from: what lies beside each checkpoint as provenance.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("outrider", "torch", "deepspeed", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class Provenance:
    """How a drafter was made.

    Attributes:
        command: what was typed, as words.
        commit: of the source tree, "+changes" behind it where it had any; empty outside of a repository.
        versions: of Python and packages.
        config: the resolved configuration.
        texts_sha256: of all tokens, those held out included.
        num_texts, num_tokens: trained on.
        num_held_out: texts measured.
        seed: of starts and order.
        step: optimizer steps done.
        passes: times that the texts were read.
        hours: of training, interruptions not counted.
        machine: GPU if there is one, processor and threads.
        measured: on the held-out texts.
    """

    command: tuple[str, ...]
    commit: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    texts_sha256: str
    num_texts: int
    num_tokens: int
    num_held_out: int
    seed: int
    step: int
    passes: float
    hours: float
    machine: str
    measured: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / "provenance.json").write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Of Python and what training depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the repository that this file is in, if it is in one."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> tuple[str, ...]:
    """What was typed."""
    return (Path(sys.argv[0]).name, *sys.argv[1:])


def machine(num_threads: int, gpu: str = "") -> str:
    """Processor and threads of a rank, and the name of its GPU where it has one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{f'{gpu}, ' if gpu else ''}{name}, {num_threads} threads a rank"
