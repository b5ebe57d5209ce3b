"""From a configuration to what a trainer runs: a module with a loss, and texts with what that module reads."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from outrider.configs.training import TrainingConfig
from outrider.kernels.selection import DEFAULT_MEMORY, select_kernels
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, default_taps
from outrider.workers.draft_heads.medusa import MedusaHeads
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.setup import torch_dtype
from outrider.workers.training.computed_rows import ComputedRows, FeatureComputer, HeldRows
from outrider.workers.training.data import Corpus, TrainingText
from outrider.workers.training.eagle3 import Eagle3Training, drafter_shape, start_from_last_layer
from outrider.workers.training.feature_batch import BatchReader, FeatureBatch, WantedRows
from outrider.workers.training.feature_store import FeatureFiles
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.heads import head_shape, low_rank_head, read_ids, start_head
from outrider.workers.training.kept_rows import KeptRows, kept_files
from outrider.workers.training.medusa1 import Medusa1Training, heads_shape, start_heads
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.mtp import MtpTraining, head_shape_for, start_from_layer
from outrider.workers.training.parallel import (
    ParallelTraining,
    check_mask_token,
    start_from_last_layers,
)
from outrider.workers.training.parallel import drafter_shape as parallel_shape
from outrider.workers.training.saving import Drafter, describe, save_drafter, start_from
from outrider.workers.training.target import open_target, resolve_target
from outrider.workers.weights.progress import Progress, silent
from outrider.workers.weights.safetensors_writer import write_tensors
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING

_ALL = slice(None)
_START_TEXTS = 200
_START_TOKENS = 12_000


class TrainingModule(Protocol):
    """What `Task.module` can do besides being an `nn.Module`."""

    @property
    def num_guesses(self) -> int:
        """K: steps or heads."""
        ...

    def set_progress(self, fraction: float) -> None:
        """Told before each step which part of all steps is done."""
        ...

    def count_labels(self, batch: FeatureBatch) -> Tensor:
        """float32 [K]."""
        ...

    def __call__(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """(loss, counts)."""
        ...


@dataclass(frozen=True)
class Task:
    """What one rank trains.

    Attributes:
        module: an nn.Module that is a `TrainingModule`.
        training, held_out: batches.
        save: writes the drafter to a folder, with accuracies by step and rank.
        lr_factors: (parameters, factor on the learning rate), all trained parameters once.
    """

    module: nn.Module
    training: BatchReader
    held_out: BatchReader
    save: Callable[[Path, tuple[tuple[float, ...], ...]], None]
    lr_factors: Sequence[tuple[list[nn.Parameter], float]]


def wanted_rows(config: TrainingConfig, source: WeightSource) -> WantedRows:
    """What `config.method`, any but medusa2, reads of the target."""
    ids = read_ids(config.head, source.config.vocab_size)
    taps = _taps(config, source.config.num_layers)
    return WantedRows(taps, not taps, ids, config.texts.top_k)


def _taps(config: TrainingConfig, num_layers: int) -> tuple[int, ...]:
    """Layers whose inputs `config.method` reads; () where it reads what leaves the last one."""
    if config.method not in ("eagle3", "parallel"):
        return ()
    if config.method == "parallel" and config.parallel.taps:
        return config.parallel.taps
    if num_layers < 4:
        raise ValueError(f"method {config.method} needs a target of at least 4 layers, got {num_layers}")
    return default_taps(num_layers)


def _files(config: TrainingConfig, wanted: WantedRows, texts: Sequence[TrainingText]) -> FeatureFiles:
    return FeatureFiles(
        texts, wanted, _features_folder(config), f"{config.target.model} {config.target.dtype}"
    )


def _features_folder(config: TrainingConfig) -> Path:
    own = Path(config.out).expanduser() / "features"
    shared = config.texts.features_directory
    return Path(shared).expanduser() if shared else own


def prepare_rows(
    config: TrainingConfig, corpus: Corpus, say: Callable[[str], None], progress: Progress
) -> None:
    """Computes the rows that are to be kept and are not, before any rank starts; says how large they are.

    Raises ValueError where the disk has no room for them, or where `texts.features` is `kept` and they are not there.
    """
    if config.method == "medusa2" or config.texts.features not in ("cached", "kept"):
        return
    source = open_target(config, progress)
    wanted = wanted_rows(config, source)
    texts = [*corpus.training, *corpus.held_out]
    if config.texts.features == "kept":
        kept_files(texts, wanted.taps, config.target.model, source.config)
        return
    parts = [_files(config, wanted, some) for some in (corpus.training, corpus.held_out)]
    tokens = sum(files.num_missing for files in parts)
    if not tokens:
        return
    size = tokens * wanted.bytes_per_token(source.config.hidden_size, torch_dtype(config.target.dtype))
    folder = _features_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"hidden rows of {tokens} tokens: {size / 1e9:.2f} GB in {folder}")
    with contextlib.suppress(ValueError):
        kept_files(texts, wanted.taps, config.target.model, source.config)
        say("they are beside the texts, too: texts.features=kept reads those")
    if size > shutil.disk_usage(folder).free:
        raise ValueError(
            f"texts.features must be computed: {size / 1e9:.2f} GB do not fit on the disk of {folder}"
        )
    computer = _computer(config, source, wanted, training_device(config, 0))
    for files in parts:
        files.keep(computer, progress)


def prepare_head(config: TrainingConfig, corpus: Corpus, say: Callable[[str], None]) -> None:
    """Computes what a low-rank head starts as, once for all ranks and for runs that go on: from the target's rows at
    some thousand labels."""
    path = _low_rank_path(config)
    if config.head.kind != "low_rank" or path.exists():
        return
    say("start of the low-rank head: the target's head at its own hidden rows")
    source = open_target(config, silent)
    ids = read_ids(config.head, source.config.vocab_size)
    device = training_device(config, 0)
    texts: list[TrainingText] = []
    for text in corpus.training[:: max(1, len(corpus.training) // _START_TEXTS)]:
        if sum(len(chosen.tokens) for chosen in texts) < _START_TOKENS:
            texts.append(text)
    if config.texts.features == "kept":
        kept = _kept(config, source, WantedRows((), True, ids, 1), texts, device)
        normed = [kept.normed(index) for index in range(len(texts))]
    else:
        last = source.config.num_layers
        target = _target(config, source, (last,), device)
        normed = [
            target.model.normed(by[last]) for by in target.rows([text.tokens.tolist() for text in texts])
        ]
    # Those before labels: what the head will be asked about.
    read = [rows[max(1, text.num_unlearned) - 1 : -1] for text, rows in zip(texts, normed, strict=True)]
    rank = head_shape(config.head, source.config.hidden_size, ids).rank
    weights = low_rank_head(source, ids, rank, torch.cat(read).cpu())
    write_tensors(path, weights, {})


def forget_head(config: TrainingConfig) -> None:
    """Removes what `prepare_head` has left."""
    _low_rank_path(config).unlink(missing_ok=True)


def _low_rank_path(config: TrainingConfig) -> Path:
    return Path(config.out).expanduser() / "low_rank_start.safetensors"


def _low_rank_start(config: TrainingConfig) -> dict[str, Tensor]:
    return load_file(_low_rank_path(config)) if config.head.kind == "low_rank" else {}


def training_device(config: TrainingConfig, rank: int) -> torch.device:
    """Where a rank computes."""
    return torch.device(config.engine.device, *([rank] if config.engine.device == "cuda" else []))


def build_task(config: TrainingConfig, corpus: Corpus, device: torch.device) -> Task:
    """What a rank trains on `device`. Random starts are those of `config.seed`: the same on every rank."""
    torch.manual_seed(config.seed)
    if config.method == "medusa2":
        from outrider.workers.training.medusa2 import build_medusa2

        return build_medusa2(config, resolve_target(config, silent), corpus, _low_rank_start(config))
    source = open_target(config, silent)
    rows = wanted_rows(config, source)
    module: nn.Module
    drafter: Drafter
    if config.method == "eagle3":
        module, drafter = _eagle3(config, source, rows, device)
    elif config.method == "mtp":
        module, drafter = _mtp(config, source, rows, device)
    elif config.method == "parallel":
        check_mask_token(config.parallel, corpus)
        module, drafter = _parallel(config, source, rows, device)
    else:
        module, drafter = _medusa1(config, source, rows)
    if config.start_from:
        start_from(config.start_from, drafter, source.config.num_layers)
    if config.head.frozen:
        for name, parameter in drafter.named_parameters():
            parameter.requires_grad_("lm_head" not in name)

    def save(folder: Path, accuracies: tuple[tuple[float, ...], ...]) -> None:
        save_drafter(folder, drafter, describe(config.target.model, source, corpus, accuracies))

    @cache
    def computer() -> FeatureComputer:
        return _computer(config, source, rows, device)

    def reader(texts: list[TrainingText]) -> BatchReader:
        if config.texts.features == "cached":
            return _files(config, rows, texts)
        if config.texts.features == "held":
            return HeldRows(texts, rows, computer())
        if config.texts.features == "kept":
            return _kept(config, source, rows, texts, device)
        return ComputedRows(texts, rows, computer())

    return Task(
        module,
        reader(corpus.training),
        reader(corpus.held_out),
        save,
        [([parameter for parameter in drafter.parameters() if parameter.requires_grad], 1.0)],
    )


def _eagle3(
    config: TrainingConfig, source: WeightSource, rows: WantedRows, device: torch.device
) -> tuple[nn.Module, Eagle3Drafter]:
    shape = head_shape(config.head, source.config.hidden_size, rows.ids)
    drafter = Eagle3Drafter(drafter_shape(source.config, shape, config.eagle3.norm_before_residual), rows.ids)
    start_head(drafter.lm_head, source, _low_rank_start(config))
    if config.eagle3.start == "target_last_layer":
        start_from_last_layer(drafter, source)
    dtype = torch_dtype(config.engine.dtype)
    embedding = source.read(EMBEDDING, _ALL, _ALL, dtype).to(device)
    return Eagle3Training(drafter, embedding, config.eagle3, dtype), drafter


def _mtp(
    config: TrainingConfig, source: WeightSource, rows: WantedRows, device: torch.device
) -> tuple[nn.Module, MtpDrafter]:
    shape = head_shape(config.head, source.config.hidden_size, rows.ids)
    drafter = MtpDrafter(head_shape_for(source.config, shape), rows.ids)
    start_head(drafter.lm_head, source, _low_rank_start(config))
    drafter.shares_lm_head = config.head.kind == "full" and config.head.frozen
    if config.mtp.start == "target_last_layer":
        start_from_layer(drafter, source)
    dtype = torch_dtype(config.engine.dtype)
    embedding = source.read(EMBEDDING, _ALL, _ALL, dtype).to(device)
    return MtpTraining(drafter, embedding, config.mtp, dtype), drafter


def _parallel(
    config: TrainingConfig, source: WeightSource, rows: WantedRows, device: torch.device
) -> tuple[nn.Module, ParallelDrafter]:
    head = head_shape(config.head, source.config.hidden_size, rows.ids)
    drafter = ParallelDrafter(parallel_shape(source.config, head, config.parallel), rows.ids)
    start_head(drafter.lm_head, source, _low_rank_start(config))
    drafter.shares_lm_head = config.head.kind != "low_rank" and config.head.frozen
    if config.parallel.start == "target_last_layers":
        start_from_last_layers(drafter, source)
    dtype = torch_dtype(config.engine.dtype)
    embedding = source.read(EMBEDDING, _ALL, _ALL, dtype).to(device)
    return ParallelTraining(drafter, embedding, config.parallel, dtype), drafter


def _medusa1(config: TrainingConfig, source: WeightSource, rows: WantedRows) -> tuple[nn.Module, MedusaHeads]:
    shape = head_shape(config.head, source.config.hidden_size, rows.ids)
    heads = MedusaHeads(heads_shape(source.config, shape, config.medusa), rows.ids)
    start_heads(heads, source, _low_rank_start(config))
    return Medusa1Training(heads, config.medusa, torch_dtype(config.engine.dtype)), heads


def _kept(
    config: TrainingConfig,
    source: WeightSource,
    wanted: WantedRows,
    texts: Sequence[TrainingText],
    device: torch.device,
) -> KeptRows:
    return KeptRows(texts, wanted, source, config.target.model, torch_dtype(config.target.dtype), device)


def _computer(
    config: TrainingConfig, source: WeightSource, wanted: WantedRows, device: torch.device
) -> FeatureComputer:
    layers = tuple(dict.fromkeys((*wanted.taps, source.config.num_layers)))
    return FeatureComputer(_target(config, source, layers, device), wanted)


def _target(
    config: TrainingConfig, source: WeightSource, layers: Sequence[int], device: torch.device
) -> TargetFeatures:
    dtype = torch_dtype(config.target.dtype)
    kernels = select_kernels("auto", device, dtype, source.config.head_dim, DEFAULT_MEMORY)
    return TargetFeatures(source, layers, dtype, config.engine.num_threads, device, kernels)
