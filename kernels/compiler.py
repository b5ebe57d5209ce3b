"""Compiles the kernels with NVRTC, which PyPI (or torch's CUDA wheels) brings: no driver, no nvcc, no CUDA headers.

A kernel is compiled on first use for the GPU at hand and kept on disk under a name that hashes everything the
result depends on, so that eight ranks that start together compile once.
"""

import fcntl
import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cuda.bindings import nvrtc

FOLDER = Path(__file__).parent
DEFAULT_CACHE = Path.home() / ".cache" / "outrider" / "kernels"
# One translation unit each; the stem is also the Python entry's.
SOURCES = (
    "tree_attention",
    "merge_splits",
    "rope_append",
    "kv_commit",
    "sample_shard",
    "gather_rows",
    "add_rms_norm",
    "silu_mul",
    "round_rows",
    "narrow_matmul",
    "int4_matmul",
    "grow_trees",
)
_TARGET_OF_MAJOR = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}  # compute capability
TARGETS = tuple(_TARGET_OF_MAJOR.values())
FLAGS = ("--std=c++17", "--ptxas-options=-v", "--extra-device-vectorization")

Sources = dict[str, str]


@dataclass(frozen=True)
class CompiledKernels:
    """One translation unit for one target: the binary, the PTX it was made from, and what ptxas said."""

    stem: str
    target: str
    cubin: bytes
    ptx: str
    log: str


def target_of(capability: tuple[int, int]) -> str:
    """The target whose binary runs on a GPU of this compute capability; ValueError when there is none."""
    major, minor = capability
    if major not in _TARGET_OF_MAJOR:
        raise ValueError(
            f"no kernels for compute capability {major}.{minor}; there are for {sorted(_TARGET_OF_MAJOR)}.x"
        )
    return _TARGET_OF_MAJOR[major]


def load_sources(stem: str) -> Sources:
    """A `.cu` file and the headers it includes by name, directly or not: {file name: text}."""
    sources: Sources = {}
    pending = [f"{stem}.cu"]
    while pending:
        name = pending.pop()
        if name in sources or not (FOLDER / name).exists():
            continue
        sources[name] = (FOLDER / name).read_text()
        pending += re.findall(r'(?m)^#include "([^"]+)"', sources[name])
    return sources


def compile_sources(stem: str, sources: Mapping[str, str], target: str) -> CompiledKernels:
    """Runs NVRTC. Headers are handed over in memory: NVRTC would look in the current directory first.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    headers = {name: text for name, text in sources.items() if name != f"{stem}.cu"}
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            sources[f"{stem}.cu"].encode(),
            f"{stem}.cu".encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={target}", *FLAGS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC cannot compile {stem}.cu for {target}:\n{log}")
        cubin = _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, strip=False)
        ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return CompiledKernels(stem, target, cubin, ptx, log)


def compile_cached(stem: str, target: str, cache: Path) -> CompiledKernels:
    """The kernels of one source file for one target, from `cache` where possible. Safe among processes."""
    sources = load_sources(stem)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{stem}-{target}-{digest(sources, target)}.bin"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            with open(path, "rb") as file:
                fields = pickle.load(file)
            return CompiledKernels(*fields)
        compiled = compile_sources(stem, sources, target)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            pickle.dump((compiled.stem, compiled.target, compiled.cubin, compiled.ptx, compiled.log), file)
        os.replace(partial, path)
    return compiled


def digest(sources: Mapping[str, str], target: str) -> str:
    """Sixteen hex digits over everything a binary depends on."""
    parts = [target, *FLAGS, repr(nvrtc.nvrtcVersion()[1:])]
    parts += [part for item in sorted(sources.items()) for part in item]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _checked(result: tuple) -> object:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if values else None


def _text(program: object, size_of: object, read: object, strip: bool = True) -> bytes:
    size = _checked(size_of(program))  # type: ignore[operator]
    buffer = b" " * size  # type: ignore[operator]
    _checked(read(program, buffer))  # type: ignore[operator]
    return buffer.rstrip(b"\0 ") if strip else buffer


def nvrtc_version() -> str:
    """As "13.2", of the library in use."""
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
