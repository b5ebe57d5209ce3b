"""A GPU that is not there: tensors that say they are on `cuda:0`, hold their values on the CPU, and cannot be mixed
with tensors that really are on the CPU.

Inside `pretend_gpu()` whatever makes a tensor on a CUDA device makes one of these. Kernels are not launched: the
operators answer with their references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
# What moves values between devices, and may therefore see both.
_COPIES = ("copy_", "to", "cpu", "cuda", "_to_copy", "as_tensor", "type")
_NO_ACCESS = ("numpy", "__array__")


class PretendTensor(torch.Tensor):
    """Says that it is on the GPU; `inner` holds the values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(function, function.overloadpacket.__name__, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner!r})"


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("__get__", "device", "isinstance") or function is torch.device:
            return function(*args, **kwargs)
        concerned = any(isinstance(leaf, PretendTensor) or is_gpu(leaf) for leaf in leaves_of((args, kwargs)))
        if concerned or kwargs.get("pin_memory"):
            return run(function, name, args, kwargs)
        return function(*args, **kwargs)


def leaves_of(value: Any) -> list[Any]:
    """What tuples, lists and dicts hold. `tree_leaves` takes a third of the time of tests that pretend a GPU."""
    if type(value) in (tuple, list):
        return [leaf for part in value for leaf in leaves_of(part)]
    if type(value) is dict:
        return [leaf for part in value.values() for leaf in leaves_of(part)]
    return tree_leaves(value) if isinstance(value, tuple) else [value]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """As `tree_map`, of what `leaves_of` finds."""
    if type(value) in (tuple, list):
        return type(value)(mapped(change, part) for part in value)
    if type(value) is dict:
        return {key: mapped(change, part) for key, part in value.items()}
    return tree_map(change, value) if isinstance(value, tuple) else change(value)


def run(function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls the function on the values; what it returns is on the GPU unless it was asked to leave it."""
    leaves = leaves_of((args, kwargs))
    pretended = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, PretendTensor)}
    on_cpu = [
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PretendTensor) and leaf.dim() > 0
    ]
    if name in _NO_ACCESS:
        raise TypeError(f"{name}: the values of a tensor on {DEVICE} cannot be had from the CPU")
    if pretended and on_cpu and name not in _COPIES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device | str)]
    leaves_gpu = name == "cpu" or any(torch.device("cpu") == device_in(leaf) for leaf in devices)
    arrives = any(is_gpu(leaf) for leaf in leaves)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}  # asks for a driver

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, PretendTensor):
            return leaf.inner
        return torch.device("cpu") if is_gpu(leaf) else leaf

    with torch._C.DisableTorchFunction():
        result = function(*mapped(inside, tuple(args)), **mapped(inside, dict(kwargs)))
    if leaves_gpu or not (pretended or arrives):
        return mapped(lambda x: x.clone() if id(x) in pretended else x, result)

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, PretendTensor):
            return leaf
        if id(leaf) in pretended:
            return pretended[id(leaf)]
        copied = arrives and not pretended and any(leaf is x for x in on_cpu)
        return PretendTensor(leaf.clone() if copied else leaf)

    if name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    return mapped(outside, result)


def device_in(leaf: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(leaf, torch.device):
        return leaf
    if not isinstance(leaf, str):
        return None
    return torch.device(leaf) if leaf.split(":")[0] in ("cpu", "cuda") else None


def is_gpu(leaf: Any) -> bool:
    """Whether an argument names a GPU."""
    device = device_in(leaf)
    return device is not None and device.type == "cuda"


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """In this block, and on this thread, tensors can be on the device it gives."""
    with _Mode():
        yield DEVICE
