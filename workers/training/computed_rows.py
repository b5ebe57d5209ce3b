"""The target's rows of texts, computed whenever they are read, or when they are read first and held from then on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from outrider.kernels.transfers import upload
from outrider.workers.model.head import Head
from outrider.workers.sequences.segments import places_in, starts_of
from outrider.workers.training.data import TrainingText
from outrider.workers.training.feature_batch import (
    LAST,
    FeatureBatch,
    WantedRows,
    joined,
    layer_name,
    on_host,
)
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.vocabulary_loss import SoftTargets

# Rows whose logits are laid out at once: on a CPU few, which stay near the processor, on a GPU many a launch.
_LOGIT_ROWS = {"cpu": 256, "cuda": 4096}


class TargetLaw:
    """The target's law of the next token, of its last rows after the final norm."""

    def __init__(self, head: Head, wanted: WantedRows, device: torch.device) -> None:
        """head: the target's own, on `device`."""
        self._head = head
        self._top_k = min(wanted.top_k, len(wanted.ids))
        self._has_all_ids = len(wanted.ids) == len(head.vocabulary)
        self._ids = wanted.ids.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, normed: Tensor) -> dict[str, Tensor]:
        """Of rows [N, hidden] on any device: tensors by name [N, ...], on the head's."""
        normed = normed.to(self._device)
        parts = [self._of_some(piece) for piece in normed.split(_LOGIT_ROWS[normed.device.type])]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _of_some(self, normed: Tensor) -> dict[str, Tensor]:
        logits = self._head(normed)
        greedy = logits.argmax(-1)
        if not self._has_all_ids:
            logits = logits.index_select(1, self._ids)
        top, columns = logits.topk(self._top_k, dim=-1)
        log_probs = top - logits.logsumexp(-1, keepdim=True)
        return {
            "greedy": greedy.to(torch.int32),
            "columns": columns.to(torch.int32),
            "log_probs": log_probs.to(torch.float16),
        }


class FeatureComputer:
    """Runs the target and keeps what a trainer needs, and the last rows, on the target's device: by name tensors by
    name, [tokens, ...].

    Attributes:
        device: the target's.
        law: of its last rows.
    """

    def __init__(self, target: TargetFeatures, wanted: WantedRows) -> None:
        """`target` gives at least the wanted layers and its last rows."""
        self._target = target
        self._wanted = wanted
        self.device = target.model.device
        self.law = TargetLaw(target.model.weights.head, wanted, self.device)

    def compute(self, texts: Sequence[TrainingText]) -> dict[str, dict[str, Tensor]]:
        """Of texts back to back, in as many forwards as they need."""
        parts: list[dict[str, dict[str, Tensor]]] = []
        batch: list[TrainingText] = []
        num_tokens = 0
        for text in texts:
            if batch and num_tokens + len(text.tokens) > self._target.max_rows:
                parts.append(self._forward(batch))
                batch, num_tokens = [], 0
            batch.append(text)
            num_tokens += len(text.tokens)
        parts.append(self._forward(batch))
        return {
            name: {key: torch.cat([part[name][key] for part in parts]) for key in parts[0][name]}
            for name in parts[0]
        }

    @torch.inference_mode()
    def _forward(self, texts: Sequence[TrainingText]) -> dict[str, dict[str, Tensor]]:
        model = self._target.model
        rows = self._target.rows([text.tokens.tolist() for text in texts])
        found = {
            layer_name(layer): {"rows": torch.cat([by_layer[layer] for by_layer in rows])}
            for layer in self._wanted.taps
        }
        normed = model.normed(torch.cat([by_layer[model.config.num_layers] for by_layer in rows]))
        return {**found, LAST: {"normed": normed}, self._wanted.law_name: self.law(normed)}


class ComputedRows:
    """Runs the target whenever a text is read."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, computer: FeatureComputer) -> None:
        self._texts = texts
        self._wanted = wanted
        self._computer = computer

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        texts = [self._texts[index] for index in indices]
        return joined(texts, self._wanted, [self._computer.compute(texts)])


class HeldRows:
    """Runs the target when a text is read for the first time, and holds its rows in the memory of its device."""

    def __init__(self, texts: Sequence[TrainingText], wanted: WantedRows, computer: FeatureComputer) -> None:
        self._texts = texts
        self._wanted = wanted
        self._computer = computer
        self._lengths = np.array([len(text.tokens) for text in texts])
        self._starts = starts_of(self._lengths)
        self._is_held = np.zeros(len(texts), dtype=bool)
        self._greedy = torch.zeros(int(self._lengths.sum()), dtype=torch.int64)
        self._held: dict[str, Tensor] = {}

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        missing = [index for index in indices if not self._is_held[index]]
        if missing:
            self._hold(missing)
        texts = [self._texts[index] for index in indices]
        rows = self._rows(indices)
        on_device = upload([rows], self._computer.device)[0]
        taps, normed, columns, log_probs = (
            self._held[name].index_select(0, on_device) for name in ("taps", "normed", "columns", "log_probs")
        )
        return FeatureBatch(
            **on_host(texts),
            greedy=self._greedy[rows],
            taps=taps,
            normed=normed,
            soft=SoftTargets(columns.long(), log_probs.float()),
        )

    def _hold(self, indices: Sequence[int]) -> None:
        texts = [self._texts[index] for index in indices]
        batch = joined(texts, self._wanted, [self._computer.compute(texts)])
        found = {
            "taps": batch.taps,
            "normed": batch.normed,
            # Narrow, as they were made.
            "columns": batch.soft.columns.int(),
            "log_probs": batch.soft.log_probs.half(),
        }
        if not self._held:
            self._check_space(sum(rows.shape[1] * rows.itemsize for rows in found.values()))
            self._held = {name: self._space(rows) for name, rows in found.items()}
        places = self._rows(indices)
        on_device = upload([places], self._computer.device)[0]
        for name, rows in found.items():
            self._held[name].index_copy_(0, on_device, rows)
        self._greedy[places] = batch.greedy
        self._is_held[indices] = True

    def _check_space(self, bytes_per_token: int) -> None:
        device, size = self._computer.device, len(self._greedy) * bytes_per_token
        free = (
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        )
        if size > free:
            raise ValueError(
                f"texts.features must be cached or computed: {size / 1e9:.2f} GB of rows do not fit in the "
                f"{free / 1e9:.2f} GB that are free on {device}"
            )

    def _space(self, rows: Tensor) -> Tensor:
        return rows.new_empty(len(self._greedy), rows.shape[1])

    def _rows(self, indices: Sequence[int]) -> Tensor:
        """int64 [N], where the rows of these texts lie."""
        lengths = self._lengths[indices]
        return torch.from_numpy(self._starts[indices].repeat(lengths) + places_in(lengths))
