"""The project's kernels on both executors, built once per process and kept in `build/` between processes."""

import re
from functools import cache

from outrider.kernels.compiler import SOURCES, CompiledKernels, Sources, compile_cached, load_sources
from support.cuda_on_cpu.executor import BUILD, Executor, kernel_names, source_executor
from support.cuda_on_cpu.ptx.executor import ptx_executor

# Compiled and executed by `make test`: the oldest target, and that of the GPU on which the kernels ran. The others,
# whose PTX differs from theirs in little, by `make test-all`.
OFTEN = ("sm_80", "sm_90a")


@cache
def compiled(target: str) -> dict[str, CompiledKernels]:
    """All kernels for a target: {stem: binaries}."""
    return {stem: compile_cached(stem, target, BUILD / "nvrtc") for stem in SOURCES}


@cache
def source_kernels() -> Executor:
    return source_executor({stem: load_sources(stem) for stem in SOURCES})


@cache
def ptx_kernels(target: str) -> Executor:
    return ptx_executor({stem: kernels.ptx for stem, kernels in compiled(target).items()})


def only(sources: Sources, stem: str, names: list[str]) -> Sources:
    """The sources without the instantiations of other kernels, to save the compilers' time."""
    dropped = "|".join(name for name in kernel_names(sources, stem) if name not in names)
    text = (
        re.sub(rf"(?m)^[A-Z_]+\((?:{dropped}), .*$", "", sources[f"{stem}.cu"])
        if dropped
        else sources[f"{stem}.cu"]
    )
    return {**sources, f"{stem}.cu": text}
