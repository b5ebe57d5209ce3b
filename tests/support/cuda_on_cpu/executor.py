"""Builds kernels for the CPU and runs launch plans on them.

Two kinds of executor differ only in where their C++ comes from: the `.cu` source itself (`source_executor`), or the
PTX that NVRTC made of it (`ptx.executor.ptx_executor`).
"""

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from torch import Tensor

from outrider.kernels.compiler import Sources
from outrider.kernels.launch_plans import Argument, LaunchPlan

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "cuda_on_cpu"
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
SANITIZERS = {
    "none": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread", "-DOUTRIDER_TSAN"),
}
FLAGS = ("-std=c++20", "-fPIC", "-DOUTRIDER_ON_CPU", "-Wno-unknown-pragmas", "-Wno-psabi")


class KernelError(RuntimeError):
    """The runtime stopped a kernel: a deadlock, a misaligned access, a wrong mask."""


@dataclass(frozen=True)
class Schedule:
    """One way of running a launch; see runtime.h."""

    order: str = "ascending"
    eager_copies: bool = False
    seed: int = 0


SCHEDULES = tuple(Schedule(order, eager, 7) for order in ORDERS for eager in (False, True))


class Executor:
    """Kernels in shared objects. `launch` runs plans on CPU tensors in this process."""

    def __init__(self, libraries: Mapping[str, Path]) -> None:
        """`libraries`: by kernel, what it was built into."""
        self.libraries = dict(libraries)
        loaded = {path: ctypes.CDLL(str(path)) for path in set(self.libraries.values())}
        self._run = {kernel: loaded[path].run_kernel for kernel, path in self.libraries.items()}

    def launch(self, plans: Iterable[LaunchPlan], schedule: Schedule = Schedule()) -> None:
        """Raises KernelError when the runtime stops a kernel. A wild access ends the process: replay untrusted
        kernels (`replay.py`)."""
        for plan in plans:
            values = [np.asarray(argument_value(a)) for a in plan.arguments]
            pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
            error = ctypes.create_string_buffer(2048)
            failed = self._run[plan.kernel](
                plan.kernel.encode(),
                (ctypes.c_uint32 * 3)(*plan.grid),
                (ctypes.c_uint32 * 3)(plan.block, 1, 1),
                ctypes.c_size_t(plan.shared_bytes),
                pointers,
                ORDERS[schedule.order],
                int(schedule.eager_copies),
                ctypes.c_uint32(schedule.seed),
                error,
                ctypes.c_size_t(len(error)),
            )
            if failed:
                raise KernelError(f"{plan.kernel}: {error.value.decode()}")


def argument_value(argument: Argument) -> np.generic:
    """What the driver copies for an argument: a tensor's address, or the scalar in its own width."""
    return np.uint64(argument.data_ptr()) if isinstance(argument, Tensor) else argument


def kernel_names(sources: Sources, stem: str) -> list[str]:
    """Names of the kernels a `.cu` file defines, directly or through its instantiation macro."""
    text = sources[f"{stem}.cu"]
    return re.findall(r"(?m)^KERNEL\(.*\)\n(\w+)\(", text) + re.findall(r"(?m)^[A-Z_]+\(([a-z]\w*), ", text)


def source_executor(units: dict[str, Sources]) -> Executor:
    """Kernels compiled from their own source: {stem: sources}."""
    built = {stem: build_unit(stem, translation_unit(stem, sources)) for stem, sources in units.items()}
    return Executor(
        {name: built[stem] for stem, sources in units.items() for name in kernel_names(sources, stem)}
    )


def translation_unit(stem: str, sources: Sources) -> Sources:
    """C++ of the source executor: {file name: text}, `main.cpp` being the one to compile."""
    return {**sources, "main.cpp": with_entry(f'#include "{stem}.cu"', kernel_names(sources, stem))}


def with_entry(code: str, kernels: list[str]) -> str:
    listed = " ".join(f"X({name})" for name in kernels)
    return f'{code}\n#define KERNEL_LIST(X) {listed}\n#include "entry.h"\n'


def build_unit(
    name: str, unit: Sources, sanitizer: str = "none", optimise: str = "-O2", alone: bool = False
) -> Path:
    """Compiles a unit; the result is kept under a name that hashes everything it depends on.

    It is a shared object; with a sanitizer, or `alone`, a program that replays a case file.
    """
    program = sanitizer != "none" or alone
    flags = [*FLAGS, *SANITIZERS[sanitizer], *(["-g1", "-DOUTRIDER_REPLAY"] if program else ["-shared"])]
    support = "".join(path.read_text() for path in sorted(HERE.glob("*.h")) + sorted(HERE.glob("*.cpp")))
    parts = [optimise, *flags, support, *(part for item in sorted(unit.items()) for part in item)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    output = BUILD / f"{name}-{sanitizer}-{digest}{'' if program else '.so'}"
    objects = [build_runtime(sanitizer == "thread", source) for source in ("runtime", "warp_operations")]

    def build(folder: Path, partial: Path) -> None:
        for file, text in unit.items():
            (folder / file).write_text(text)
        command = ["g++", *flags, optimise, f"-I{folder}", f"-I{HERE}", str(folder / "main.cpp")]
        _run([*command, *map(str, objects), "-o", str(partial)])

    return _built(output, build)


def build_runtime(for_tsan: bool, source: str) -> Path:
    """The runtime is never instrumented; under ThreadSanitizer it announces fibers and barriers."""
    text = (
        "".join(path.read_text() for path in sorted(HERE.glob("*.h"))) + (HERE / f"{source}.cpp").read_text()
    )
    output = BUILD / f"{source}-{int(for_tsan)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.o"
    flags = [*FLAGS, *(["-DOUTRIDER_TSAN"] if for_tsan else []), "-O2", "-c"]

    def build(folder: Path, partial: Path) -> None:
        _run(["g++", *flags, str(HERE / f"{source}.cpp"), "-o", str(partial)])

    return _built(output, build)


def _built(output: Path, build: Callable[[Path, Path], None]) -> Path:
    """What `build(folder, file)` makes of a folder of its own and the file to write in it, unless it is there. Of
    several processes of a test run that want the same, one builds it and the others wait."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            with TemporaryDirectory(dir=BUILD) as folder:
                partial = Path(folder) / output.name
                build(Path(folder), partial)
                partial.rename(output)
    return output


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(
            f"{command[0]} is not installed: kernels are executed on the CPU by compiling them for it"
        )
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
