"""The executor of what NVRTC made of the kernels: PTX, translated to C++, on the same runtime as the source."""

import re

from outrider.kernels.compiler import Sources
from support.cuda_on_cpu.executor import Executor, build_unit, with_entry
from support.cuda_on_cpu.ptx import arithmetic, machine
from support.cuda_on_cpu.ptx.emitter import translate

INSTRUCTION_SETS = (arithmetic, machine)  # importing them fills the table of instructions


def translated_unit(ptx: str, names: list[str]) -> Sources:
    """C++ of the PTX executor for some kernels of a module (all where `names` is empty).

    Targets whose PTX differs only in the `.target` line give the same C++, which is then compiled once.
    """
    present = names or re.findall(r"\.entry (\w+)\(", ptx)
    return {"main.cpp": with_entry(translate(ptx, names), present)}


def ptx_executor(modules: dict[str, str], names: list[str]) -> Executor:
    """{stem: PTX}; `names` restricts the kernels, to save the C++ compiler time."""
    units = {
        stem: translated_unit(ptx, [n for n in names if f".entry {n}(" in ptx])
        for stem, ptx in modules.items()
    }
    return Executor([build_unit(stem, unit, optimise="-O1") for stem, unit in units.items()])
