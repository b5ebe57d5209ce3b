"""The project's kernels on both executors, built once per process and kept in `build/` between processes."""

import re
from functools import cache

from outrider.kernels.compiler import SOURCES, CompiledKernels, Sources, compile_cached, load_sources
from support.cuda_on_cpu.executor import BUILD, Executor, kernel_names, source_executor
from support.cuda_on_cpu.ptx.executor import ptx_executor

# `make test` compiles machine code for the target of the GPU on which the kernels ran, and executes the PTX of that
# one and of the oldest. The others, whose PTX differs from theirs in little, are left to `make test-all`.
COMPILED_OFTEN = ("sm_90a",)
EXECUTED_OFTEN = ("sm_80", "sm_90a")
# Gives the same PTX without its machine code, which takes as long.
_PTX_ALONE = {"sm_80": "compute_80"}


@cache
def compiled(target: str) -> dict[str, CompiledKernels]:
    """All kernels for a target: {stem: binaries}."""
    return {stem: compile_cached(stem, target, BUILD / "nvrtc") for stem in SOURCES}


@cache
def source_kernels() -> Executor:
    return source_executor({stem: load_sources(stem) for stem in SOURCES})


@cache
def ptx_kernels(target: str) -> Executor:
    binaries = compiled(_PTX_ALONE.get(target, target))
    return ptx_executor({stem: kernels.ptx for stem, kernels in binaries.items()})


def only(sources: Sources, stem: str, names: list[str]) -> Sources:
    """The sources without the instantiations of other kernels, to save the compilers' time."""
    dropped = "|".join(name for name in kernel_names(sources, stem) if name not in names)
    text = (
        re.sub(rf"(?m)^[A-Z_]+\((?:{dropped}), .*$", "", sources[f"{stem}.cu"])
        if dropped
        else sources[f"{stem}.cu"]
    )
    return {**sources, f"{stem}.cu": text}
