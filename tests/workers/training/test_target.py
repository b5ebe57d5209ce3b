"""Which files of a target a training fetches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.configs.training import TrainedHeadConfig, TrainingMethod
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.kept_rows import keep_features
from outrider.workers.training.launch import train
from outrider.workers.training.texts import read_texts
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import ResolvedModel, open_source
from support.fake_hub import FakeHub
from support.models import random_tensors, write_safetensors
from support.training import tiny_run, write_texts

OPTIONS = "num_layers=8&vocab_size=160&hidden_size=64"


@pytest.mark.parametrize(
    ("method", "taken"),
    [("eagle3", [7]), ("mtp", [7]), ("parallel", [6, 7]), ("medusa1", [])],
)
def test_of_a_target_whose_rows_were_kept_only_that_is_fetched_which_a_drafter_shares_or_starts_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: TrainingMethod, taken: Sequence[int]
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    model, tensors = random_tensors("llama", OPTIONS)
    write_safetensors(hub.remote, model, tensors, num_files=len(tensors))
    target, texts = ResolvedModel("org/name", "safetensors", hub.remote), tmp_path / "texts"
    write_texts(texts, target)
    features = TargetFeatures(open_source(target), (2, 4, 5, 8), torch.float32, 1)
    keep_features(features, read_texts(texts), texts, torch.float32, lambda tokens: None)

    begun = tiny_run(texts, tmp_path / "run", 1, target)
    config = replace(
        begun, method=method, head=TrainedHeadConfig(), texts=replace(begun.texts, features="kept")
    )
    train(config, lambda text: None, silent, lambda line: None)
    wanted = ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"model.layers.{i}." for i in taken))
    places = [i for i, name in enumerate(sorted(tensors), start=1) if name.startswith(wanted)]
    assert hub.fetched_weights() == [f"model-{i:05}-of-{len(tensors):05}.safetensors" for i in places]
