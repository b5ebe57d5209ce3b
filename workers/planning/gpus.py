"""The GPUs of this machine."""

import torch


def smallest_gpu() -> tuple[int, str]:
    """Bytes and name of the GPU with the least memory that torch can use here; 0 and no name where there is none."""
    if not torch.cuda.is_available():
        return 0, ""
    sizes = [
        torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
    ]
    return min(sizes), torch.cuda.get_device_name(sizes.index(min(sizes)))
