"""Trained drafters as files: the one place that knows how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(folder: Path, weights: Mapping[str, Tensor], shape: Any, accuracies: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "shape.json").write_text(
        json.dumps({"shape": asdict(shape), "accuracies": accuracies}, indent=1)
    )


def load_weights_into(module: nn.Module, folder: Path) -> None:
    module.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    )
