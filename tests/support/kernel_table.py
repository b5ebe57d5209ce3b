"""What the compilers made of the kernels, per target; printed, gated, and kept in docs/kernels.md.

`python tests/support/kernel_table.py` writes the file anew.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from outrider.kernels.attention_cases import ATTENTION_CASES
from outrider.kernels.compiler import SOURCES, TARGETS, CompiledKernels, load_sources, nvrtc_version
from outrider.kernels.kernel_cases import kernel_cases
from support.cuda_on_cpu.kernels import compiled

TABLE = Path(__file__).parents[2] / "docs" / "kernels.md"
# Of one multiprocessor or block; NVIDIA, "CUDA C++ Programming Guide", technical specifications per capability.
REGISTERS = 65536
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
TENSOR_CORE, MATRIX_LOAD, ASYNC_COPY = "HMMA", "LDSM", "LDGSTS"
LOCAL_MEMORY = ("STL", "LDL")
# What kernels must be made of, by the beginning of their names.
NEEDED = {
    "tree_attention": (TENSOR_CORE, MATRIX_LOAD, ASYNC_COPY),
    "narrow_matmul": (TENSOR_CORE, ASYNC_COPY),
    "int4_matmul": (TENSOR_CORE, MATRIX_LOAD, ASYNC_COPY),
}
# The form of each kernel that ran on a GPU of sm_90a, see `form_of`; docs/gpu-report.md.
RAN_ON = {
    "H100": {
        "tree_attention": "232ed57526f0",
        "merge_splits": "e03c2a37208c",
        "rope_append": "149a76099ede",
        "kv_commit": "e5169d34ae09",
        "sample_shard": "98fe4ffbb643",
        "gather_rows": "50416a878f6b",
        "add_rms_norm": "2dd1632b782f",
        "silu_mul": "9cb464f9b5dc",
        "round_rows": "a277671d0071",
        "narrow_matmul": "2a03b4274828",
        "int4_matmul": "fac44d986880",
        "grow_trees": "828c058f1e24",
    },
    "H200": {"kv_commit": "e5169d34ae09", "gather_rows": "50416a878f6b"},
}


@dataclass(frozen=True)
class KernelReport:
    """One kernel for one target, from ptxas and the disassembler."""

    kernel: str
    target: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    threads: int
    shared_bytes: int
    instructions: dict[str, int]  # SASS, by name up to the first dot

    def problems(self) -> list[str]:
        """Why this kernel must not be used; empty when all is well."""
        found = []
        if self.stack_bytes or self.spill_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} spilled")
        if any(self.instructions.get(name) for name in LOCAL_MEMORY):
            found.append("uses local memory")
        if self.registers * self.threads > REGISTERS:
            found.append(f"{self.registers} registers for {self.threads} threads")
        if self.shared_bytes > SHARED_BYTES[self.target]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        needed = next((names for stem, names in NEEDED.items() if self.kernel.startswith(stem)), ())
        found += [f"no {name} instruction" for name in needed if not self.instructions.get(name)]
        return [f"{self.kernel} for {self.target}: {problem}" for problem in found]


def largest_launches() -> dict[str, tuple[int, int]]:
    """(threads, dynamic shared bytes) per kernel over all cases: {kernel: ...}."""
    launches: dict[str, tuple[int, int]] = {}
    for prepare in kernel_cases(ATTENTION_CASES):
        for plan in prepare(torch.device("cpu")).plans:
            threads, shared_bytes = launches.get(plan.kernel, (0, 0))
            launches[plan.kernel] = (max(threads, plan.block), max(shared_bytes, plan.shared_bytes))
    return launches


def reports(binary: CompiledKernels, launches: dict[str, tuple[int, int]]) -> list[KernelReport]:
    log = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    instructions = disassemble(binary.cubin)
    found = []
    for name, stack, stores, loads, registers in log.findall(binary.log):
        threads, shared_bytes = launches.get(name, (0, 0))
        found.append(
            KernelReport(
                kernel=name,
                target=binary.target,
                registers=int(registers),
                stack_bytes=int(stack),
                spill_bytes=int(stores) + int(loads),
                threads=threads,
                shared_bytes=shared_bytes,
                instructions=instructions[name],
            )
        )
    return sorted(found, key=lambda report: report.kernel)


def disassemble(cubin: bytes) -> dict[str, dict[str, int]]:
    """Counts of SASS instructions per kernel."""
    tool = next(
        tool for path in sys.path if (tool := Path(path, "nvidia", "cu13", "bin", "cuobjdump")).exists()
    )
    path = TABLE.parents[1] / "build" / "disassembled.cubin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cubin)
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    counts: dict[str, dict[str, int]] = {}
    for section in re.split(r"Function : ", text)[1:]:
        kernel = section.split()[0]
        counts[kernel] = {}
        for name in re.findall(r"(?m)^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", section):
            counts[kernel][name] = counts[kernel].get(name, 0) + 1
    return counts


def all_reports(targets: Sequence[str] = TARGETS) -> list[KernelReport]:
    launches = largest_launches()
    return [r for target in targets for stem in SOURCES for r in reports(compiled(target)[stem], launches)]


def form_of(stem: str) -> str:
    """Twelve hex digits over a kernel's sources."""
    parts = [part for item in sorted(load_sources(stem).items()) for part in item]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def ran_on(stem: str) -> str:
    """Where a kernel ran as it is now, or else before it was changed; "" for nowhere."""
    gpus = [gpu for gpu, forms in RAN_ON.items() if stem in forms]
    as_now = [gpu for gpu in gpus if RAN_ON[gpu][stem] == form_of(stem)]
    return ", ".join(as_now) or ", ".join(f"a former form on an {gpu}" for gpu in gpus)


def status_table() -> str:
    """Which step each kernel has reached."""
    lines = [
        "| kernel | form | target | compiled | executed from source | executed from PTX | run on a GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for stem in SOURCES:
        for target in TARGETS:
            on_gpu = ran_on(stem) if target == "sm_90a" else ""
            lines.append(f"| `{stem}` | {form_of(stem)} | {target} | yes | yes | yes | {on_gpu} |")
    return "\n".join(lines)


def resource_rows(found: list[KernelReport]) -> list[str]:
    """Lines of the table of resources."""
    lines = []
    for r in found:
        counts = " | ".join(
            str(r.instructions.get(name, 0)) for name in (TENSOR_CORE, MATRIX_LOAD, ASYNC_COPY)
        )
        fields = f"{r.registers} | {r.stack_bytes} | {r.spill_bytes} | {r.shared_bytes} | {counts}"
        lines.append(f"| `{r.kernel}` | {r.target} | {fields} |")
    return lines


def document(found: list[KernelReport]) -> str:
    rows = "\n".join(resource_rows(found))
    return f"""# The kernels, step by step

Generated by `python tests/support/kernel_table.py`; a test compares it. A form is a hash over a kernel's sources.

On GPUs of one kind, an H100 and an H200, one of each ([gpu-report.md](gpu-report.md)). Compiled: by NVRTC, within the
limits below. Executed: on a CPU, against float64, by a runtime that takes the kernels' source and by one that takes
the PTX (both under `tests/support/cuda_on_cpu/`). `make test` compiles and executes for the first two targets,
`make test-all` for all; a form that changes has to be compiled for all, within the limits, to get past `make test`.
What remains trusted on targets that no GPU stood for: ptxas, the
hardware, rounding in the tensor cores, the approximate `ex2` and `rcp`, asynchronous timing, ordering between blocks.
`outrider doctor --gpu` runs the same cases on your GPU. Where the last column is empty: not run on a GPU.

{status_table()}

## What the compiler made of them

NVRTC {nvrtc_version()}. Shared bytes: the most that a test case asks for. HMMA: tensor-core products, LDSM: matrix
loads from shared memory, LDGSTS: asynchronous copies, counted in the machine code.

| kernel | target | registers | stack | spills | shared bytes | HMMA | LDSM | LDGSTS |
|---|---|--:|--:|--:|--:|--:|--:|--:|
{rows}
"""


def main() -> None:
    """Writes the table, unless there is a kernel in it that must not be used."""
    found = all_reports()
    problems = [problem for report in found for problem in report.problems()]
    if problems:
        sys.exit("\n".join(problems))
    TABLE.write_text(document(found))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
