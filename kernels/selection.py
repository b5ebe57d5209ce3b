"""Which kernels a GPU may use. With `auto`, those whose self-test has passed there; passes are remembered by GPU,
driver and the kernels' own sources."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from outrider.kernels.launch_plans import TYPE_NAMES
from outrider.kernels.self_test import ENTRIES, Problems, self_test
from outrider.kernels.tree_attention import HEAD_DIMS

AttentionChoice = Literal["auto", "kernel", "sdpa"]
DEFAULT_MEMORY = Path.home() / ".cache" / "outrider" / "kernels" / "passed.json"


@dataclass(frozen=True)
class KernelSelection:
    """Whether each entry runs its kernel; what its `use_kernel` argument should be.

    `tree_attention_fp8` and `rope_append_fp8` are those of a cache in FP8, see `of_fp8_cache`.
    """

    tree_attention: bool
    tree_attention_fp8: bool
    rope_append: bool
    rope_append_fp8: bool
    kv_commit: bool
    sample_shard: bool
    gather_rows: bool
    add_rms_norm: bool
    silu_mul: bool
    round_rows: bool
    narrow_matmul: bool
    int4_matmul: bool
    grow_trees: bool

    @staticmethod
    def of(names: Sequence[str]) -> "KernelSelection":
        return KernelSelection(**{name: name in names for name in ENTRIES})

    def of_fp8_cache(self) -> "KernelSelection":
        """For a model whose cache is in FP8."""
        return replace(self, tree_attention=self.tree_attention_fp8, rope_append=self.rope_append_fp8)


REFERENCES = KernelSelection.of(())


def remembered_self_test(test: Callable[[Sequence[str]], Problems], key: str, memory: Path) -> Problems:
    """What `test` finds wrong with each kernel; those that have passed under this `key` are not tested again.

    Only passes are kept, in the file `memory`: a failure may have been the machine's, and the next start tries again.

    Args:
        test: says what is wrong with the kernels of these names.
        key: GPU, driver and sources.
    """
    known = _remembered(memory).get(key, [])
    untested = [name for name in ENTRIES if name not in known]
    problems: Problems = {name: [] for name in ENTRIES}
    if untested:
        problems |= test(untested)
        passes = [name for name in ENTRIES if not problems[name]]
        memory.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may test at the same time.
        unfinished = memory.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({**_remembered(memory), key: passes}, indent=1))
        unfinished.replace(memory)
    return problems


def _remembered(memory: Path) -> dict[str, list[str]]:
    """By key, the kernels that have passed; nothing where the file cannot be read, which costs another test."""
    try:
        found: dict[str, list[str]] = json.loads(memory.read_text())
        return found
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def passed(problems: Problems, device_name: str) -> KernelSelection:
    """Kernels without problems; one warning about the others."""
    failed = {name: found for name, found in problems.items() if found}
    if failed:
        first = next(iter(failed.values()))[0]
        text = f"{', '.join(failed)} failed the self-test on {device_name} and will not be used"
        if "tree_attention" in failed:
            text += "; attention falls back to torch's SDPA over gathered pages"
        warnings.warn(f"{text} ({first})", stacklevel=2)
    return KernelSelection.of([name for name in ENTRIES if name not in failed])


def select_kernels(
    choice: AttentionChoice, device: torch.device, dtype: torch.dtype, head_dim: int, memory: Path
) -> KernelSelection:
    """What to use on a device, for a model of this type and head size.

    Args:
        choice: "sdpa": torch's operations only; "kernel": ours, untested; "auto": ours where the self-test passed.
        memory: file in which the passes of self-tests are kept.

    Raises:
        ValueError: "kernel" where there is none for the device, type or head size.
    """
    if device.type != "cuda" or choice == "sdpa":
        return REFERENCES
    attention_fits = dtype in TYPE_NAMES and head_dim in HEAD_DIMS
    if choice == "kernel" and not attention_fits:
        raise ValueError(
            f"target.attention is kernel, but there is none for {dtype} with head size {head_dim}; "
            f"there are for bfloat16 and float16 with head size {' and '.join(map(str, HEAD_DIMS))}; use auto or sdpa"
        )
    # Needs cuda-core, which a machine without a GPU need not have.
    try:
        from outrider.kernels.launcher import launcher_of

        launcher_of(device)
    except (ImportError, ValueError) as error:
        if choice == "kernel":
            raise ValueError(f"target.attention is kernel, but {error}") from error
        warnings.warn(f"no kernels on {device}: {error}; attention falls back to torch's SDPA", stacklevel=2)
        return REFERENCES
    if choice == "kernel":
        return KernelSelection.of(ENTRIES)
    name = torch.cuda.get_device_name(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    selected = passed(remembered_self_test(partial(self_test, index), _memory_key(name), memory), name)
    if attention_fits:
        return selected
    warnings.warn(
        f"no attention kernel for {dtype} with head size {head_dim}: torch's SDPA is used", stacklevel=2
    )
    unfit = ("tree_attention", "tree_attention_fp8", "rope_append", "rope_append_fp8")
    return KernelSelection.of([x for x in ENTRIES if getattr(selected, x) and x not in unfit])


def _memory_key(device_name: str) -> str:
    from cuda.bindings import driver

    from outrider.kernels.compiler import SOURCES, digest, load_sources

    digests = "".join(digest(load_sources(stem), "")[:8] for stem in SOURCES)
    return f"{device_name}, driver {driver.cuDriverGetVersion()[1]}, kernels {digests}"
