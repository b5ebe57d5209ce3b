"""What a directory as Hugging Face has them says of a model, besides the values of its weights."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.fields import Fields, read_json
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.tensors import EMBEDDING, HEAD, stored_tensors, tensor_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def names_to_fetch(directory: Path, names: Collection[str]) -> Collection[str]:
    """The tensors in whose files some tensors are: a tied head is in the embedding, if it is nowhere else, and
    narrow numbers have their scales beside them."""
    if not names:
        return names
    config = read_hf_config(directory)
    wanted = {*names, EMBEDDING} if HEAD in names and config.tied_embeddings else set(names)
    shapes = tensor_shapes(config)
    return {
        stored
        for name in wanted
        for stored in (stored_tensors(config, name, shapes[name]) if name in shapes else (name,))
    }


def read_hf_config(directory: Path) -> ModelConfig:
    """ModelConfig from config.json, with the end-of-sequence ids of generation_config.json added.

    Needs no weights. Raises ValueError when config.json is missing or is not JSON, or describes a model that is
    not supported.
    """
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter (adapter_config.json); merge it into its model first")
    path = directory / "config.json"
    raw = read_json(path)
    try:
        config = model_config_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    extra = generation_end_ids(directory, config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *extra))))


def generation_end_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids that a generation_config.json names, () without one; ValueError for what is no id."""
    path = directory / "generation_config.json"
    if not path.exists():
        return ()
    return Fields(read_json(path), f"{path}: ").token_ids("eos_token_id", vocab_size)


def weight_files(directory: Path, names: Collection[str]) -> list[Path]:
    """model.safetensors where there is one, as transformers does; else the shards of the index; else all files.

    `names`: tensors whose shards are wanted; none: all. Raises ValueError when a file is missing.
    """
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        paths = indexed_files(directory, names)
    else:
        paths = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{directory} lacks {missing[0]} ({len(missing)} of {len(paths)} weight files missing)"
        )
    if not paths:
        raise ValueError(f"{directory} has no .safetensors file")
    return paths


def indexed_files(directory: Path, names: Collection[str]) -> list[Path]:
    """The files that the index gives for some tensors (for none: all of its files), here or not.

    Raises ValueError for a damaged index, and for one that has none of the tensors.
    """
    index = directory / INDEX
    weight_map = Fields(read_json(index), f"{index}: ").object("weight_map")
    if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map must give the name of a file for each tensor")
    wanted = {file for name, file in weight_map.items() if not names or name in names}
    if names and not wanted:
        raise ValueError(f"{index} has no tensor {min(names)}")
    return [directory / name for name in sorted(wanted)]
