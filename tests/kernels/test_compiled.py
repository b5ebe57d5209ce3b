"""NVRTC compiles every kernel for every target, within the limits, and the table in docs/ says so."""

import re
from itertools import product

import pytest

from outrider.kernels.compiler import (
    SOURCES,
    TARGETS,
    compile_cached,
    compile_sources,
    digest,
    load_sources,
    nvrtc_version,
    target_of,
)
from support import kernel_table
from support.cuda_on_cpu.executor import kernel_names
from support.cuda_on_cpu.kernels import OFTEN, compiled
from support.kernel_table import (
    TABLE,
    KernelReport,
    all_reports,
    document,
    form_of,
    resource_rows,
    status_table,
)

MAKE_TABLE = "run: python tests/support/kernel_table.py"


@pytest.fixture(scope="module", params=[OFTEN, pytest.param(TARGETS, marks=pytest.mark.slow)], ids=len)
def targets(request):
    """All of them take a minute of a processor, and what comes out changes with a kernel's form only, see below."""
    return request.param


@pytest.fixture(scope="module")
def found(targets):
    return all_reports(targets)


def test_every_kernel_is_compiled_for_every_target(found, targets):
    names = {name for stem in SOURCES for name in kernel_names(load_sources(stem), stem)}
    assert {(r.kernel, r.target) for r in found} == {(name, target) for name in names for target in targets}


def test_no_kernel_spills_or_exceeds_a_target_and_attention_uses_the_tensor_cores(found):
    assert [problem for report in found for problem in report.problems()] == []


def test_the_gates_see_a_bad_kernel():
    report = KernelReport("tree_attention_x", "sm_120", 255, 8, 16, 512, 120 << 10, {"HMMA": 4, "STL": 1})
    assert [problem.split(": ")[1] for problem in report.problems()] == [
        "8 bytes of stack, 16 spilled",
        "uses local memory",
        "255 registers for 512 threads",
        "122880 bytes of shared memory",
        "no LDSM instruction",
        "no LDGSTS instruction",
    ]


def test_the_table_in_the_repository_is_the_generated_one(found, targets):
    """With the forms in it: a kernel that was changed has to be compiled for all targets to get past this."""
    written = TABLE.read_text()
    if f"NVRTC {nvrtc_version()}." not in written:
        pytest.skip("the table was made by another NVRTC; constraints.txt says which")
    assert status_table() in written, MAKE_TABLE
    assert set(resource_rows(found)) <= set(written.splitlines()), MAKE_TABLE
    if targets == TARGETS:
        assert written == document(found), MAKE_TABLE


def test_the_status_table_claims_of_gpus_what_ran_there(monkeypatch):
    stem, other = SOURCES[0], SOURCES[1]
    monkeypatch.setattr(kernel_table, "RAN_ON", {"A": {stem: form_of(stem), other: "changed since"}, "B": {}})
    rows = status_table().splitlines()[2:]
    assert len(rows) == len(SOURCES) * len(TARGETS)
    said = {stem: "A", other: "a former form on an A"}
    for (source, target), row in zip(product(SOURCES, TARGETS), rows, strict=True):
        ran = said.get(source, "") if target == "sm_90a" else ""
        assert row.endswith(f"| yes | yes | yes | {ran} |"), row


def test_kernels_include_only_their_own_headers():
    for stem in SOURCES:
        for text in load_sources(stem).values():
            assert re.findall(r"#include <.*>", text) == []


def test_inline_assembly_is_in_three_files():
    for stem in SOURCES:
        for name, text in load_sources(stem).items():
            assert name in ("device.cuh", "fp8.cuh", "int4.cuh") or "asm" not in text


def test_a_second_compilation_comes_from_the_cache(tmp_path, monkeypatch):
    first = compile_cached("gather_rows", "sm_80", tmp_path)
    monkeypatch.setattr("outrider.kernels.compiler.compile_sources", lambda *_: pytest.fail("compiled again"))
    assert compile_cached("gather_rows", "sm_80", tmp_path) == first


def test_the_cache_key_depends_on_headers_and_target():
    sources = load_sources("gather_rows")
    changed = {**sources, "device.cuh": sources["device.cuh"] + "\n"}
    assert len({digest(sources, "sm_80"), digest(changed, "sm_80"), digest(sources, "sm_120")}) == 3


def test_a_compile_error_is_reported_with_the_compilers_words():
    with pytest.raises(RuntimeError, match=r"broken\.cu for sm_80(.|\n)*expected a"):
        compile_sources("broken", {"broken.cu": "KERNEL"}, "sm_80")


def test_capabilities_without_kernels_are_named():
    assert [target_of(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_80",
        "sm_80",
        *TARGETS[1:],
    ]
    with pytest.raises(ValueError, match=r"no kernels for compute capability 7\.5"):
        target_of((7, 5))


def test_ptx_has_the_kernels_of_the_source():
    for stem in SOURCES:
        names = re.findall(r"\.entry (\w+)\(", compiled("sm_90a")[stem].ptx)
        assert sorted(names) == sorted(kernel_names(load_sources(stem), stem))
