"""Launches plans on a GPU with cuda.core, on torch's current stream; nothing is allocated and nothing waited for,
so a launch can be captured in a CUDA graph."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cuda.bindings import driver
from cuda.core import Kernel, LaunchConfig, ObjectCode, Stream, launch
from torch import Tensor

from outrider.kernels.compiler import DEFAULT_CACHE, compile_cached, target_of
from outrider.kernels.launch_plans import LaunchPlan

# A block gets this much dynamic shared memory unasked; more has to be opted in to, per kernel and device.
SHARED_BYTES_UNASKED = 48 << 10


class Launcher:
    """Kernels of one GPU, compiled and loaded on first use."""

    def __init__(
        self, device_index: int, target: str, current_stream: Callable[[], int], cache: Path
    ) -> None:
        """
        Args:
            device_index: CUDA ordinal.
            target: what to compile for, see `compiler.target_of`.
            current_stream: the handle (cudaStream_t) of the stream to launch on.
            cache: where compiled kernels are kept.
        """
        self._device_index = device_index
        self._target = target
        self._current_stream = current_stream
        self._cache = cache
        self._modules: dict[str, ObjectCode] = {}
        self._kernels: dict[str, Kernel] = {}
        self._shared_bytes: dict[str, int] = {}

    def launch(self, plans: Sequence[LaunchPlan]) -> None:
        stream = Stream.from_handle(self._current_stream())
        for plan in plans:
            kernel = self._kernel(plan)
            config = LaunchConfig(grid=plan.grid, block=plan.block, shmem_size=plan.shared_bytes)
            arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in plan.arguments]
            launch(stream, config, kernel, *arguments)

    def load(self, sources: Sequence[str]) -> None:
        """Compiles and loads kernels ahead of their first launch, which must not fall into a graph capture."""
        for source in sources:
            if source not in self._modules:
                binary = compile_cached(source, self._target, self._cache)
                self._modules[source] = ObjectCode.from_cubin(binary.cubin)

    def _kernel(self, plan: LaunchPlan) -> Kernel:
        if plan.kernel not in self._kernels:
            self.load([plan.source])
            self._kernels[plan.kernel] = self._modules[plan.source].get_kernel(plan.kernel)
            self._shared_bytes[plan.kernel] = SHARED_BYTES_UNASKED
        kernel = self._kernels[plan.kernel]
        if plan.shared_bytes > self._shared_bytes[plan.kernel]:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(
                attribute, plan.shared_bytes, kernel.handle, self._device_index
            )
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(
                    f"{plan.kernel}: {plan.shared_bytes} bytes of shared memory refused: {status.name}"
                )
            self._shared_bytes[plan.kernel] = plan.shared_bytes
        return kernel


def launcher_of(device: torch.device) -> Launcher:
    """For a GPU that torch knows. Raises ValueError where there are no kernels for it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    target = target_of(torch.cuda.get_device_capability(index))
    return Launcher(index, target, lambda: torch.cuda.current_stream(index).cuda_stream, DEFAULT_CACHE)
