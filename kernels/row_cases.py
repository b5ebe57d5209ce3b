"""Cases of the kernels that go through rows once: add and norm, the gate of the feed-forward part, FP8."""

import math

import torch
import torch.nn.functional as F

from outrider.kernels.add_rms_norm import plan_add_rms_norm
from outrider.kernels.launch_plans import FP8
from outrider.kernels.prepared import Check, Guards, PreparedCase
from outrider.kernels.round_rows import ROWS_BY_COLUMN, plan_round_rows, round_rows
from outrider.kernels.silu_mul import plan_silu_mul

# One rounding to the type; of sums and exponentials in float32.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
EPS = 1e-5
LEAST_SCALE = 2.0**-126


def prepare_add_rms_norm(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 5
) -> PreparedCase:
    """One row of zeros, one of large numbers; `added` is a slice, which begins where 16 bytes cannot be read."""
    random = torch.Generator().manual_seed(seed)
    hidden, wide = (torch.randn(num_rows, width + n, generator=random).to(dtype) for n in (0, 3))
    weight = (1 + torch.randn(width, generator=random) / 4).to(dtype)
    hidden[0] = wide[0] = 0.0
    hidden[-1] *= 100
    total = hidden + wide[:, 1 : width + 1]
    exact = total.double()
    normed = exact * (exact.square().mean(dim=1, keepdim=True) + EPS).rsqrt() * weight.double()
    guards = Guards(device)
    outputs = [guards.empty((num_rows, width), dtype) for _ in range(2)]
    added = wide.to(device)[:, 1 : width + 1] if width % 8 else wide[:, 1 : width + 1].to(device)
    plan = plan_add_rms_norm(hidden.to(device), added, weight.to(device), EPS, *outputs)
    checks = (Check("sum", outputs[0], total, 0), Check("norm", outputs[1], normed, TOLERANCE[dtype]))
    name = f"add_rms_norm: {num_rows} rows of {width}, {_named(dtype)}"
    num_bytes = 4 * hidden.nbytes + weight.nbytes
    return PreparedCase(name, "add_rms_norm", (plan,), checks, tuple(guards.buffers), num_bytes, 0)


def prepare_silu_mul(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 6
) -> PreparedCase:
    """Gates from where silu is nothing to where it is its argument; rows with more behind them."""
    random = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_rows, 2 * width + 8, generator=random) * 4
    gate_up[0, : width // 2] *= 20
    gate_up = gate_up.to(dtype)
    gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]
    silu = F.silu(gate.double()).to(dtype)
    guards = Guards(device)
    out = guards.empty((num_rows, width), dtype)
    plan = plan_silu_mul(gate_up.to(device)[:, : 2 * width], out)
    check = Check("out", out, silu.double() * up.double(), TOLERANCE[dtype])
    name = f"silu_mul: {num_rows} rows of {width}, {_named(dtype)}"
    return PreparedCase(name, "silu_mul", (plan,), (check,), tuple(guards.buffers), 3 * out.nbytes, 0)


def prepare_round_rows(
    num_rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    width: int | None = None,
    bound: float = math.inf,
    least_scale: float = LEAST_SCALE,
    static_scale: float | None = None,
    by_column: bool = False,
    seed: int = 7,
) -> PreparedCase:
    """Rows from tiny to huge, among them zeros, infinities and NaN; what comes out is the reference's, bit for bit.

    `width`: columns that share a scale; None: all; the others as in `round_rows`. Rows whose packs do not lie side
    by side are slices, which begin where 16 bytes cannot be read.
    """
    width = columns if width is None else width
    random = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_rows, columns + 3, generator=random)
    exponents = torch.tensor([0.0, -140.0, 15.0, -12.0, 3.0])
    wide *= exponents[torch.arange(num_rows) % len(exponents)].exp2()[:, None]
    wide[0] = 0.0
    if static_scale is not None:  # what lies between two FP8 numbers, where a product is not a division
        numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
        between = (numbers[1:] + numbers[:-1]) / 2 * static_scale
        wide[0] = between.repeat(-(-wide.shape[1] // len(between)))[: wide.shape[1]]
    if num_rows > 2:
        wide[2, columns // 2] = torch.inf
        wide[2, 1] = -torch.inf
    if num_rows > 3:
        wide[-1, columns - 1] = torch.nan
    # Behind the rows, where padding would be, lies something else.
    wide = F.pad(wide, (0, 0, 0, ROWS_BY_COLUMN), value=torch.nan).to(dtype)
    x = wide[:num_rows, 1 : columns + 1]
    values, scales = round_rows(x, width, bound, least_scale, static_scale, by_column)
    # A processor's NaN may have a sign, and so may what it is rounded to.
    codes = values.view(torch.uint8).masked_fill(values.float().isnan(), 0x7F).view(FP8)
    guards = Guards(device)
    num_outputs, num_groups = scales.shape
    rounded = guards.empty((num_outputs, columns), FP8)
    # As they lie in memory.
    stored = guards.empty(
        (num_groups, num_outputs) if by_column else (num_outputs, num_groups), torch.float32
    )
    moved = wide.to(device)[:, 1 : columns + 1]
    moved = (moved if columns % 8 else moved.contiguous())[:num_rows]
    found = stored.t() if by_column else stored
    plan = plan_round_rows(moved, width, bound, least_scale, static_scale, rounded, found)
    scales = torch.where(scales.isnan(), torch.nan, scales)
    expected = scales.t() if by_column else scales
    checks = (Check("values", rounded, codes, 0), Check("scales", stored, expected, 0))
    how = (
        f"in groups of {width}" if num_groups > 1 else "by row" if static_scale is None else "with one scale"
    )
    name = f"round_rows: {num_rows} rows of {columns} {how}, {_named(dtype)}"
    num_bytes = x.numel() * dtype.itemsize + rounded.nbytes + scales.nbytes
    return PreparedCase(name, "round_rows", (plan,), checks, tuple(guards.buffers), num_bytes, 0)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
