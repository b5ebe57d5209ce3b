"""Cases of the kernels that go through rows once: add and norm, and the gate of the feed-forward part."""

import torch
import torch.nn.functional as F

from outrider.kernels.add_rms_norm import plan_add_rms_norm
from outrider.kernels.prepared import Check, Guards, PreparedCase
from outrider.kernels.silu_mul import plan_silu_mul

# One rounding to the type; of sums and exponentials in float32.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}
EPS = 1e-5


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


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
