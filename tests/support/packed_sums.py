"""What packed matrices bring in float32 on this machine, and what `FLOAT32_SUM_COLUMNS` costs and brings.

`PYTHONPATH=src:tests python -m support.packed_sums` prints, for several numbers of columns that a packed product adds
up in one sum: milliseconds of all products of 1, 4 and 16 rows with half of SmolLM2-135M on one thread, as one of two
ranks makes them, and how far its logits are from those in float64 behind a prompt of several hundred tokens. Then,
with half of SmolLM2 on one thread and six layers and the head of Qwen2.5-Coder-1.5B on two, products of several
numbers of rows with matrices as they are (MKL), packed for oneDNN's products, and for its convolutions where those
are faster.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model import linear
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.linear import DenseLinear, Linear, make_linear
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.reference import load_transformers
from support.models import smollm2
from support.rows import SequenceRows, batch_of, chain
from support.smollm2 import load_smollm2

CPU = torch.device("cpu")
NO_BIAS = torch.empty(0)
COLUMNS = (256, 384, 640, 1024)
NUM_LAYERS = 30
# [out, in] of a layer's matrices and of the head, on one of two ranks.
LAYER = ((480, 576), (576, 288), (1536, 576), (576, 768))
HEAD = (24576, 576)
SMOLLM2 = [*LAYER * NUM_LAYERS, HEAD]
QWEN_1_5B = [*((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)) * 6, (151936, 1536)]
ROWS = (1, 4, 8, 16, 64)
RUNS = 11
LONGEST = 600  # tokens


@contextmanager
def summing(columns: int) -> Iterator[None]:
    """Matrices that are packed here add up so many columns at a time."""
    before, linear.FLOAT32_SUM_COLUMNS = linear.FLOAT32_SUM_COLUMNS, columns
    yield
    linear.FLOAT32_SUM_COLUMNS = before


def linears_of(shapes: Sequence[tuple[int, int]], packed: bool = True) -> list[Linear]:
    """Random matrices of these sizes, each in memory of its own."""
    matrices = (torch.randn(shape) for shape in shapes)
    return [make_linear(m, NO_BIAS, True) if packed else DenseLinear(m, NO_BIAS) for m in matrices]


def compare_kinds(name: str, shapes: Sequence[tuple[int, int]], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    suits = linear.convolution_suits
    for kind in ("as they are", "products", "convolutions"):
        linear.convolution_suits = suits if kind == "convolutions" else lambda weight: False
        linears = linears_of(shapes, kind != "as they are")
        times = ", ".join(f"{milliseconds(linears, rows):.1f} ms of {rows}" for rows in ROWS)
        print(f"{name}, {kind}: {times}", flush=True)


def milliseconds(linears: list[Linear], num_rows: int) -> float:
    """Of all products, the least of some runs."""
    inputs = {size: torch.randn(num_rows, size) for size in {each.in_features for each in linears}}
    found = []
    for _ in range(RUNS):
        begun_s = time.perf_counter()
        for each in linears:
            each(inputs[each.in_features])
        found.append(time.perf_counter() - begun_s)
    return min(found) * 1e3


def logits_of(tokens: tuple[int, ...]) -> torch.Tensor:
    """float64 [tokens, vocab], as a target of one rank computes them in float32."""
    source = load_smollm2().source
    plan, num_pages = ShardPlan(source.config, 0, 1), -(-len(tokens) // 16)
    model = Transformer(load_weights(plan, source, torch.float32, CPU, packed=True), SoloCommunicator())
    cache = PagedCache(source.config, plan, num_pages, 16, torch.float32, CPU)
    rows = SequenceRows(list(range(num_pages)), 0, chain(len(tokens)), 0, list(tokens))
    return model.logits(model.forward(batch_of([rows], 16, CPU), cache).last).double()


def distance(logits: torch.Tensor, exact: torch.Tensor) -> str:
    off = logits.double() - exact
    return f"{off.square().mean().sqrt():.2e} root mean square, {off.abs().max():.2e} the farthest"


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    for columns in COLUMNS:
        with summing(columns):
            linears = linears_of(SMOLLM2)
        times = ", ".join(f"{milliseconds(linears, rows):.1f} ms of {rows}" for rows in (1, 4, 16))
        print(f"sums over {columns}: {times}", flush=True)
    prompts = [case.prompt for case in load_smollm2().all_cases]
    tokens = max((prompt for prompt in prompts if len(prompt) < LONGEST), key=len)
    model = load_transformers(smollm2(), torch.float32)
    theirs = model(torch.tensor([tokens])).logits[0]
    exact = model.double()(torch.tensor([tokens])).logits[0]
    print(f"{len(tokens)} tokens; transformers: {distance(theirs, exact)}", flush=True)
    for columns in COLUMNS:
        with summing(columns):
            print(f"sums over {columns}: {distance(logits_of(tokens), exact)}", flush=True)
    compare_kinds("half of SmolLM2", SMOLLM2, 1)
    compare_kinds("six layers and the head of a 1.5B", QWEN_1_5B, 2)


if __name__ == "__main__":
    main()
