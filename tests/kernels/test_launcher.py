"""The real cuda.core loads and launches every kernel, with a stand-in for the driver beneath it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cuda_on_cpu.executor import BUILD
from support.cuda_on_cpu.kernels import ptx_kernels

FAKE = Path(__file__).parents[1] / "support" / "fake_cuda"
pytest.importorskip("cuda.core")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables of a process in which libcuda is the stand-in."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", "-O1", FAKE / "fake_cuda.c", "-o", library, "-ldl"]
    subprocess.run([str(word) for word in command], check=True)
    built = {str(path) for path in ptx_kernels("sm_90a").libraries.values()}
    paths = [str(FAKE.parents[1]), *(p for p in sys.path if p)]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CUDA_KERNELS": ":".join(sorted(built)),
        "PYTHONPATH": ":".join(paths),
    }


def test_cuda_core_launches_every_case(environment):
    command = [sys.executable, str(FAKE / "launch_cases.py"), str(BUILD / "nvrtc")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith("cases launched")
    assert len(done.stdout.splitlines()) == 1, done.stdout
