"""The Hugging Face hub without a network."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects


class FakeHub:
    """Stands in for the Hugging Face hub: what is asked for is copied from `remote` to `cache`, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.remote, self.cache = folder / "remote", folder / "cache"
        self.cache.mkdir()
        self.revisions: set[tuple[str, str]] = set()
        monkeypatch.setattr("huggingface_hub.snapshot_download", self)

    def __call__(self, name: str, revision: str, allow_patterns: list[str], tqdm_class: type) -> str:
        self.revisions.add((name, revision))
        names = [path.name for path in self.remote.iterdir()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(self.remote / file, self.cache / file)
        return str(self.cache)

    def fetched_weights(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("*.safetensors"))
