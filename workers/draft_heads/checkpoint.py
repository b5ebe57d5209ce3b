"""Checkpoints of draft heads: EAGLE-3, Medusa, MTP, parallel, and an LM head alone, as others and as we lay them out.

Strict: a tensor that is missing, left over or of another shape, and a field that would be left out, are one
ValueError that lists all of them. What is read is in float32; who uses it casts it. Layouts: see `layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from outrider.workers.draft_heads.description import (
    KEY,
    HeadDescription,
    fingerprint,
    fingerprint_ids,
)
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.layouts.eagle3 import (
    HARMLESS_TENSORS,
    Eagle3Layout,
    eagle3_config,
    read_eagle3_config,
    tensor_names,
)
from outrider.workers.draft_heads.layouts.heads import (
    dtype_name,
    own_description,
    rank_fields,
    read_rank,
    unknown_fields,
)
from outrider.workers.draft_heads.layouts.medusa import (
    MEDUSA_2,
    TOKEN_MAP,
    MedusaFile,
    MedusaLayout,
    layout_prefix,
    medusa_config,
    medusa_names,
    read_medusa_config,
)
from outrider.workers.draft_heads.layouts.mtp import (
    MtpLayout,
    copies_of_the_target,
    layout_of,
    mtp_config,
    mtp_names,
    read_mtp_config,
)
from outrider.workers.draft_heads.layouts.parallel import HARMLESS_TENSORS as HARMLESS_BESIDE_BLOCKS
from outrider.workers.draft_heads.layouts.parallel import (
    parallel_config,
    read_parallel_config,
    with_lm_head,
)
from outrider.workers.draft_heads.layouts.parallel import tensor_names as parallel_names
from outrider.workers.draft_heads.lm_head import LmHead, LmHeadShape, make_lm_head
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import SUCCESSOR_ROWS, ParallelDrafter
from outrider.workers.draft_heads.tensors import (
    CONFIG,
    check_ids,
    fill,
    ids_from_tables,
    offsets_of,
    raise_problems,
    read_tensors,
    row_names,
    shapes_of,
    sort_rows,
    table_shapes,
    tensor_problems,
    write_files,
)
from outrider.workers.weights.fields import Fields, read_json
from outrider.workers.weights.tensors import HEAD, tensor_shapes

T = TypeVar("T")

_LM_HEAD = "outrider_lm_head"  # model_type of a head alone; nobody else has such files
_EMBEDDING = "embed_tokens.weight"


def read_eagle3(folder: Path, target_num_layers: int | None = None) -> tuple[Eagle3Drafter, HeadDescription]:
    """An EAGLE-3 drafter, in float32.

    Args:
        folder: config.json with safetensors or pytorch_model.bin; of either layout, which the file says.
        target_num_layers: needed for a file that does not name its taps; None if it is not known.

    Raises:
        ValueError: see the module; also for drafters of several layers, with biases, quantised, of another family,
            and with norms that `Eagle3Drafter` has not.
    """
    raw = read_json(folder / CONFIG)
    file = _of_file(folder, lambda: read_eagle3_config(raw, target_num_layers))
    shape, stored = file.shape, read_tensors(folder)
    num_ids = shape.lm_head.num_ids
    with torch.device("meta"):
        drafter = Eagle3Drafter(shape, torch.arange(num_ids, device="cpu"))
    names = tensor_names(list(drafter.state_dict()), list(stored), "specforge")
    expected = shapes_of(drafter, names) | table_shapes(num_ids, shape.vocab_size, stored)
    raise_problems(folder, file.problems + tensor_problems(expected, stored, HARMLESS_TENSORS))
    ids = _of_file(folder, lambda: ids_from_tables(num_ids, shape.vocab_size, stored))
    drafter.lm_head.ids = sort_rows(ids, stored, row_names(names))
    fill(drafter, names, stored)
    return drafter, file.description.or_else(HeadDescription(target_fingerprint=_fingerprint(stored)))


def read_medusa(folder: Path) -> tuple[MedusaHeads, HeadDescription]:
    """Medusa heads, in float32; of a Medusa-2 checkpoint the heads, not the target beside them.

    Raises ValueError, see the module; also for quantised heads.
    """
    raw, stored = read_json(folder / CONFIG), read_tensors(folder)
    file = _of_file(folder, lambda: read_medusa_config(raw, stored))
    shape = file.shape
    num_ids = shape.lm_head.num_ids
    with torch.device("meta"):
        heads = MedusaHeads(shape, torch.arange(num_ids, device="cpu"))
    names = medusa_names(list(heads.state_dict()), shape.num_layers, file.layout, file.prefix)
    ours, expected = _medusa_tensors(file, names, stored), shapes_of(heads, names)
    ids = torch.arange(num_ids)
    if num_ids < shape.vocab_size:
        expected[TOKEN_MAP] = (num_ids,)
        if TOKEN_MAP in ours and ours[TOKEN_MAP].shape == (num_ids,):
            ids = ours[TOKEN_MAP].long()
            _of_file(folder, lambda: check_ids(ids, shape.vocab_size, TOKEN_MAP))
            for name in row_names(names):  # rows of all tokens, as vLLM allows
                if name in ours and len(ours[name]) == shape.vocab_size:
                    ours[name] = ours[name][ids]
    raise_problems(folder, file.problems + tensor_problems(expected, ours, ()))
    ids = sort_rows(ids, ours, row_names(names))
    for lm_head in heads.lm_heads:
        assert isinstance(lm_head, LmHead)
        lm_head.ids = ids
    fill(heads, names, ours)
    return heads, file.description


def read_mtp(folder: Path) -> tuple[MtpDrafter, HeadDescription]:
    """A head for multi-token prediction, in float32, without what is the target's: see `MtpDrafter.take_target`.

    A folder that holds the target as well is read without its tensors. Raises ValueError, see the module; also for
    heads of several layers.
    """
    raw = read_json(folder / CONFIG)
    file = _of_file(folder, lambda: read_mtp_config(raw))
    shape, target = file.shape, file.shape.target
    num_ids = shape.lm_head.num_ids
    of_target = set(tensor_shapes(target)) - ({HEAD} if file.is_speculators else set())
    stored = read_tensors(folder, of_target)
    with torch.device("meta"):
        drafter = MtpDrafter(shape, torch.arange(num_ids, device="cpu"))
    names = mtp_names(list(drafter.state_dict()), target.num_layers, layout_of(file, stored))
    of_head = {name for name in names if name.startswith("lm_head.")}
    is_target_sized = shape.lm_head.is_target_sized(target.vocab_size)
    drafter.shares_lm_head = is_target_sized and not any(names[name] in stored for name in of_head)
    if drafter.shares_lm_head:
        names = {name: file_name for name, file_name in names.items() if name not in of_head}
    expected = {names[name]: tuple(x.shape) for name, x in drafter.state_dict().items() if name in names}
    expected |= table_shapes(num_ids, target.vocab_size, stored)
    harmless = copies_of_the_target(target.num_layers)
    raise_problems(folder, file.problems + tensor_problems(expected, stored, harmless))
    ids = _of_file(folder, lambda: ids_from_tables(num_ids, target.vocab_size, stored))
    rows = [names[name] for name in ("lm_head.weight", "lm_head.up.weight") if name in names]
    drafter.lm_head.ids = sort_rows(ids, stored, rows)
    fill(drafter, names, stored)
    return drafter, file.description


def read_parallel(folder: Path) -> tuple[ParallelDrafter, HeadDescription]:
    """A parallel drafter, in float32, without what is the target's: see `ParallelDrafter.take_target`.

    Raises ValueError, see the module.
    """
    raw = read_json(folder / CONFIG)
    file = _of_file(folder, lambda: read_parallel_config(raw))
    shape, stored = file.shape, read_tensors(folder)
    num_ids = shape.lm_head.num_ids
    with torch.device("meta"):
        drafter = ParallelDrafter(shape, torch.arange(num_ids, device="cpu"))
    names = parallel_names(list(drafter.state_dict()))
    drafter.shares_lm_head = not shape.lm_head.is_low_rank and "lm_head.weight" not in stored
    if drafter.shares_lm_head:
        del names["lm_head.weight"]
    expected = {names[name]: tuple(x.shape) for name, x in drafter.state_dict().items() if name in names}
    expected |= table_shapes(num_ids, shape.vocab_size, stored)
    raise_problems(folder, file.problems + tensor_problems(expected, stored, HARMLESS_BESIDE_BLOCKS))
    ids = _of_file(folder, lambda: ids_from_tables(num_ids, shape.vocab_size, stored))
    drafter.lm_head.ids = sort_rows(ids, stored, _rows_of_ids(names))
    fill(drafter, names, stored)
    return drafter, file.description.or_else(HeadDescription(target_fingerprint=_fingerprint(stored)))


def _rows_of_ids(names: dict[str, str]) -> list[str]:
    """The file's names of the matrices of a parallel drafter that have a row for each id."""
    own = ("lm_head.weight", "lm_head.up.weight", *SUCCESSOR_ROWS)
    return [names[name] for name in own if name in names]


def read_lm_head(folder: Path) -> tuple[LmHead, HeadDescription]:
    """An LM head alone, in float32, as `write_lm_head` wrote it. Raises ValueError, see the module."""
    fields = Fields(read_json(folder / CONFIG))

    def read_config() -> tuple[LmHeadShape, int, HeadDescription, list[str]]:
        fields.text("model_type", (_LM_HEAD,))
        hidden_size, vocab_size = fields.integer("hidden_size"), fields.integer("vocab_size")
        num_ids = fields.integer("draft_vocab_size", 1, vocab_size)
        shape = LmHeadShape(hidden_size, num_ids, read_rank(fields, hidden_size))
        description = own_description(fields, HeadDescription(target_vocab_size=vocab_size))
        fields.ignore(("torch_dtype",))
        return shape, vocab_size, description, unknown_fields(fields)

    shape, vocab_size, description, problems = _of_file(folder, read_config)
    stored = read_tensors(folder)
    with torch.device("meta"):
        head = make_lm_head(shape, torch.arange(shape.num_ids, device="cpu"))
    names = {name: f"lm_head.{name}" for name in head.state_dict()}
    expected = shapes_of(head, names) | table_shapes(shape.num_ids, vocab_size, stored)
    raise_problems(folder, problems + tensor_problems(expected, stored, ()))
    ids = _of_file(folder, lambda: ids_from_tables(shape.num_ids, vocab_size, stored))
    rows = "lm_head.up.weight" if shape.is_low_rank else "lm_head.weight"
    head.ids = sort_rows(ids, stored, [rows])
    fill(head, names, stored)
    return head, description


def write_eagle3(
    folder: Path,
    drafter: Eagle3Drafter,
    description: HeadDescription,
    layout: Eagle3Layout,
    dtype: torch.dtype,
) -> None:
    """Writes config.json and model.safetensors; ValueError for a drafter that the layout cannot describe."""
    config = eagle3_config(drafter.shape, description, layout, dtype)
    weights = drafter.state_dict()
    names = tensor_names(list(weights), [], layout)
    tables = offsets_of(drafter.lm_head, drafter.shape.vocab_size)
    write_files(folder, config, {names[name]: x for name, x in weights.items()} | tables, dtype)


def write_mtp(
    folder: Path, drafter: MtpDrafter, description: HeadDescription, layout: MtpLayout, dtype: torch.dtype
) -> None:
    """Writes config.json and model.safetensors, without an LM head that is the target's."""
    target = drafter.shape.target
    config = mtp_config(drafter.shape, description, layout, dtype)
    weights = {
        name: x
        for name, x in drafter.state_dict().items()
        if not (drafter.shares_lm_head and name.startswith("lm_head."))
    }
    names = mtp_names(list(weights), target.num_layers, layout)
    tables = offsets_of(drafter.lm_head, target.vocab_size)
    write_files(folder, config, {names[name]: x for name, x in weights.items()} | tables, dtype)


def write_parallel(
    folder: Path, drafter: ParallelDrafter, description: HeadDescription, dtype: torch.dtype
) -> None:
    """Writes config.json and model.safetensors in our own layout, without an LM head that is the target's."""
    _write_parallel(folder, drafter, parallel_config(drafter.shape, description, dtype), dtype)


def write_parallel_as(
    folder: Path, drafter: ParallelDrafter, description: HeadDescription, source: Path, dtype: torch.dtype
) -> None:
    """As `write_parallel`, in the layout of the checkpoint in the folder `source`, which has the same drafter with
    another LM head: our own layout cannot describe all drafters that are read."""
    config = with_lm_head(read_json(source / CONFIG), drafter.shape.lm_head, description, dtype)
    _write_parallel(folder, drafter, config, dtype)


def _write_parallel(
    folder: Path, drafter: ParallelDrafter, config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    weights = {
        name: x
        for name, x in drafter.state_dict().items()
        if not (drafter.shares_lm_head and name.startswith("lm_head."))
    }
    names = parallel_names(list(weights))
    tables = offsets_of(drafter.lm_head, drafter.shape.vocab_size)
    write_files(folder, config, {names[name]: x for name, x in weights.items()} | tables, dtype)


def write_medusa(
    folder: Path, heads: MedusaHeads, description: HeadDescription, layout: MedusaLayout, dtype: torch.dtype
) -> None:
    """Writes config.json and model.safetensors; ValueError for heads that the layout cannot describe."""
    shape = heads.shape
    config = medusa_config(shape, description, layout, dtype)
    weights = heads.state_dict()
    names = medusa_names(list(weights), shape.num_layers, layout, layout_prefix(layout))
    table = {TOKEN_MAP: heads.ids} if shape.lm_head.num_ids < shape.vocab_size else {}
    write_files(folder, config, {names[name]: x for name, x in weights.items()} | table, dtype)


def write_lm_head(folder: Path, head: LmHead, description: HeadDescription, dtype: torch.dtype) -> None:
    """Writes config.json and model.safetensors of a head alone, with the tables d2t and t2d if it is trimmed.

    `description.target_vocab_size` is the vocabulary that the head's ids belong to.
    """
    shape, vocab_size = head.shape, description.target_vocab_size
    assert vocab_size > int(head.ids[-1])
    config = {
        "model_type": _LM_HEAD,
        "hidden_size": shape.hidden_size,
        "vocab_size": vocab_size,
        "draft_vocab_size": shape.num_ids,
        **rank_fields(shape),
        **dtype_name(dtype),
        KEY: description.to_json(),
    }
    weights = {f"lm_head.{name}": x for name, x in head.state_dict().items()}
    write_files(folder, config, weights | offsets_of(head, vocab_size), dtype)


def _medusa_tensors(file: MedusaFile, names: dict[str, str], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that are read, without those of the target."""
    ours = dict(stored)
    if file.prefix == MEDUSA_2:
        ours = {name: x for name, x in stored.items() if name.startswith(MEDUSA_2)}
    if file.layout == "vllm":
        # vLLM drops the prefix of its names and knows the shared head by a second one.
        ours = {file.prefix + name.removeprefix(file.prefix): x for name, x in stored.items()}
        aliases = {"lm_head.weight": file.prefix + "lm_heads.0.weight", TOKEN_MAP: TOKEN_MAP}
        for alias, name in aliases.items():
            if file.prefix + alias in ours and name not in ours:
                ours[name] = ours.pop(file.prefix + alias)
    if not file.has_bias:
        biases = {name for name in names.values() if name.endswith(".bias")}
        ours |= {name: torch.zeros(file.shape.hidden_size) for name in biases - ours.keys()}
    return ours


def _fingerprint(stored: dict[str, Tensor]) -> str:
    """Of the target's embedding, where a checkpoint carries a copy."""
    embedding = stored.get(_EMBEDDING)
    return "" if embedding is None else fingerprint(embedding[fingerprint_ids(len(embedding))])


def _of_file(folder: Path, read: Callable[[], T]) -> T:
    """What `read` gives; its ValueErrors name the folder."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
