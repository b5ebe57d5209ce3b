"""Which kernels are used: those whose self-test passed, remembered, with one warning about the others.

The device is a CPU executor, or one that spoils a kernel's result.
"""

import warnings
from functools import partial

import pytest
import torch

from outrider.kernels.attention_cases import ATTENTION_CASES
from outrider.kernels.kernel_cases import prepare_attention, prepare_gather_rows, prepare_kv_commit
from outrider.kernels.selection import (
    ENTRIES,
    REFERENCES,
    KernelSelection,
    passed,
    remembered_self_test,
    select_kernels,
    self_test,
)
from support.cuda_on_cpu.kernels import source_kernels

CPU = torch.device("cpu")
CASES = (
    partial(prepare_attention, ATTENTION_CASES[0]),
    partial(prepare_gather_rows, (8,), torch.float32),
    partial(prepare_kv_commit, 4),
)


def spoiled_attention(plans):
    source_kernels().launch(plans)
    for plan in plans:
        if plan.source == "tree_attention":
            plan.arguments[9].zero_()  # its output


def test_a_sound_device_passes_and_nothing_is_said():
    problems = self_test(source_kernels().launch, CPU, CASES)
    assert problems == {name: [] for name in ENTRIES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert passed(problems, "device") == KernelSelection.of(ENTRIES)


def test_a_wrong_result_turns_that_kernel_off_with_one_warning():
    problems = self_test(spoiled_attention, CPU, CASES)
    with pytest.warns(
        UserWarning, match=r"tree_attention failed the self-test on device .* SDPA .* off by"
    ) as said:
        selected = passed(problems, "device")
    assert len(said) == 1
    assert selected == KernelSelection.of([name for name in ENTRIES if name != "tree_attention"])


def test_a_launch_that_fails_counts_as_failed():
    def refuse(plans):
        raise RuntimeError("no kernel image is available")

    problems = self_test(refuse, CPU, CASES)
    assert problems["kv_commit"] == ["kv_commit: 4 rows: RuntimeError: no kernel image is available"]


def test_the_result_is_remembered_by_device_driver_and_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.kernels.selection.kernel_cases", lambda: list(CASES))
    memory = tmp_path / "folder" / "self_test.json"
    first = remembered_self_test(spoiled_attention, CPU, "GPU, driver 1", memory)
    assert remembered_self_test(pytest.fail, CPU, "GPU, driver 1", memory) == first
    assert first["tree_attention"]
    second = remembered_self_test(source_kernels().launch, CPU, "GPU, driver 2", memory)
    assert second["tree_attention"] == []
    assert remembered_self_test(pytest.fail, CPU, "GPU, driver 1", memory) == first


def test_a_cpu_and_sdpa_use_the_references(tmp_path):
    for choice, device in (("auto", CPU), ("kernel", CPU), ("sdpa", torch.device("cuda"))):
        assert select_kernels(choice, device, torch.bfloat16, 64, tmp_path / "x") == REFERENCES


def test_asking_for_a_kernel_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"target\.attention is kernel, but there is none for torch\.float32"
    ):
        select_kernels("kernel", torch.device("cuda"), torch.float32, 64, tmp_path / "x")
