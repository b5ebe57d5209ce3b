"""Few rows times a matrix of 8-bit numbers, which is read as it lies."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.launch_plans import FP8, LaunchPlan, are_packs, launch, operator_of
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

MAX_ROWS = 64
TILE_ROWS = (8, 16, 40, 64)  # the entries of narrow_matmul.cu
TILE_FEATURES, CHUNK, THREADS = 64, 256, 256
WARP_COLUMNS = 64  # have one scale: groups are made of them
COLUMN_WARPS = CHUNK // WARP_COLUMNS
STAGES = (6, 4, 3, 2)  # of the ring, what the kernel can wait in
SHARED_BYTES = 96 << 10  # what every target can give a block
MAX_SPLITS = 32
_PIECE = 16  # columns come in as many: 16 bytes of the matrix
_TYPES = {FP8: "fp8", torch.int8: "int8"}
# What splitting costs, in the time that a multiprocessor takes for a chunk of its tile in 8 bits at the memory's
# speed (0.6 us on an H100, from its datasheet): until the first chunk of a block is there; another launch. And the
# rows of partial sums that are counted on.
_START, _LAUNCH, _TYPICAL_ROWS = 1.5, 2.5, 32


def narrow_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    group: int,
    bias: Tensor,
    use_kernel: bool = False,
) -> Tensor:
    """x W^T + bias of numbers with scales, summed in float32 and rounded once.

    Args:
        x: [N, K], bfloat16; or float8_e4m3fn, with scales, if the matrix is, too.
        x_scales: float32 [N, 1], or [N, G] by group of columns; no elements: x is as it is.
        weight: [O, K], contiguous; float8_e4m3fn or int8.
        weight_scales: float32 [O, G], G = 1 or ceil(K / group).
        group: columns that share a scale where there are several; from K on, all.
        bias: bfloat16 [O], or no elements for none.
        use_kernel: run `narrow_matmul.cu` (tensors on a GPU), which takes `MAX_ROWS` rows, see `kernel_takes` too.
            The bits of a row do not depend on the others.

    Returns:
        bfloat16 [N, O].

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    num_groups = -(-weight.shape[-1] // group)
    check_shapes(
        (
            ("x", x, ("N", "K")),
            ("weight", weight, ("O", "K")),
            ("weight_scales", weight_scales, ("O", "G")),
            *((("x_scales", x_scales, ("N", "GX")),) if x_scales.numel() else ()),
            *((("bias", bias, ("O",)),) if bias.numel() else ()),
        )
    )
    for name, scales in (("weight_scales", weight_scales), ("x_scales", x_scales)):
        if scales.numel() and scales.shape[1] not in (1, num_groups):
            raise ValueError(
                f"{name} has {scales.shape[1]} columns, there are {num_groups} groups of {group}"
            )
    if not use_kernel:
        out = scaled(x, x_scales, group) @ scaled(weight, weight_scales, group).T
        return (out + bias.float() if bias.numel() else out).bfloat16()
    if not kernel_takes(weight, weight_scales, group):
        raise ValueError(
            f"weight is {weight.dtype} with {weight.shape[1]} columns and scales for {group}: the kernel takes "
            f"FP8 and int8, contiguous, of columns a multiple of {_PIECE}, with scales for all or a multiple of "
            f"{WARP_COLUMNS}"
        )
    if len(x) > MAX_ROWS:
        raise ValueError(f"x has {len(x)} rows, the kernel takes {MAX_ROWS}")
    narrow = x.dtype == FP8
    if narrow != bool(x_scales.numel()) or (narrow and weight.dtype != FP8):
        raise ValueError(
            f"x is {x.dtype} with {x_scales.numel()} scales, weight {weight.dtype}: the kernel takes bfloat16 "
            f"without scales, and FP8 with scales for a matrix in FP8"
        )
    check_kernel_arguments(
        (
            ("x", x, FP8 if narrow else torch.bfloat16),
            ("weight", weight, weight.dtype),
            ("weight_scales", weight_scales, torch.float32),
            *((("x_scales", x_scales, torch.float32),) if narrow else ()),
            *((("bias", bias, torch.bfloat16),) if bias.numel() else ()),
        )
    )
    return narrow_matmul_op(x, x_scales, weight, weight_scales, group, bias)


def kernel_takes(weight: Tensor, weight_scales: Tensor, group: int) -> bool:
    """Whether the kernel multiplies with a matrix [O, K], its scales [O, G] for `group` columns each."""
    whole = weight_scales.shape[1] == 1 or group % WARP_COLUMNS == 0
    return whole and weight.dtype in _TYPES and weight.shape[1] % _PIECE == 0 and weight.is_contiguous()


def scaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """float32 [n, K] of narrow numbers and their scales [n, 1 or G], or of such without: as they are."""
    wide = values.float()
    if scales.numel() == 0:
        return wide
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(group, dim=1)[:, : values.shape[1]]
    return wide * scales


narrow_matmul_op = operator_of(narrow_matmul)


@narrow_matmul_op.register_fake
def _empty(x: Tensor, x_scales: Tensor, weight: Tensor, *rest: Tensor | int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


@narrow_matmul_op.register_kernel("cuda")
def narrow_matmul_on_gpu(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, group: int, bias: Tensor
) -> Tensor:
    out = _empty(x, x_scales, weight)
    if out.numel() == 0:
        return out
    if not are_packs(weight):
        raise ValueError("weight begins where 16 bytes cannot be read at once")
    if not are_packs(x):
        x = x.clone(memory_format=torch.contiguous_format)
    num_sms, shared_bytes = gpu_resources(x.device)
    num_splits = column_splits(weight.shape[0], weight.shape[1], 8, num_sms)
    partial_out = x.new_empty((num_splits if num_splits > 1 else 0, *out.shape), dtype=torch.float32)
    scales = (x_scales.contiguous(), weight_scales.contiguous())
    plans = plan_narrow_matmul(
        x, scales[0], weight, scales[1], group, bias, num_splits, shared_bytes, out, partial_out
    )
    launch(x.device, plans)
    return out


@cache
def gpu_resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block may have."""
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count, getattr(gpu, "shared_memory_per_block_optin", SHARED_BYTES)


def column_splits(out_features: int, in_features: int, bits: int, num_sms: int) -> int:
    """Over how many blocks the columns of a tile are split, so that all multiprocessors are busy. It does not depend
    on the rows that come in: their sums would.

    bits: of a number of the matrix.
    """
    tiles, chunks = -(-out_features // TILE_FEATURES), -(-in_features // CHUNK)

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // num_sms)
        partial_bytes = 2 * 4 * splits * _TYPICAL_ROWS * out_features  # written and read
        merge = _LAUNCH + partial_bytes / (num_sms * TILE_FEATURES * CHUNK)
        return waves * (-(-chunks // splits) * bits / 8 + _START) + (merge if splits > 1 else 0.0)

    return min(range(1, max(min(chunks, MAX_SPLITS), 1) + 1), key=cost)


def plan_narrow_matmul(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    group: int,
    bias: Tensor,
    num_splits: int,
    shared_bytes: int,
    out: Tensor,
    partial_out: Tensor,
) -> tuple[LaunchPlan, ...]:
    """One launch, or two where columns are split.

    Args:
        x, x_scales, weight, weight_scales, group, bias: as in `narrow_matmul`; rows of x begin where 16 bytes can be
            read at once, all others are contiguous.
        num_splits: see `column_splits`; no more than chunks.
        shared_bytes: what a block may have; at least `SHARED_BYTES`.
        out: bfloat16 [N, O], contiguous, is the output.
        partial_out: float32 [num_splits, N, O]; not used with one split.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    tile_rows = next(rows for rows in TILE_ROWS if num_rows <= rows)
    stage_bytes = CHUNK * (TILE_FEATURES + tile_rows * x.element_size())
    num_stages = next(stages for stages in STAGES if stages * stage_bytes <= shared_bytes)
    sum_bytes = 4 * COLUMN_WARPS * tile_rows * (TILE_FEATURES + 4)

    def columns(scales: Tensor) -> np.int32:
        """Of a scale."""
        return np.int32(group if scales.dim() == 2 and scales.shape[1] > 1 else in_features)

    product = LaunchPlan(
        source="narrow_matmul",
        kernel=f"narrow_matmul_{_types(x, weight)}_rows{tile_rows}",
        grid=(-(-out_features // TILE_FEATURES), num_splits, 1),
        block=THREADS,
        shared_bytes=max(num_stages * stage_bytes, sum_bytes),
        arguments=(
            x,
            weight,
            x_scales,
            weight_scales,
            bias,
            out,
            partial_out,
            np.int32(num_rows),
            np.int32(out_features),
            np.int32(in_features),
            columns(x_scales),
            np.int32(x_scales.shape[-1]),
            columns(weight_scales),
            np.int32(weight_scales.shape[1]),
            np.int32(num_stages),
            np.int32(bias.numel() > 0),
            np.int64(x.stride(0)),
        ),
    )
    return (product,) if num_splits == 1 else (product, plan_sum_of_splits(partial_out, bias, out))


def plan_sum_of_splits(partial_out: Tensor, bias: Tensor, out: Tensor) -> LaunchPlan:
    """out [N, O] = the sum of partial_out [S, N, O], and bias [O] where it has elements."""
    num_splits, num_rows, out_features = partial_out.shape
    return LaunchPlan(
        source="narrow_matmul",
        kernel="sum_column_splits",
        grid=(-(-out.numel() // THREADS), 1, 1),
        block=THREADS,
        shared_bytes=0,
        arguments=(
            partial_out,
            bias,
            out,
            np.int32(num_rows),
            np.int32(out_features),
            np.int32(num_splits),
            np.int32(bias.numel() > 0),
        ),
    )


def _types(x: Tensor, weight: Tensor) -> str:
    """What the names of kernels say of x and the matrix, e.g. "bf16_int8"."""
    return f"{'fp8' if x.dtype == FP8 else 'bf16'}_{_TYPES[weight.dtype]}"
