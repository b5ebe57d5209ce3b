"""Runs launch plans in a process of their own: for sanitizers, and for kernels that may do anything.

Case file, all numbers int64: buffer count, per buffer (bytes, data); launch count, per launch (name length, name,
grid x, y, z, block, shared bytes, argument count, per argument (is a buffer, value)). A buffer argument's value is
buffer << 32 | offset, a scalar's is its bytes.
"""

import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.launch_plans import LaunchPlan
from support.cuda_on_cpu.executor import ORDERS, Schedule

SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=70",
    "UBSAN_OPTIONS": "halt_on_error=1:exitcode=71",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=72:report_signal_unsafe=0",
}
FINDINGS = {64: "runtime", 70: "address", 71: "undefined", 72: "race"}


def replay(program: Path, plans: Sequence[LaunchPlan], schedule: Schedule, timeout_s: float = 300) -> str:
    """Launches the plans in `program` and copies what they wrote back into their tensors.

    Returns:
        "" when the program ended well, else what ended it: "runtime" (deadlock, misalignment, ...), "address",
        "undefined", "race", or "crash", and what it wrote to standard error behind a colon.
    """
    with tempfile.TemporaryDirectory() as folder:
        case, result = Path(folder, "case"), Path(folder, "result")
        buffers = _write_case(case, plans)
        command = [program, case, result, ORDERS[schedule.order], int(schedule.eager_copies), schedule.seed]
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env={**os.environ, **SANITIZER_OPTIONS},
            timeout=timeout_s,
        )
        if done.returncode:
            return f"{FINDINGS.get(done.returncode, 'crash')}: {done.stderr[:2000]}"
        data = result.read_bytes()
    for storage in buffers:
        storage.copy_(torch.frombuffer(bytearray(data[: len(storage)]), dtype=torch.uint8)) if len(
            storage
        ) else None
        data = data[len(storage) :]
    return ""


def _write_case(path: Path, plans: Sequence[LaunchPlan]) -> list[Tensor]:
    """Writes the file; returns the bytes of the buffers (whole storages, so that views share them) in order."""
    buffers: dict[int, tuple[int, Tensor]] = {}  # by address: (number, bytes)
    launches = []
    for plan in plans:
        arguments = []
        for argument in plan.arguments:
            if isinstance(argument, Tensor):
                storage = argument.untyped_storage()
                data = torch.empty(0, dtype=torch.uint8).set_(storage)
                number, _ = buffers.setdefault(storage.data_ptr(), (len(buffers), data))
                offset = argument.storage_offset() * argument.element_size()  # an empty tensor has no address
                arguments.append((1, number << 32 | offset))
            else:
                scalar = np.asarray(argument).tobytes().ljust(8, b"\0")
                arguments.append((0, int.from_bytes(scalar, "little", signed=True)))
        head = struct.pack("<q", len(plan.kernel)) + plan.kernel.encode()
        head += struct.pack("<6q", *plan.grid, plan.block, plan.shared_bytes, len(arguments))
        launches.append(head + b"".join(struct.pack("<2q", *argument) for argument in arguments))
    data = [tensor for _, tensor in buffers.values()]
    with open(path, "wb") as file:
        file.write(struct.pack("<q", len(data)))
        for tensor in data:
            file.write(struct.pack("<q", len(tensor)) + tensor.numpy().tobytes())
        file.write(struct.pack("<q", len(launches)) + b"".join(launches))
    return data
