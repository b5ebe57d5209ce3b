"""What the kernels' files share: a launch as data, its way to a GPU, and an entry as a torch operator.

A kernel's file has its entry, which is the reference too, its operator and its plan: a pure function from tensors to
grid, block, shared memory and arguments. Nothing in a plan needs a GPU, so the plans that run on one are the plans
that tests execute on a CPU. They allocate nothing: the caller passes outputs and workspace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

if TYPE_CHECKING:
    from outrider.kernels.launcher import Launcher

Argument = Tensor | np.int32 | np.int64 | np.float32

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
FP8 = torch.float8_e4m3fn  # of a KV cache, see fp8.cuh
PACKED_TYPES = {
    **TYPE_NAMES,
    torch.float32: "f32",
}  # of the kernels that go through rows in packs of 16 bytes
COMMIT_SHARED_BYTES = 96 << 10  # what every target can give a block
MAX_COMMIT_ROWS = COMMIT_SHARED_BYTES // 16


@dataclass(frozen=True)
class LaunchPlan:
    """One kernel launch.

    Attributes:
        source: stem of the `.cu` file.
        kernel: name of the entry in it.
        grid: blocks in x, y, z.
        block: threads in a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: tensors (passed by address) and numpy scalars (which fix the width).
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: tuple[Argument, ...]


def kernel_types(dtype: torch.dtype, cache: torch.dtype) -> str:
    """What the names of kernels say of their types, e.g. "bf16_fp8": of the queries, and of a cache that differs."""
    return TYPE_NAMES[dtype] if cache == dtype else f"{TYPE_NAMES[dtype]}_fp8"


def are_packs(*tensors: Tensor) -> bool:
    """Whether all rows begin where 16 bytes can be read at once."""
    return not any(
        address % 16
        for tensor in tensors
        for address in (tensor.data_ptr(), *(n * tensor.element_size() for n in tensor.stride()[:-1]))
    )


def launch(device: torch.device, plans: Sequence[LaunchPlan]) -> None:
    """Runs plans on a GPU, on torch's current stream."""
    _launcher(device).launch(plans)


@cache
def _launcher(device: torch.device) -> "Launcher":
    # A machine without a GPU need not have cuda-core.
    from outrider.kernels.launcher import launcher_of

    return launcher_of(device)


def operator_of(entry: Callable[..., Tensor | None], mutates: Sequence[str] = ()) -> CustomOpDef:
    """A kernel's entry as the torch operator `outrider::NAME`, which torch.compile traces.

    It takes what the entry takes, without `use_kernel`, and on a CPU answers with it. All of it must be given: an
    argument that says what it would be by default never arrives at what is registered for a device, torch leaves it
    out. What the operator does on a GPU, and its fake, are for the caller to register; a GPU's outputs and workspace must come from torch's allocator, which a CUDA
    graph capture redirects to the graph's own memory.

    Args:
        mutates: the arguments that are written in place.
    """

    def on_cpu(*arguments: object) -> Tensor | None:
        result = entry(*arguments)
        return None if result is None else result.contiguous()

    described = signature(entry, eval_str=True)
    parameters = [
        parameter.replace(default=Parameter.empty)
        for parameter in described.parameters.values()
        if parameter.name != "use_kernel"
    ]
    on_cpu.__signature__ = described.replace(parameters=parameters)  # type: ignore[attr-defined]
    return custom_op(f"outrider::{entry.__name__}", on_cpu, mutates_args=mutates, device_types="cpu")
