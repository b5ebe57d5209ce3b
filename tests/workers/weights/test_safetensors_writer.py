"""Files of tensors that others may read."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from outrider.workers.weights.safetensors_writer import write_tensors


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_has_the_mode_of_any_other_and_takes_the_place_of_a_former_one(
    tmp_path: Path, umask: int
) -> None:
    path = tmp_path / "model.safetensors"
    for value in (1.0, 2.0):
        (tmp_path / "model.safetensors.partial").write_text("a run that was cut off")
        write_tensors(path, {"a": torch.full((2, 3), value).T}, {"format": "pt"})
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        assert torch.equal(load_file(path)["a"], torch.full((3, 2), value))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["model.safetensors"]
