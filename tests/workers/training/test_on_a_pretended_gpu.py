"""Training on a device that is not the CPU: the target's rows, the losses and what is saved never mix the
two, and the numbers are those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from outrider.configs.training import ParallelConfig, TrainedHeadConfig, TrainingConfig, TrainingMethod
from outrider.kernels.selection import REFERENCES
from outrider.workers.training import tasks
from outrider.workers.training.data import read_corpus
from outrider.workers.training.tasks import build_task
from support.pretend_gpu import pretend_gpu
from support.training import tiny_run, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@torch.no_grad()
def losses(config: TrainingConfig, device: torch.device, saved: Path) -> tuple[float, list[float]]:
    """Of three texts: the loss, and the sums that are counted of it. Then saves the drafter."""
    task = build_task(config, read_corpus(config.texts, None), device)
    batch = task.training.read([0, 1, 2])
    module = task.module
    for part in module.modules():  # as `to` does, which leaves what only says that it is elsewhere
        for own in (part._parameters, part._buffers):
            own.update({name: value.to(device) for name, value in own.items() if value is not None})
    totals = module.count_labels(batch)
    loss, counts = module(batch.to(device), totals.to(device), True)
    task.save(saved, ())
    return loss.cpu().item(), counts.sums.cpu().flatten().tolist()


@pytest.mark.parametrize(
    ("method", "features"),
    [("eagle3", "computed"), ("eagle3", "held"), ("medusa1", "held"), ("parallel", "held")],
)
def test_the_loss_is_that_of_the_cpu(
    texts: Path,
    tmp_path: Path,
    method: TrainingMethod,
    features: Literal["computed", "held"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "select_kernels", lambda *asked: REFERENCES)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 30, 1 << 30))
    ids = tmp_path / "ids.json"
    ids.write_text(str(list(range(0, 160, 2))))
    config = tiny_run(texts, tmp_path / "run", steps=1)
    config = replace(
        config,
        method=method,
        texts=replace(config.texts, features=features),
        head=TrainedHeadConfig("trimmed", str(ids), frozen=True),
        parallel=ParallelConfig(block_size=3, mask_token_id=1, anchors=4),
    )
    expected = losses(config, torch.device("cpu"), tmp_path / "cpu")
    with pretend_gpu() as device:
        found = losses(config, device, tmp_path / "gpu")
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "cpu"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
