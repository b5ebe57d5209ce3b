"""Where processes are: the network interface between them, and their GPUs."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import psutil
import torch

from outrider.workers.link.communicator import Role


def gpu_identity(device: torch.device) -> str:
    """What no two GPUs have in common, whatever a process calls them."""
    return str(torch.cuda.get_device_properties(device).uuid)


def gpu_of(device: torch.device) -> str:
    """`gpu_identity`, or "" on the host."""
    return gpu_identity(device) if device.type == "cuda" else ""


def payload_device(device: torch.device, own_gpu: str, their_gpu: str) -> torch.device:
    """Where one end of a link keeps payloads: on its device if they can go from GPU to GPU, else on the host.

    Args:
        device: where it computes.
        own_gpu, their_gpu: which GPUs the two ends compute on, "" on the host. NCCL does not connect one to itself.
    """
    return device if own_gpu and their_gpu and own_gpu != their_gpu else torch.device("cpu")


def refuse_shared_gpus(gpus: Sequence[str], role: Role) -> None:
    """NCCL waits for ever where two ranks are on one GPU, or says "invalid usage".

    gpus: by rank, `gpu_identity`. Raises ValueError, naming the ranks.
    """
    for gpu in dict.fromkeys(gpus):
        ranks = [str(rank) for rank, other in enumerate(gpus) if other == gpu]
        if len(ranks) > 1:
            raise ValueError(
                f"{role} ranks {' and '.join(ranks)} are on one GPU ({gpu}), and nccl wants one for each: "
                f"cluster.num_gpus_per_{role} must be at least 1, or {role}.all_reduce gloo"
            )


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which packets to `host` go out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def interface_towards(host: str, port: int) -> str:
    """The name of the network interface from which they go out."""
    address = address_towards(host, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise AssertionError(f"no interface has address {address}")
