"""The residual stream between two blocks: what a block adds, and the norm that the next one reads."""

import numpy as np
from torch import Tensor
from torch.library import custom_op

from outrider.kernels.launch_plans import PACKED_TYPES, LaunchPlan, are_packs, launch
from outrider.kernels.rms_norm import rms_norm
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

THREADS = 512


def add_rms_norm(
    hidden: Tensor, added: Tensor, weight: Tensor, eps: float, use_kernel: bool = False
) -> tuple[Tensor, Tensor]:
    """hidden + added, and its RMS norm times `weight` (Zhang & Sennrich, arXiv:1910.07467).

    The sum is rounded to the type, squares are added in float32, and the norm is rounded once.

    Args:
        hidden, added: [N, width] of one type; the kernel takes bfloat16, float16 and float32.
        weight: [width] of that type.
        use_kernel: run `add_rms_norm.cu` (tensors on a GPU).

    Returns:
        Two new tensors [N, width].

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    check_shapes(
        (("hidden", hidden, ("N", "width")), ("added", added, ("N", "width")), ("weight", weight, ("width",)))
    )
    if not use_kernel:
        total = hidden + added
        return total, rms_norm(total, weight, eps)
    if hidden.dtype not in PACKED_TYPES:
        raise ValueError(f"hidden is {hidden.dtype}, the kernel takes {', '.join(map(str, PACKED_TYPES))}")
    named = (("hidden", hidden), ("added", added), ("weight", weight))
    check_kernel_arguments(tuple((name, tensor, hidden.dtype) for name, tensor in named))
    total, normed = add_rms_norm_op(hidden, added, weight, eps)
    return total, normed


@custom_op("outrider::add_rms_norm", mutates_args=(), device_types="cpu")
def add_rms_norm_op(hidden: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """On a CPU the reference."""
    return add_rms_norm(hidden, added, weight, eps)


@add_rms_norm_op.register_fake
def _empty(hidden: Tensor, *rest: Tensor | float) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


@add_rms_norm_op.register_kernel("cuda")
def add_rms_norm_on_gpu(hidden: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    outputs = _empty(hidden)
    if hidden.numel() > 0:
        launch(hidden.device, [plan_add_rms_norm(hidden, added, weight, eps, *outputs)])
    return outputs


def plan_add_rms_norm(
    hidden: Tensor, added: Tensor, weight: Tensor, eps: float, total: Tensor, normed: Tensor
) -> LaunchPlan:
    """A block per row. `total` and `normed` [N, width], contiguous, are the outputs; the others as in the entry."""
    num_rows, width = hidden.shape
    return LaunchPlan(
        source="add_rms_norm",
        kernel=f"add_rms_norm_{PACKED_TYPES[hidden.dtype]}",
        grid=(num_rows, 1, 1),
        block=THREADS,
        shared_bytes=4 * THREADS // 32,  # a float of each warp
        arguments=(
            hidden,
            added,
            weight,
            total,
            normed,
            np.int32(width),
            np.float32(eps),
            np.int64(hidden.stride(0)),
            np.int64(added.stride(0)),
            np.int32(are_packs(hidden, added, weight, total, normed)),
        ),
    )
