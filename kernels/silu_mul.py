"""The gate of a feed-forward part."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.launch_plans import PACKED_TYPES, LaunchPlan, are_packs, launch, operator_of
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

THREADS = 256
_PACK_BYTES = 16


def silu_mul(gate_up: Tensor, use_kernel: bool = False) -> Tensor:
    """silu(gate) * up (SwiGLU without its products; Shazeer, arXiv:2002.05202), silu rounded to the type.

    Args:
        gate_up: [N, 2 I], gates first; the kernel takes bfloat16, float16 and float32.
        use_kernel: run `silu_mul.cu` (tensors on a GPU).

    Returns:
        A new tensor [N, I].

    Raises:
        ValueError: `gate_up` is no matrix or has an odd number of columns, or the kernel does not take it.
    """
    check_shapes((("gate_up", gate_up, ("N", "2 I")),))
    if gate_up.shape[1] % 2 != 0:
        raise ValueError(f"gate_up must have as many gates as ups, got {gate_up.shape[1]} columns")
    if not use_kernel:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    if gate_up.dtype not in PACKED_TYPES:
        raise ValueError(f"gate_up is {gate_up.dtype}, the kernel takes {', '.join(map(str, PACKED_TYPES))}")
    check_kernel_arguments((("gate_up", gate_up, gate_up.dtype),))
    return silu_mul_op(gate_up)


silu_mul_op = operator_of(silu_mul)


@silu_mul_op.register_fake
def _empty(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@silu_mul_op.register_kernel("cuda")
def silu_mul_on_gpu(gate_up: Tensor) -> Tensor:
    out = _empty(gate_up)
    if out.numel() > 0:
        launch(gate_up.device, [plan_silu_mul(gate_up, out)])
    return out


def plan_silu_mul(gate_up: Tensor, out: Tensor) -> LaunchPlan:
    """A pack of 16 bytes for each thread. `out` [N, I], contiguous, is the output."""
    num_rows, width = out.shape
    packs = -(-width * out.element_size() // _PACK_BYTES)
    return LaunchPlan(
        source="silu_mul",
        kernel=f"silu_mul_{PACKED_TYPES[out.dtype]}",
        grid=(-(-packs // THREADS), num_rows, 1),
        block=THREADS,
        shared_bytes=0,
        arguments=(
            gate_up,
            out,
            np.int32(width),
            np.int64(gate_up.stride(0)),
            np.int32(are_packs(gate_up[:, :width], gate_up[:, width:], out)),
        ),
    )
