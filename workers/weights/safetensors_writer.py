"""Writing files of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file that is whole as soon as it is there; one that is there already is replaced."""
    partial = path.with_name(f"{path.name}.partial")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata=dict(metadata),
    )
    let_others_read(partial)
    partial.replace(path)


def let_others_read(path: Path) -> None:
    """Gives a file of the library, which lets nobody read it but its owner, the mode of any other new file."""
    other = path.with_name(f"{path.name}.mode")
    other.touch()
    path.chmod(other.stat().st_mode)
    other.unlink()
