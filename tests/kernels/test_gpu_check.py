"""The check that users run on their GPU: with a CPU executor in the GPU's place, and (-m gpu) on a real one."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from outrider.kernels.gpu_check import LAUNCHES_PER_REPLAY, TorchGpu, all_cases, check_gpu
from outrider.kernels.kernel_cases import kernel_cases, prepare_gather_rows
from outrider.kernels.roofline import Roofline, least_time_s, roofline_of
from support.cuda_on_cpu.kernels import source_kernels
from support.stand_in_cuda import StandInCuda

SMALL = kernel_cases()[1:2] + kernel_cases()[-12::4]


class StandIn:
    """Launches on the CPU; a graph is a remembered list of plans."""

    name = "stand-in"
    device = torch.device("cpu")

    def launch(self, plans):
        source_kernels().launch(plans)

    def synchronize(self):
        pass

    def capture(self, plans):
        gpu = self

        class Graph:
            def replay(self):
                gpu.launch(plans)

        return Graph()

    def median_time_s(self, plans):
        return 1e-3


class Unsteady(StandIn):
    """Every other launch spoils one byte of an output."""

    num_launches = 0

    def launch(self, plans):
        super().launch(plans)
        self.num_launches += 1
        if self.num_launches % 2 == 0:
            plans[-1].arguments[2].view(torch.uint8).view(-1)[0] ^= 1


class Overwriting(StandIn):
    """Writes one byte behind an output."""

    def launch(self, plans):
        super().launch(plans)
        out = plans[-1].arguments[2]
        end = out.storage_offset() * out.element_size() + out.nbytes
        torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())[end] = 0


class Refusing(StandIn):
    def launch(self, plans):
        raise RuntimeError("no kernel image is available")


GATHER = [partial(prepare_gather_rows, (24,), torch.float32)]


def test_a_sound_gpu_passes_and_the_report_is_json():
    report = check_gpu(StandIn(), SMALL, Roofline(1e12, 1e15), num_repeats=3)
    assert report.passed
    assert len(report.cases) == len(SMALL)
    first = json.loads(json.dumps(report.as_json()))["cases"][0]
    assert (first["num_repeats"], first["num_different"], first["time_s"]) == (3, 0, 1e-3)
    assert 0 < first["least_time_s"] < 1e-3


def test_a_gpu_that_changes_its_mind_is_found():
    report = check_gpu(Unsteady(), GATHER, Roofline(0, 0), num_repeats=4)
    assert not report.passed
    assert any("launches gave other bits" in problem for problem in report.cases[0].problems)


def test_a_write_beside_an_output_is_found():
    report = check_gpu(Overwriting(), GATHER, Roofline(0, 0), num_repeats=1)
    assert any("bytes beside an output" in problem for problem in report.cases[0].problems)


def test_a_launch_that_fails_is_a_problem_of_its_case():
    report = check_gpu(Refusing(), SMALL, Roofline(0, 0), num_repeats=1)
    assert report.cases[0].problems[0].endswith("no kernel image is available")


def test_rooflines_are_known_by_name():
    assert roofline_of("NVIDIA H100 80GB HBM3").bytes_per_s == 3.35e12
    assert roofline_of("NVIDIA H100 PCIe").bytes_per_s == 2.0e12
    assert least_time_s(1, 1, roofline_of("something else")) == 0
    assert least_time_s(10, 30, Roofline(10, 10)) == 3


def test_what_is_timed_are_replays_of_many_launches_and_their_median_counts(monkeypatch):
    cuda = StandInCuda(replay_ms=[9.0, 2.0, 2.0, 50.0] + [2.0] * 8)
    cuda.install(monkeypatch)
    launched = []
    gpu = object.__new__(TorchGpu)
    gpu._launcher = SimpleNamespace(load=lambda sources: None, launch=launched.append)
    plans = SMALL[0](torch.device("cpu")).plans
    assert gpu.median_time_s(plans) == pytest.approx(2e-3 / LAUNCHES_PER_REPLAY)
    assert [len(captured) for captured in launched] == [LAUNCHES_PER_REPLAY * len(plans)]
    assert cuda.num_replays == 12


@pytest.mark.gpu
def test_every_case_on_this_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    gpu = TorchGpu(torch.device("cuda"))
    report = check_gpu(gpu, all_cases(), roofline_of(gpu.name))
    assert [problem for case in report.cases for problem in case.problems] == []
