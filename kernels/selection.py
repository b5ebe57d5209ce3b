"""Which kernels a GPU may use. With `auto`, those whose self-test has passed there; the answer is remembered by GPU,
driver and the kernels' own sources."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from outrider.kernels.kernel_cases import Preparation, kernel_cases
from outrider.kernels.launch_plans import HEAD_DIMS, TYPE_NAMES, LaunchPlan

AttentionChoice = Literal["auto", "kernel", "sdpa"]
DEFAULT_MEMORY = Path.home() / ".cache" / "outrider" / "kernels" / "self_test.json"
ENTRIES = ("tree_attention", "rope_append", "kv_commit", "sample_shard", "gather_rows")
Launch = Callable[[Sequence[LaunchPlan]], None]


@dataclass(frozen=True)
class KernelSelection:
    """Whether each entry runs its kernel; what its `use_kernel` argument should be."""

    tree_attention: bool
    rope_append: bool
    kv_commit: bool
    sample_shard: bool
    gather_rows: bool

    @staticmethod
    def of(names: Sequence[str]) -> "KernelSelection":
        return KernelSelection(**{name: name in names for name in ENTRIES})


REFERENCES = KernelSelection.of(())


def self_test(launch: Launch, device: torch.device, cases: Sequence[Preparation]) -> dict[str, list[str]]:
    """Runs cases on a device: what is wrong with each kernel, by entry name; empty lists where all is well.

    An exception of a launch counts against the kernel: a GPU on which it cannot start must not use it.
    """
    problems: dict[str, list[str]] = {name: [] for name in ENTRIES}
    for prepare in cases:
        case = prepare(device)
        try:
            launch(case.plans)
            found = case.verify()
        except Exception as error:
            found = [f"{case.name}: {type(error).__name__}: {error}"]
        problems[case.kernel] += found
    return problems


def remembered_self_test(
    launch: Launch, device: torch.device, key: str, memory: Path
) -> dict[str, list[str]]:
    """`self_test` of all cases, once per `key` (GPU, driver, sources); the results are kept in the file `memory`."""
    known: dict[str, dict[str, list[str]]] = json.loads(memory.read_text()) if memory.exists() else {}
    if key not in known:
        known[key] = self_test(launch, device, kernel_cases())
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(
            f".{torch.randint(1 << 62, ()).item()}"
        )  # ranks may test at the same time
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(memory)
    return known[key]


def passed(problems: dict[str, list[str]], device_name: str) -> KernelSelection:
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
        memory: file in which self-test results are kept.

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

        launcher = launcher_of(device)
    except (ImportError, ValueError) as error:
        if choice == "kernel":
            raise ValueError(f"target.attention is kernel, but {error}") from error
        warnings.warn(f"no kernels on {device}: {error}; attention falls back to torch's SDPA", stacklevel=2)
        return REFERENCES
    if choice == "kernel":
        return KernelSelection.of(ENTRIES)
    name = torch.cuda.get_device_name(device)
    selected = passed(remembered_self_test(launcher.launch, device, _memory_key(name), memory), name)
    if attention_fits:
        return selected
    warnings.warn(
        f"no attention kernel for {dtype} with head size {head_dim}: torch's SDPA is used", stacklevel=2
    )
    return KernelSelection.of(
        [x for x in ENTRIES if getattr(selected, x) and x not in ("tree_attention", "rope_append")]
    )


def _memory_key(device_name: str) -> str:
    from cuda.bindings import driver

    from outrider.kernels.compiler import SOURCES, digest, load_sources

    digests = "".join(digest(load_sources(stem), "")[:8] for stem in SOURCES)
    return f"{device_name}, driver {driver.cuDriverGetVersion()[1]}, kernels {digests}"
