"""The checks catch the faults they are there for. One fault each of the hardest kinds always, all under -m slow."""

from dataclasses import replace

import pytest

from support.cuda_on_cpu.planted_bugs import DEVICE_BUGS, SOURCE_BUGS, PlantedBug, hunt

ALWAYS = {
    "no barrier after the copies",
    "window by row instead of depth",
    "keys before the window are read",
    "squares of the warps read too early",
    "a product with the inverse in place of a division",
    "mma: b registers swapped",
    "cp.async waits for one group too few",
    "FP8 written to the other half",
    "FP8 subnormals in another unit",
    "waits for too few chunks",
    "a group with the scale of the next",
    "4 bits: a group with the scale of the one before",
}


SOUND = PlantedBug("none", "tree_attention", "tree_attention.cu", "LINE = D + 8;", "LINE = D + 8;")
SOUND_IN_FP8 = (
    replace(SOUND, narrow=True),
    PlantedBug("none", "rope_append", "rope_append.cu", "if (row < 0) return;", "if (row < 0) return;", True),
)
SOUND_PRODUCTS = (
    PlantedBug("none", "narrow_matmul", "narrow_matmul.cu", "STEPS = 4 };", "STEPS = 4 };"),
    PlantedBug("none", "int4_matmul", "int4_matmul.cu", "LEAST_GROUP = 32 };", "LEAST_GROUP = 32 };"),
)


def some_slow(bugs):
    return [pytest.param(b, id=b.name, marks=() if b.name in ALWAYS else pytest.mark.slow) for b in bugs]


@pytest.mark.parametrize("executor", ["source", pytest.param("ptx", marks=pytest.mark.slow)])
def test_nothing_is_found_in_the_sound_kernel_sanitizers_included(executor):
    assert hunt(SOUND, executor) == ""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["source", "ptx"])
@pytest.mark.parametrize("sound", SOUND_PRODUCTS, ids=lambda sound: sound.stem)
def test_nothing_is_found_in_the_sound_products(sound, executor):
    assert hunt(sound, executor) == ""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["source", "ptx"])
@pytest.mark.parametrize("sound", SOUND_IN_FP8, ids=lambda sound: sound.stem)
def test_nothing_is_found_in_sound_kernels_of_a_cache_in_fp8(sound, executor):
    assert hunt(sound, executor) == ""


@pytest.mark.parametrize("bug", some_slow(SOURCE_BUGS))
def test_a_fault_in_a_kernel_is_found_by_running_the_source(bug):
    assert hunt(bug, "source")


@pytest.mark.parametrize("bug", some_slow(DEVICE_BUGS))
def test_a_fault_in_an_instruction_is_found_by_running_the_ptx(bug):
    assert hunt(bug, "ptx")


@pytest.mark.parametrize(
    ("name", "sanitizer", "finding"),
    [
        ("no barrier after the copies", "thread", "race"),
        ("splits write the same place", "thread", "race"),
        ("more shared memory than planned", "address", "address"),
    ],
)
def test_the_sanitizers_find_what_they_are_there_for(name, sanitizer, finding):
    bug = next(bug for bug in SOURCE_BUGS if bug.name == name)
    assert hunt(bug, "source", [sanitizer]) == finding
