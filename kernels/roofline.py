"""The least time a launch can take on a GPU: memory traffic and arithmetic over what its datasheet promises."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """Of one GPU, from NVIDIA's datasheets: DRAM bytes/s and dense bf16 tensor-core operations/s."""

    bytes_per_s: float
    flops_per_s: float


# By words that occur in the device name, the first match counts.
KNOWN = {
    "H200": Roofline(4.8e12, 989e12),
    "H100 PCIe": Roofline(2.0e12, 756e12),
    "H100": Roofline(3.35e12, 989e12),
    "B200": Roofline(8.0e12, 2250e12),
    "A100": Roofline(2.04e12, 312e12),
    "L40S": Roofline(864e9, 362e12),
    "RTX 4090": Roofline(1.01e12, 165e12),
    "RTX 5090": Roofline(1.79e12, 209e12),
}


def roofline_of(device_name: str) -> Roofline:
    """Zeros for a GPU that is not in the list: then there is no bound to show."""
    return next((roofline for words, roofline in KNOWN.items() if words in device_name), Roofline(0.0, 0.0))


def least_time_s(num_bytes: int, num_flops: int, roofline: Roofline) -> float:
    """The larger of memory time and arithmetic time; 0 where the GPU is not known."""
    if roofline.bytes_per_s == 0:
        return 0.0
    return max(num_bytes / roofline.bytes_per_s, num_flops / roofline.flops_per_s)
