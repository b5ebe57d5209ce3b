"""The executor of what NVRTC made of the kernels: PTX, translated to C++, on the same runtime as the source."""

import re
from functools import cache
from pathlib import Path

from outrider.kernels.compiler import Sources
from support.cuda_on_cpu.executor import Executor, build_unit, with_entry
from support.cuda_on_cpu.ptx import arithmetic, machine
from support.cuda_on_cpu.ptx.emitter import translate

INSTRUCTION_SETS = (arithmetic, machine)  # importing them fills the table of instructions


# It takes half of the time that -O1 takes, which is minutes for all kernels, and they run as fast.
OPTIMISE = "-Og"


def translated_unit(ptx: str, names: list[str]) -> Sources:
    """C++ of the PTX executor for some kernels of a module."""
    return {"main.cpp": with_entry(translate(ptx, names), names)}


def ptx_executor(modules: dict[str, str]) -> Executor:
    """{stem: PTX}.

    The kernels of a cache in FP8 are a unit of their own: it is in them that targets differ. Of what targets share
    the C++ is the same text, so it is made and compiled once.
    """
    libraries = {}
    for stem, ptx in modules.items():
        libraries |= _libraries(stem, re.sub(r"(?m)^\.target .*", "", ptx))
    return Executor(libraries)


@cache
def _libraries(stem: str, ptx: str) -> dict[str, Path]:
    names = re.findall(r"\.entry (\w+)\(", ptx)
    narrow = [name for name in names if "_fp8" in name]
    found = {}
    for unit in (narrow, [name for name in names if name not in narrow]):
        if unit:
            library = build_unit(stem, translated_unit(ptx, unit), optimise=OPTIMISE)
            found |= dict.fromkeys(unit, library)
    return found
