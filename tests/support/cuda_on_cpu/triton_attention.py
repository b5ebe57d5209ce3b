"""An attention kernel in Triton: PTX by a compiler that is proven on hardware, to calibrate the PTX executor.

If our kernels and the executor shared a wrong idea of a register layout, this PTX would come out wrong.
"""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK_QUERIES, BLOCK_KEYS, HEAD_DIM, NUM_WARPS = 32, 32, 64, 4


@triton.jit
def causal_attention(
    Q, K, V, Out, num_rows, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.arange(0, D)
    q = tl.load(Q + rows[:, None] * D + columns[None, :], mask=(rows < num_rows)[:, None], other=0.0)
    largest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for first in range(0, num_rows, N):
        keys = first + tl.arange(0, N)
        k = tl.load(K + keys[None, :] * D + columns[:, None], mask=(keys < num_rows)[None, :], other=0.0)
        score = tl.dot(q, k, out_dtype=tl.float32) * scale
        score = tl.where((keys[None, :] <= rows[:, None]) & (keys < num_rows)[None, :], score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        p = tl.exp(score - new_largest[:, None])
        rescale = tl.exp(largest - new_largest)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(V + keys[:, None] * D + columns[None, :], mask=(keys < num_rows)[:, None], other=0.0)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, out_dtype=tl.float32)
        largest = new_largest
    place = Out + rows[:, None] * D + columns[None, :]
    tl.store(place, acc / total[:, None], mask=(rows < num_rows)[:, None])


def compile_for_sm80(dtype: torch.dtype) -> tuple[str, int]:
    """PTX and the bytes of shared memory it needs."""
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature = dict.fromkeys(("Q", "K", "V"), element) | {"Out": "*fp32", "num_rows": "i32", "scale": "fp32"}
    constants = {"M": BLOCK_QUERIES, "N": BLOCK_KEYS, "D": HEAD_DIM}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(causal_attention, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": NUM_WARPS, "num_stages": 3, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared
