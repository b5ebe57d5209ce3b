"""Few rows times a matrix of 4 bits in groups with a scale and a centre, in the layout of torch's product.

torch's own product for CUDA (tinygemm, `_weight_int4pack_mm`) takes the same two tensors, so that one copy of a
matrix serves both. Not run on a GPU.
"""

import numpy as np
import torch
from torch import Tensor

from outrider.kernels import narrow_matmul
from outrider.kernels.launch_plans import LaunchPlan, are_packs, launch, operator_of
from outrider.kernels.narrow_matmul import (
    MAX_ROWS,
    STAGES,
    THREADS,
    TILE_ROWS,
    column_splits,
    plan_sum_of_splits,
)
from outrider.kernels.shapes import check_kernel_arguments, check_shapes

GROUPS = (32, 64, 128, 256)  # columns that share a scale
CENTRE = 8  # the value that stands for a group's centre
BITS = 4
TILE_ROWS_OF_MATRIX, TILE_COLUMNS_OF_MATRIX = 8, 128  # of the layout
TILE_FEATURES, CHUNK = 64, 256
_WORDS = 4  # that a lane has of a tile
_LANES = 32
_GROUP_BYTES = 4 * TILE_FEATURES * CHUNK // min(GROUPS)  # of scales and centres in a stage


def int4_matmul(
    x: Tensor,
    packed: Tensor,
    of_groups: Tensor,
    group: int,
    out_features: int,
    bias: Tensor,
    use_kernel: bool = False,
) -> Tensor:
    """x W^T + bias, W[i, j] = (value[i, j] - 8) * scale + centre, rounded to bfloat16; summed in float32 and rounded
    once.

    Args:
        x: bfloat16 [N, K], K a multiple of 128.
        packed: int32 [T, K / 128, 32, 4], values of `T` times eight rows as `packed_in_tiles` lays them out.
        of_groups: bfloat16 [K / group, 8 T, 2], scale and centre, contiguous.
        group: columns that share them, one of `GROUPS`.
        out_features: rows of the matrix, O, those up to 8 T being padding.
        bias: bfloat16 [O], or no elements for none.
        use_kernel: run `int4_matmul.cu` (tensors on a GPU), which takes `MAX_ROWS` rows. The bits of a row do not
            depend on the others.

    Returns:
        bfloat16 [N, O].

    Raises:
        ValueError: shapes disagree, or the kernel does not take these tensors; names the argument.
    """
    tiles, column_tiles = packed.shape[:2]
    columns, rows = column_tiles * TILE_COLUMNS_OF_MATRIX, tiles * TILE_ROWS_OF_MATRIX
    check_shapes((("x", x, ("N", "K")), ("packed", packed, ("T", "C", "lanes", "words"))))
    if packed.shape[2:] != (_LANES, _WORDS) or x.shape[1] != columns:
        raise ValueError(
            f"packed must be [T, {x.shape[1]} / {TILE_COLUMNS_OF_MATRIX}, {_LANES}, {_WORDS}], "
            f"got {list(packed.shape)}"
        )
    if group not in GROUPS or columns % group:
        raise ValueError(f"group must be one of {GROUPS} and divide {columns} columns, got {group}")
    if tuple(of_groups.shape) != (columns // group, rows, 2):
        raise ValueError(f"of_groups must be {[columns // group, rows, 2]}, got {list(of_groups.shape)}")
    if not rows - TILE_ROWS_OF_MATRIX < out_features <= rows:
        raise ValueError(f"out_features must fill {tiles} tiles of {TILE_ROWS_OF_MATRIX}, got {out_features}")
    if bias.numel() and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {list(bias.shape)}")
    if not use_kernel:
        weight = dequantised_tiles(packed, of_groups, group)[:out_features]
        out = x.float() @ weight.float().T
        return (out + bias.float() if bias.numel() else out).bfloat16()
    if len(x) > MAX_ROWS:
        raise ValueError(f"x has {len(x)} rows, the kernel takes {MAX_ROWS}")
    check_kernel_arguments(
        (
            ("x", x, torch.bfloat16),
            ("packed", packed, torch.int32),
            ("of_groups", of_groups, torch.bfloat16),
            *((("bias", bias, torch.bfloat16),) if bias.numel() else ()),
        )
    )
    return int4_matmul_op(x, packed, of_groups, group, out_features, bias)


def packed_in_tiles(values: Tensor) -> Tensor:
    """uint8 [O, K] from 0 to 15, K a multiple of 128 -> int32 [ceil(O / 8), K / 128, 32, 4], zeros for more rows.

    Of a tile of 8 rows and 128 columns lane l has, in word w, of row l / 4 the columns 32 w + 2 (l % 4) and those 8,
    16 and 24 behind it in bits 0, 4, 8 and 12, and the columns next to them 16 bits higher: what torch's
    `_convert_weight_to_int4pack` makes with eight inner tiles.
    """
    rows, columns = values.shape
    assert columns % TILE_COLUMNS_OF_MATRIX == 0, columns
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % TILE_ROWS_OF_MATRIX))
    # [tile, row, column tile, word, place, quad, side]
    parts = padded.view(-1, TILE_ROWS_OF_MATRIX, columns // TILE_COLUMNS_OF_MATRIX, _WORDS, 4, 4, 2)
    lanes = parts.permute(0, 2, 1, 5, 3, 6, 4)  # [tile, column tile, row, quad, word, side, place]
    halves = lanes[..., ::2] | lanes[..., 1::2] << BITS  # bytes, the lowest first
    in_bytes = halves.reshape(*halves.shape[:5], 4).contiguous()
    return in_bytes.view(torch.int32).view(len(padded) // TILE_ROWS_OF_MATRIX, -1, _LANES, _WORDS)


def unpacked_tiles(packed: Tensor) -> Tensor:
    """What `packed_in_tiles` was given, with the rows that it added: uint8 [8 T, K]."""
    tiles, column_tiles = packed.shape[:2]
    in_bytes = packed.contiguous().view(torch.uint8).view(tiles, column_tiles, 8, 4, _WORDS, 2, 2)
    lanes = torch.stack((in_bytes & 15, in_bytes >> BITS), dim=-1).flatten(-2)
    return lanes.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * tiles, column_tiles * TILE_COLUMNS_OF_MATRIX)


def dequantised_tiles(packed: Tensor, of_groups: Tensor, group: int) -> Tensor:
    """bfloat16 [8 T, K], what the kernel multiplies with; arguments as in `int4_matmul`."""
    values = unpacked_tiles(packed)
    distances = (values.to(torch.bfloat16) - CENTRE).unflatten(1, (-1, group))
    scales, centres = of_groups.transpose(0, 1).unbind(2)  # [8 T, G]
    # torch computes it in float32 and rounds it once.
    return torch.addcmul(centres[..., None], distances, scales[..., None]).flatten(1)


int4_matmul_op = operator_of(int4_matmul)


@int4_matmul_op.register_fake
def _empty(
    x: Tensor, packed: Tensor, of_groups: Tensor, group: int, out_features: int, bias: Tensor
) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=torch.bfloat16)


@int4_matmul_op.register_kernel("cuda")
def int4_matmul_on_gpu(
    x: Tensor, packed: Tensor, of_groups: Tensor, group: int, out_features: int, bias: Tensor
) -> Tensor:
    out = _empty(x, packed, of_groups, group, out_features, bias)
    if out.numel() == 0:
        return out
    if not (are_packs(packed) and are_packs(of_groups.flatten(1))):
        raise ValueError("packed or of_groups begins where 16 bytes cannot be read at once")
    if not are_packs(x):
        x = x.clone(memory_format=torch.contiguous_format)
    num_sms, shared_bytes = narrow_matmul.gpu_resources(x.device)
    num_splits = column_splits(out_features, x.shape[1], BITS, num_sms)
    partial_out = x.new_empty((num_splits if num_splits > 1 else 0, *out.shape), dtype=torch.float32)
    plans = plan_int4_matmul(x, packed, of_groups, group, bias, num_splits, shared_bytes, out, partial_out)
    launch(x.device, plans)
    return out


def plan_int4_matmul(
    x: Tensor,
    packed: Tensor,
    of_groups: Tensor,
    group: int,
    bias: Tensor,
    num_splits: int,
    shared_bytes: int,
    out: Tensor,
    partial_out: Tensor,
) -> tuple[LaunchPlan, ...]:
    """One launch, or two where columns are split.

    Args:
        x, packed, of_groups, group, bias: as in `int4_matmul`; rows of x begin where 16 bytes can be read at once,
            all others are contiguous.
        num_splits: see `column_splits`; no more than chunks.
        shared_bytes: what a block may have; at least `SHARED_BYTES`.
        out: bfloat16 [N, O], contiguous, is the output.
        partial_out: float32 [num_splits, N, O]; not used with one split.
    """
    num_rows, in_features = x.shape
    out_features = out.shape[1]
    tile_rows = next(rows for rows in TILE_ROWS if num_rows <= rows)
    stage_bytes = CHUNK * (TILE_FEATURES * BITS // 8 + 2 * tile_rows) + _GROUP_BYTES
    num_stages = next(stages for stages in STAGES if stages * stage_bytes <= shared_bytes)
    sum_bytes = 4 * narrow_matmul.COLUMN_WARPS * tile_rows * (TILE_FEATURES + 4)
    product = LaunchPlan(
        source="int4_matmul",
        kernel=f"int4_matmul_rows{tile_rows}",
        grid=(-(-out_features // TILE_FEATURES), num_splits, 1),
        block=THREADS,
        shared_bytes=max(num_stages * stage_bytes, sum_bytes),
        arguments=(
            x,
            packed,
            of_groups,
            bias,
            out,
            partial_out,
            np.int32(num_rows),
            np.int32(out_features),
            np.int32(in_features),
            np.int32(group),
            np.int32(num_stages),
            np.int32(bias.numel() > 0),
            np.int64(x.stride(0)),
        ),
    )
    return (product,) if num_splits == 1 else (product, plan_sum_of_splits(partial_out, bias, out))
