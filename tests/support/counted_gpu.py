"""A pretended GPU that counts what a host asks of it, and replays graphs: what a round costs besides arithmetic.

One launch each: an operator of torch that is not a view (its CUDA kernels may be several: a sort, a scan), and every
plan of ours, which the source executor runs. Uploads and downloads are copies between host and device, in any
direction. A wait is a call that lets the host stand until the device is done: a download, an upload from memory that
is not pinned (torch waits for it), an event's `synchronize`, and operators whose result's shape depends on values.

A graph records what is called while it is captured, and refuses what CUDA refuses there; a replay computes all of it
again, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from outrider.kernels import (
    add_rms_norm,
    gather_rows,
    grow_trees,
    int4_matmul,
    kv_commit,
    launch_plans,
    narrow_matmul,
    rope_append,
    round_rows,
    sample_shard,
    silu_mul,
    tree_attention,
)
from outrider.kernels.launch_plans import LaunchPlan
from outrider.workers.model import cuda_graphs
from support import pretend_gpu as pretended
from support.cuda_on_cpu.kernels import source_kernels
from support.pretend_gpu import PretendTensor, device_in, is_gpu, leaves_of, mapped, pretend_gpu
from support.stand_in_cuda import StandInCuda

KERNEL_MODULES = (
    tree_attention,
    rope_append,
    kv_commit,
    gather_rows,
    sample_shard,
    add_rms_norm,
    silu_mul,
    round_rows,
    narrow_matmul,
    int4_matmul,
    grow_trees,
)
# What torch has one CUDA kernel for, and takes apart on a CPU.
_ONE_KERNEL = ("rms_norm", "linear", "scaled_dot_product_attention", "softmax", "log_softmax")
_FROM_VALUES = ("as_tensor", "tensor")  # of what is no tensor
_MOVES = ("to", "cuda", "_to_copy", *_FROM_VALUES)
_TO_HOST = ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal")
# Operators without a kernel: they make tensors, or see those that are there in another way.
_NO_KERNEL = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
)
# The shape of what comes out depends on values.
_BY_VALUE = ("nonzero", "masked_select", "_unique2", "unique_dim")


@dataclass
class Counts:
    """Since they were last taken."""

    launches: int = 0  # one by one, by the host
    replays: int = 0
    replayed: int = 0  # launches within them
    uploads: int = 0
    downloads: int = 0
    waits: int = 0

    def minus(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class CountedGpu:
    """What is counted, and where it runs; `counts` grows."""

    def __init__(self, cuda: StandInCuda) -> None:
        self.device = pretended.DEVICE
        self.counts = Counts()
        self._cuda = cuda
        self._pinned: list[torch.Tensor] = []  # kept, so that no other memory gets their addresses
        self._in_capture = 0  # launches of the graph that is being captured

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Filled when the block ends."""
        before, here = Counts(**vars(self.counts)), Counts()
        yield here
        vars(here).update(vars(self.counts.minus(before)))

    # Called by what is installed.

    def launch(self, plans: Sequence[LaunchPlan]) -> None:
        self._did(lambda: source_kernels().launch(plans), len(plans))
        source_kernels().launch(plans)

    def load(self, sources: Sequence[str]) -> None:
        """There is nothing to load."""

    def wait(self) -> None:
        self._forbid_in_capture("a wait")
        self.counts.waits += 1

    def run(
        self,
        inner: Callable[..., Any],
        function: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """In the place of `pretend_gpu.run`, which is `inner`."""
        direction = _direction(name, args, kwargs)
        with _Kernels(self, name, is_copy=direction != ""):
            result = inner(function, name, args, kwargs)
        if kwargs.get("pin_memory"):
            self._pinned.append(result)
        if direction:
            here = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor) and not is_there(x)]
            asynchronous = bool(kwargs.get("non_blocking")) and all(self._is_pinned(x) for x in here)
            self._forbid_in_capture("a copy between host and device")
            setattr(self.counts, direction, getattr(self.counts, direction) + 1)
            if not asynchronous:
                self.counts.waits += 1
        return result

    def op(
        self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, most: float
    ) -> int:
        """An operator ran on the device's values; returns its launches, at most `most`."""
        name = operator.overloadpacket.__name__
        waits = name in _BY_VALUE or (name == "index" and any(_is_mask(x) for x in leaves_of(args[1])))
        if waits:
            self.wait()
        outputs = _storages(result)
        known = _storages((args, kwargs)).keys()
        if name in _NO_KERNEL or (outputs.keys() <= known and not operator._schema.is_mutable):
            return 0

        def again() -> None:
            with torch.inference_mode():
                found = _storages(operator(*args, **kwargs))
                for (address, output), new in zip(outputs.items(), found.values(), strict=True):
                    if address not in known:
                        output.copy_(new)

        num = 1 if most > 0 else 0
        self._did(again, num)
        return num

    def replay(self, num_launches: int) -> None:
        self.counts.replays += 1
        self.counts.replayed += num_launches

    def captured(self) -> int:
        """Launches of the capture that ends."""
        num, self._in_capture = self._in_capture, 0
        return num

    def _did(self, again: Callable[[], object], num_launches: int) -> None:
        if self._cuda.recording is None:
            self.counts.launches += num_launches
        else:
            self._cuda.recording.append(again)
            self._in_capture += num_launches

    def _forbid_in_capture(self, what: str) -> None:
        if self._cuda.recording is not None:
            raise RuntimeError(f"{what} is not permitted while a stream is captured")

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(pinned.untyped_storage().data_ptr() == address for pinned in self._pinned)


class _Kernels(TorchDispatchMode):
    """Tells of every operator that runs on the device's values; of what is one kernel there, of the first alone."""

    def __init__(self, gpu: CountedGpu, name: str, is_copy: bool) -> None:
        super().__init__()
        self._gpu = gpu
        self._num_left = 0 if is_copy else 1 if name in _ONE_KERNEL else inf

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        if not any(map(is_there, leaves_of((args, kwargs, result)))):
            self._num_left -= self._gpu.op(operator, args, kwargs or {}, result, self._num_left)
        return result


def _direction(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The count that a call adds to as a copy between host and device; "" for any other."""
    leaves = leaves_of((args, kwargs))
    from_device = any(map(is_there, leaves))
    if name == "copy_":
        if is_there(args[0]) == is_there(args[1]):
            return ""
        return "uploads" if is_there(args[0]) else "downloads"
    if not from_device:
        return "uploads" if name in _MOVES and any(map(is_gpu, leaves)) else ""
    to_host = name in _MOVES and any(torch.device("cpu") == device_in(leaf) for leaf in leaves)
    return "downloads" if name in _TO_HOST or to_host else ""


def is_there(leaf: Any) -> bool:
    """Whether it is a tensor on the device."""
    return isinstance(leaf, PretendTensor)


def _storages(tree: Any) -> dict[int, torch.Tensor]:
    """The tensors in it by the address of their memory; of several in one memory the last."""
    tensors = [x for x in leaves_of(tree) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x for x in tensors}


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


@contextmanager
def counted_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedGpu]:
    """A GPU on which kernels run, graphs replay and nothing takes time."""
    cuda = StandInCuda()
    cuda.install(monkeypatch)
    gpu = CountedGpu(cuda)
    run, plain_graph, plain_capture = pretended.run, torch.cuda.CUDAGraph, torch.cuda.graph

    class Graph(plain_graph):  # type: ignore[misc, valid-type]
        def replay(self) -> None:
            gpu.replay(self.num_launches)
            super().replay()

    @contextmanager
    def capture(graph: Any, **options: Any) -> Iterator[None]:
        with plain_capture(graph, **options):
            yield
        graph.num_launches = gpu.captured()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("CUDAGraph", Graph),
        ("graph", capture),
        ("Stream", lambda device: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda stream: pretend_gpu()),
        ("synchronize", lambda device=None: gpu.wait()),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    plain_wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (gpu.wait(), plain_wait(event)))
    monkeypatch.setattr(pretended, "run", lambda *call: gpu.run(run, *call))
    monkeypatch.setattr(launch_plans, "_launcher", lambda device: gpu)
    # Few: a block that finds nothing to do is executed thread by thread all the same.
    monkeypatch.setattr(tree_attention, "_num_sms", lambda device: 2)
    monkeypatch.setattr(narrow_matmul, "gpu_resources", lambda device: (2, 227 << 10))
    monkeypatch.setattr(cuda_graphs, "WARM_UP_RUNS", 1)
    for module in KERNEL_MODULES:
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, f"{name}_op", on_values(getattr(module, f"{name}_on_gpu")))
    with pretend_gpu():
        yield gpu


def on_values(body: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator of ours does on a GPU, with the pretended tensors' values."""

    def call(*arguments: Any) -> Any:
        values = mapped(lambda x: x.inner if isinstance(x, PretendTensor) else x, arguments)
        with torch._C.DisableTorchFunction():
            results = body(*values)
        if isinstance(results, tuple):
            return tuple(map(_there, results))
        return _there(results)

    return call


def _there(result: Any) -> Any:
    return PretendTensor(result) if isinstance(result, torch.Tensor) else result


def moved(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """As `Module.to`, which cannot make parameters of pretended tensors."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    own[name] = value.detach().to(device, dtype if value.is_floating_point() else None)  # type: ignore[assignment]
    return module
