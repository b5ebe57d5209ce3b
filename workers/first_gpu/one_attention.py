"""One launch of attention as a rank of a 70B makes it, for a profiler to look at: 64 rows of one sequence behind 8k
tokens, 16 query and 2 KV heads of 128. `python -m outrider.workers.first_gpu.one_attention`"""

import torch
from torch import Tensor

from outrider.kernels.tree_attention import tree_attention
from outrider.workers.first_gpu.trees import PAGE_SIZE, chain, trees_of
from outrider.workers.model.batch import build_batch


def attend(device: torch.device, num_rows: int, context: int, dtype: torch.dtype, use_kernel: bool) -> Tensor:
    """[num_rows, 16, 128] of random queries, keys and values."""
    num_pages = -(-(context + num_rows) // PAGE_SIZE)
    tables, rows = trees_of([range(num_pages)], context, chain(num_rows), [1] * num_rows)
    batch = build_batch(tables, rows, device).tree
    q = torch.randn(num_rows, 16, 128, dtype=dtype, device=device)
    pages = torch.randn(2, num_pages, PAGE_SIZE, 2, 128, dtype=dtype, device=device)
    return tree_attention(q, pages[0], pages[1], batch, 128**-0.5, use_kernel=use_kernel)


if __name__ == "__main__":
    attend(torch.device("cuda"), 64, 8192, torch.bfloat16, use_kernel=True)
    torch.cuda.synchronize()
