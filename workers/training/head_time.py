"""How long an LM head takes on this machine, in the layout in which a DraftWorker keeps it."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from outrider.workers.draft_heads.lm_head import LmHead, LowRankLmHead
from outrider.workers.model.linear import Linear, make_linear

_REPEATS = 15
_NO_BIAS = torch.empty(0)


@torch.inference_mode()
def head_times_ms(head: LmHead, num_rows: tuple[int, ...], dtype: torch.dtype, threads: int) -> list[float]:
    """Median milliseconds of the head's products for each number of rows, weights not in any cache before.

    `threads`: torch's CPU threads in this process from now on.
    """
    torch.set_num_threads(threads)
    matrices = [head.down.weight, head.up.weight] if isinstance(head, LowRankLmHead) else [head.matrix()]
    linears = [
        make_linear(matrix.detach().to(dtype), _NO_BIAS, packed=True, exact_sums=False) for matrix in matrices
    ]
    # Between two calls in a server, a whole model passes through the caches.
    evicting = torch.zeros(64 << 20, dtype=torch.uint8)
    return [_median_ms(linears, torch.randn(n, linears[0].in_features).to(dtype), evicting) for n in num_rows]


def _median_ms(linears: list[Linear], rows: Tensor, evicting: Tensor) -> float:
    times = []
    for repeat in range(_REPEATS + 2):  # the first two make code and huge pages
        evicting.add_(1)
        begin = time.perf_counter()
        x = rows
        for linear in linears:
            x = linear(x)
        if repeat >= 2:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)
