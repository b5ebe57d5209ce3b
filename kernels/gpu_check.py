"""Everything CI can only emulate, on a real GPU: each case against float64, repeated for equal bits, its guard bytes,
replayed from a CUDA graph, timed beside its roofline. `outrider doctor --gpu` and `pytest -m gpu` run it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from outrider.kernels.attention_cases import ATTENTION_CASES, LARGE_ATTENTION_CASES
from outrider.kernels.int4_cases import INT4_CASES, LARGE_INT4_CASES
from outrider.kernels.kernel_cases import Preparation, kernel_cases
from outrider.kernels.launch_plans import LaunchPlan
from outrider.kernels.narrow_cases import LARGE_NARROW_CASES, NARROW_CASES
from outrider.kernels.prepared import PreparedCase
from outrider.kernels.roofline import Roofline, least_time_s
from outrider.kernels.row_cases import prepare_round_rows

REPEATS = 100
TIMED_REPLAYS = 11
LAUNCHES_PER_REPLAY = 20  # a replay takes a few microseconds to begin, as long as a small kernel runs


class Gpu(Protocol):
    """What the check needs of a GPU; tests stand in a CPU executor."""

    name: str
    device: torch.device

    def launch(self, plans: Sequence[LaunchPlan]) -> None: ...
    def synchronize(self) -> None: ...
    def capture(self, plans: Sequence[LaunchPlan]) -> "Graph": ...
    def median_time_s(self, plans: Sequence[LaunchPlan]) -> float: ...


class Graph(Protocol):
    def replay(self) -> None: ...


@dataclass(frozen=True)
class CaseReport:
    """One case on one GPU.

    Attributes:
        problems: what is wrong, one line each.
        errors: relative error by output.
        num_repeats, num_different: launches, and those that gave other bits than the first.
        time_s, least_time_s: median time of the launches in a graph, inputs in the cache where they fit; and its
            lower bound (0: GPU not known).
    """

    name: str
    kernel: str
    problems: tuple[str, ...]
    errors: dict[str, float]
    num_repeats: int
    num_different: int
    time_s: float
    least_time_s: float


@dataclass(frozen=True)
class GpuReport:
    device: str
    passed: bool
    cases: tuple[CaseReport, ...]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def all_cases() -> list[Preparation]:
    large = partial(prepare_round_rows, 33, 8192, torch.bfloat16)
    cases = kernel_cases(
        (*ATTENTION_CASES, *LARGE_ATTENTION_CASES),
        (*NARROW_CASES, *LARGE_NARROW_CASES),
        (*INT4_CASES, *LARGE_INT4_CASES),
    )
    return [*cases, large, partial(large, width=128)]


def check_gpu(
    gpu: Gpu, cases: Sequence[Preparation], roofline: Roofline, num_repeats: int = REPEATS
) -> GpuReport:
    reports = tuple(check_case(gpu, prepare, roofline, num_repeats) for prepare in cases)
    return GpuReport(gpu.name, not any(report.problems for report in reports), reports)


def check_case(gpu: Gpu, prepare: Preparation, roofline: Roofline, num_repeats: int) -> CaseReport:
    """A launch that fails is a problem of the case; what was not reached then counts as zero."""
    case = prepare(gpu.device)
    bound = least_time_s(case.num_bytes, case.num_flops, roofline)
    try:
        gpu.launch(case.plans)
        gpu.synchronize()
        problems = case.verify()
        errors = {check.name: check.error() for check in case.checks}
        num_different = _count_different(gpu, prepare, case, num_repeats)
        if num_different:
            problems.append(f"{case.name}: {num_different} of {num_repeats} launches gave other bits")
        problems += _check_graph(gpu, prepare, case)
        time_s = gpu.median_time_s(prepare(gpu.device).plans)
    except RuntimeError as error:
        return CaseReport(case.name, case.kernel, (f"{case.name}: {error}",), {}, 0, 0, 0.0, bound)
    return CaseReport(
        case.name, case.kernel, tuple(problems), errors, num_repeats, num_different, time_s, bound
    )


def _count_different(gpu: Gpu, prepare: Preparation, first: PreparedCase, num_repeats: int) -> int:
    """Kernels may write in place, so every launch gets inputs of its own, made once per ten launches."""
    expected = _bits(first.outputs())
    num_different = 0
    for done in range(num_repeats):
        if done % 10 == 0:
            fresh = prepare(gpu.device)
            originals = [tensor.clone() for tensor in fresh.outputs()]
        for tensor, original in zip(fresh.outputs(), originals, strict=True):
            tensor.copy_(original)
        gpu.launch(fresh.plans)
        gpu.synchronize()
        num_different += _bits(fresh.outputs()) != expected
    return num_different


def _check_graph(gpu: Gpu, prepare: Preparation, first: PreparedCase) -> list[str]:
    """Captured once and replayed, the launches must write what they wrote outside."""
    case = prepare(gpu.device)
    originals = [tensor.clone() for tensor in case.outputs()]
    graph = gpu.capture(case.plans)
    for tensor, original in zip(case.outputs(), originals, strict=True):
        tensor.copy_(original)
    graph.replay()
    gpu.synchronize()
    return (
        []
        if _bits(case.outputs()) == _bits(first.outputs())
        else [f"{case.name}: a graph replay gave other bits"]
    )


def _bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


class TorchGpu:
    """A real GPU, through torch and our launcher."""

    def __init__(self, device: torch.device) -> None:
        from outrider.kernels.launcher import launcher_of  # needs cuda-core

        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self._launcher = launcher_of(device)

    def launch(self, plans: Sequence[LaunchPlan]) -> None:
        self._launcher.launch(plans)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, plans: Sequence[LaunchPlan]) -> Graph:
        self._launcher.load([plan.source for plan in plans])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launcher.launch(plans)
        return graph

    def median_time_s(self, plans: Sequence[LaunchPlan]) -> float:
        """Of one run of the plans. From Python a launch takes longer than a small kernel: so graphs are timed."""
        graph = self.capture(list(plans) * LAUNCHES_PER_REPLAY)
        return median_replay_s(graph, TIMED_REPLAYS) / LAUNCHES_PER_REPLAY


def median_replay_s(graph: Graph, num_replays: int) -> float:
    """Seconds of a replay on the current GPU, after one that does not count; waits for the end."""
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return median(before.elapsed_time(after) for before, after in pairwise(events)) / 1e3
