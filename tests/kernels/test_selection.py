"""Which kernels are used: those whose self-test passed, remembered, with one warning about the others.

The device is a CPU executor, or one that spoils a kernel's result.
"""

import sys
import warnings
from functools import partial

import pytest
import torch

from outrider.kernels.attention_cases import ATTENTION_CASES
from outrider.kernels.kernel_cases import prepare_attention, prepare_gather_rows, prepare_kv_commit
from outrider.kernels.selection import (
    REFERENCES,
    KernelSelection,
    passed,
    remembered_self_test,
    select_kernels,
)
from outrider.kernels.self_test import ENTRIES, cases_by_kernel, run_cases, self_test
from support.cuda_on_cpu.kernels import source_kernels

CPU = torch.device("cpu")
CASES = {
    "tree_attention": [partial(prepare_attention, ATTENTION_CASES[0])],
    "gather_rows": [partial(prepare_gather_rows, (8,), torch.float32)],
    "kv_commit": [partial(prepare_kv_commit, 4)],
}


def spoiled_attention(plans):
    source_kernels().launch(plans)
    for plan in plans:
        if plan.source == "tree_attention":
            plan.arguments[9].zero_()  # its output


def refusing_attention(plans):
    if plans[0].source == "tree_attention":
        raise RuntimeError("no kernel image is available")
    source_kernels().launch(plans)


def run(launch, cases=CASES):
    """What a self-test says about three kernels, and whether it came to its end."""
    said = []
    ended = run_cases(launch, CPU, cases, said.append)
    return {line["kernel"]: line["problems"] for line in said}, ended


def test_a_sound_device_passes_and_nothing_is_said():
    problems, ended = run(source_kernels().launch)
    assert (problems, ended) == ({name: [] for name in CASES}, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert passed({name: [] for name in ENTRIES}, "device") == KernelSelection.of(ENTRIES)


def test_a_wrong_result_turns_that_kernel_off_with_one_warning():
    problems, ended = run(spoiled_attention)
    assert ended
    with pytest.warns(
        UserWarning, match=r"tree_attention failed the self-test on device .* SDPA .* off by"
    ) as said:
        selected = passed({name: [] for name in ENTRIES} | problems, "device")
    assert len(said) == 1
    assert selected == KernelSelection.of([name for name in ENTRIES if name != "tree_attention"])


def test_what_raises_ends_the_process_whether_in_a_launch_or_before():
    """After an error the device may answer every call with one."""
    problems, ended = run(refusing_attention)
    assert problems == {
        "tree_attention": ["tree_attention: decode: RuntimeError: no kernel image is available"]
    }
    assert not ended

    def prepare(device):
        raise RuntimeError("an illegal memory access was encountered")

    problems, ended = run(
        source_kernels().launch, {"gather_rows": CASES["gather_rows"], "kv_commit": [prepare]}
    )
    assert problems["gather_rows"] == []
    assert problems["kv_commit"] == ["kv_commit: RuntimeError: an illegal memory access was encountered"]
    assert not ended


CHILD = """
import json, os, sys, time
names, script = sys.argv[3:], {script}
if "no GPU" in script: sys.exit("no GPU")
print(json.dumps({{"ready": True}}), flush=True)
for name in names:
    what = script.get(name, "passes")
    if what == "dies": os.abort()
    if what == "hangs": time.sleep(60)
    print(json.dumps({{"kernel": name, "problems": [] if what == "passes" else [what]}}), flush=True)
    if what != "passes": sys.exit(1)
"""


def in_children(tmp_path, script, names=ENTRIES, limit_s=30.0):
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(script=script))
    return self_test(0, names, (sys.executable, str(child), "unused"), limit_s)


def test_a_kernel_that_ends_its_process_spoils_no_other(tmp_path):
    script = {"tree_attention": "raises", "kv_commit": "dies"}
    problems = in_children(tmp_path, script)
    assert problems.pop("tree_attention") == ["raises"]
    assert "the self-test ended in it: exit code -6" in problems.pop("kv_commit")[0]
    assert problems == {name: [] for name in ENTRIES if name not in script}


def test_a_kernel_that_hangs_is_ended(tmp_path):
    problems = in_children(tmp_path, {"gather_rows": "hangs"}, ("kv_commit", "gather_rows"), limit_s=1.5)
    assert problems == {"kv_commit": [], "gather_rows": ["the self-test ended in it: no end after 1.5 s"]}


def test_a_self_test_that_cannot_begin_says_why_and_does_not_try_again(tmp_path):
    problems = in_children(tmp_path, {"no GPU": ""})
    assert problems == {name: ["the self-test could not begin: exit code 1, no GPU"] for name in ENTRIES}


def test_the_self_test_runs_as_a_process():
    problems = self_test(0, ("gather_rows",))["gather_rows"]
    if torch.cuda.is_available():
        assert problems == []
    else:
        assert problems[0].startswith("the self-test could not begin: exit code 1, ")


def test_passes_are_remembered_by_device_driver_and_sources_and_failures_are_not(tmp_path):
    memory, asked = tmp_path / "folder" / "passed.json", []

    def test(failing):
        def answer(names):
            asked.append(tuple(names))
            return {name: ["wrong"] if name == failing else [] for name in names}

        return answer

    first = remembered_self_test(test("kv_commit"), "GPU, driver 1", memory)
    assert first == {name: ["wrong"] if name == "kv_commit" else [] for name in ENTRIES}
    remembered_self_test(test(""), "GPU, driver 2", memory)
    assert remembered_self_test(test(""), "GPU, driver 1", memory) == {name: [] for name in ENTRIES}
    assert asked == [ENTRIES, ENTRIES, ("kv_commit",)]
    assert remembered_self_test(pytest.fail, "GPU, driver 1", memory) == {name: [] for name in ENTRIES}
    memory.write_text("{")
    remembered_self_test(test(""), "GPU, driver 1", memory)
    assert asked[3:] == [ENTRIES]


def test_every_kernel_has_cases():
    assert all(cases_by_kernel(ENTRIES).values())


def test_a_cpu_and_sdpa_use_the_references(tmp_path):
    for choice, device in (("auto", CPU), ("kernel", CPU), ("sdpa", torch.device("cuda"))):
        assert select_kernels(choice, device, torch.bfloat16, 64, tmp_path / "x") == REFERENCES


def test_asking_for_a_kernel_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"target\.attention is kernel, but there is none for torch\.float32"
    ):
        select_kernels("kernel", torch.device("cuda"), torch.float32, 64, tmp_path / "x")
