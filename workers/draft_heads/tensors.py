"""The tensors of a checkpoint of draft heads: read, compared with what the modules want, filled in, written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from outrider.workers.draft_heads.lm_head import LmHead
from outrider.workers.weights.hf_directory import SINGLE, weight_files
from outrider.workers.weights.safetensors_writer import write_tensors

CONFIG = "config.json"
# What SafeAILab and FasterDecoding publish where they publish no safetensors.
_PICKLES = ("pytorch_model.bin", "medusa_lm_head.pt")

# Of ids, not weights.
TABLES = frozenset(("d2t", "t2d", "token_map"))
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Sizes = tuple[int, ...]


def read_tensors(folder: Path, left_out: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder by name, as they are stored; of a target beside the heads those that are named in
    `left_out` are not read.

    Raises ValueError, one line, where there are none, or for a damaged file.
    """
    if any(folder.glob("*.safetensors")):
        paths = weight_files(folder, ())
    else:
        paths = [folder / name for name in _PICKLES if (folder / name).exists()]
    if not paths:
        raise ValueError(f"{folder} holds no .safetensors file, nor {' or '.join(_PICKLES)}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= _read_file(path, left_out)
    return tensors


def _read_file(path: Path, left_out: Collection[str]) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name not in left_out}  # noqa: SIM118
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} must hold tensors by name and nothing else")
    return {name: value for name, value in loaded.items() if name not in left_out}


def tensor_problems(
    expected: Mapping[str, Sizes], stored: Mapping[str, Tensor], harmless: Collection[str]
) -> list[str]:
    """What is wrong with the tensors of a file, a line for each kind: missing, of another shape, left over.

    Args:
        expected: shapes by the file's names.
        harmless: names that may be there although nobody reads them.
    """
    missing = sorted(expected.keys() - stored.keys())
    left_over = sorted(stored.keys() - expected.keys() - set(harmless))
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name].shape != shape
    ]
    packed = [
        f"{name} ({stored[name].dtype})"
        for name in sorted((expected.keys() & stored.keys()) - TABLES)
        if stored[name].dtype not in _READABLE
    ]
    found = (
        ("missing", missing),
        ("of another shape", wrong),
        ("not known here", left_over),
        ("stored in a type that cannot be read", packed),
    )
    return [f"tensors {kind}: {', '.join(names)}" for kind, names in found if names]


def fill(module: nn.Module, names: Mapping[str, str], stored: Mapping[str, Tensor]) -> None:
    """Gives a module on the meta device its weights, in float32; those that are not named stay there.

    `names`: of the file's tensors by the module's; shapes have been compared.
    """
    weights = {name: stored[file_name].float() for name, file_name in names.items()}
    module.load_state_dict(weights, assign=True, strict=False)


def shapes_of(module: nn.Module, names: Mapping[str, str]) -> dict[str, Sizes]:
    """Shapes of a module's weights by the file's names."""
    return {names[name]: tuple(weight.shape) for name, weight in module.state_dict().items()}


def sort_rows(ids: Tensor, stored: dict[str, Tensor], row_names: Sequence[str]) -> Tensor:
    """Ascending ids; the rows of the matrices `row_names` go with theirs."""
    order = ids.argsort()
    if not bool((order.diff() > 0).all()):
        for name in row_names:
            stored[name] = stored[name][order]
    return ids[order]


def row_names(names: Mapping[str, str]) -> list[str]:
    """The file's names of all matrices that have a row for each id."""
    own = ("lm_head.weight", "lm_head.up.weight")
    return [
        file_name
        for name, file_name in names.items()
        if name in own or (name.startswith("lm_heads.") and not name.endswith(".down.weight"))
    ]


def offsets_of(head: LmHead, vocab_size: int) -> dict[str, Tensor]:
    """The two tables of a trimmed head: d2t int64 [V'], id minus place, and t2d bool [V]; {} for all tokens."""
    ids = head.ids.cpu()
    if len(ids) == vocab_size:
        return {}
    member = torch.zeros(vocab_size, dtype=torch.bool)
    member[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": member}


def table_shapes(num_ids: int, vocab_size: int, stored: Collection[str]) -> dict[str, Sizes]:
    """Shapes of d2t and t2d in a file: d2t must be there for a part of the vocabulary, t2d may be."""
    needed = {"d2t"} if num_ids < vocab_size else set()
    shapes: dict[str, Sizes] = {"d2t": (num_ids,), "t2d": (vocab_size,)}
    return {name: shape for name, shape in shapes.items() if name in needed or name in stored}


def ids_from_tables(num_ids: int, vocab_size: int, stored: Mapping[str, Tensor]) -> Tensor:
    """int64 [num_ids], not always ascending. ValueError when the tables name no tokens, or not the same ones."""
    places = torch.arange(num_ids)
    ids = places + stored["d2t"].long() if "d2t" in stored else places
    check_ids(ids, vocab_size, "d2t")
    if "t2d" in stored:
        member = stored["t2d"].bool()
        if int(member.sum()) != num_ids or not bool(member[ids].all()):
            raise ValueError("d2t and t2d do not name the same tokens")
    return ids


def check_ids(ids: Tensor, vocab_size: int, name: str) -> None:
    """ValueError unless they are distinct tokens."""
    inside = bool((ids >= 0).all() and (ids < vocab_size).all())
    if not inside or len(ids.unique()) != len(ids):
        raise ValueError(f"{name} must name distinct tokens below {vocab_size}")


def write_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """config.json and model.safetensors; floats as `dtype`. A folder that holds a checkpoint is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: two names may be one tensor, which the format does not have.
    stored = {
        name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor).clone()
        for name, tensor in tensors.items()
    }
    write_tensors(folder / SINGLE, stored, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def raise_problems(folder: Path, problems: Sequence[str]) -> None:
    """One ValueError for all of them, if there are any."""
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
