"""What this machine has, what would be used of it, and whether its GPUs run the kernels right."""

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from outrider.kernels.gpu_check import GpuReport, TorchGpu, all_cases, check_gpu
from outrider.kernels.roofline import roofline_of
from outrider.kernels.selection import DEFAULT_MEMORY, KernelSelection, select_kernels
from outrider.workers.link.distributed import available_backends

NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Fact:
    """One line of the report."""

    name: str
    value: str


def environment() -> list[Fact]:
    """Processor, memory, GPUs, libraries, links."""
    memory = psutil.virtual_memory()
    return [
        Fact("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        Fact("processor", f"{len(os.sched_getaffinity(0))} cores"),
        Fact("memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free"),
        Fact("shared memory", _shared_memory()),
        Fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        Fact("transports", ", ".join((*available_backends(), "shm"))),
        *(
            Fact(name, _version(package))
            for name, package in (("ray", "ray"), ("transformers", "transformers"))
        ),
        Fact("NVRTC", _nvrtc()),
        Fact("cuda-core", _version("cuda-core")),
        Fact("network", ", ".join(_interfaces())),
        *_gpus(),
    ]


def usage() -> list[Fact]:
    """What a run on this machine would use."""
    if not torch.cuda.is_available():
        return [
            Fact("device", "cpu: torch sees no GPU"),
            Fact("attention", "reference (torch SDPA over gathered pages)"),
            Fact("all-reduce", "shm within this host, gloo between hosts"),
        ]
    device = torch.device("cuda", 0)
    selected = select_kernels("auto", device, torch.bfloat16, 128, DEFAULT_MEMORY)
    return [
        Fact("device", f"cuda: {torch.cuda.device_count()} GPUs"),
        Fact("attention", "kernel" if selected.tree_attention else "torch SDPA over gathered pages"),
        Fact("kernels", _selected(selected)),
        Fact("all-reduce", "nccl" if "nccl" in available_backends() else "gloo"),
    ]


def check_gpus() -> list[GpuReport]:
    """Every kernel case on every GPU; takes minutes. Needs a GPU."""
    reports = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            gpu = TorchGpu(torch.device("cuda", index))
            reports.append(check_gpu(gpu, all_cases(), roofline_of(gpu.name)))
    return reports


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _selected(selected: KernelSelection) -> str:
    names = [name for name, used in vars(selected).items() if used]
    return ", ".join(names) or "none"


def _gpus() -> list[Fact]:
    if not torch.cuda.is_available():
        return [Fact("GPUs", "none that torch can use")]
    facts = [Fact("driver", _driver())]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        peers = [
            str(other)
            for other in range(torch.cuda.device_count())
            if other != index and torch.cuda.can_device_access_peer(index, other)
        ]
        reach = f"direct access to {', '.join(peers)}" if peers else "no direct access to others"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        facts.append(Fact(f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}, {reach}"))
    return facts


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return driver_version(path.read_text()) if path.exists() else "unknown"


def driver_version(text: str) -> str:
    """Of what NVIDIA's kernel module says of itself; the open one names the processor before the version."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


def _nvrtc() -> str:
    try:
        from outrider.kernels.compiler import nvrtc_version
    except ImportError:
        return NOT_INSTALLED
    return nvrtc_version()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _shared_memory() -> str:
    try:
        usage = psutil.disk_usage("/dev/shm")
    except FileNotFoundError:
        return "none"
    return f"{usage.total / 2**30:.1f} GiB in /dev/shm, {usage.free / 2**30:.1f} free"


def _interfaces() -> list[str]:
    """Network interfaces that are up, with their speed where the system knows it."""
    found = []
    for name, stats in sorted(psutil.net_if_stats().items()):
        if stats.isup:
            found.append(f"{name} {stats.speed / 1000:g} Gbit/s" if stats.speed else name)
    return found
