"""Draft heads are found, fit their target or are refused by name, and fetch no more of it than they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.configs import loader
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.draft_heads.checkpoint import (
    write_eagle3,
    write_lm_head,
    write_medusa,
    write_parallel,
)
from outrider.workers.draft_heads.description import HeadDescription, fingerprint, fingerprint_ids
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.eagle3 import Eagle3Method
from outrider.workers.drafting.medusa import MedusaMethod, table_of
from outrider.workers.drafting.method import DraftMethod, MethodContext
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.parallel import ParallelMethod
from outrider.workers.drafting.registry import METHODS, layers_needed
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.model.embedding import MatrixEmbedding, StoredEmbedding, embedding_of
from outrider.workers.setup import read_model_config
from outrider.workers.trace import Tracer
from outrider.workers.weights import resolver
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD
from support.fake_hub import FakeHub
from support.models import random_tensors, write_safetensors
from support.tiny_heads import eagle3_drafter, medusa_heads, parallel_drafter, read

TARGET = "num_layers=6&hidden_size=64&vocab_size=320"
TAPS = (2, 3, 4)
SOURCE = RandomSource(f"random:llama?{TARGET}")


def description() -> HeadDescription:
    rows = read(SOURCE, EMBEDDING)[fingerprint_ids(320)]
    return HeadDescription(
        "its target", 64, 6, 320, fingerprint(rows), "chat", ((0.5, 0.25), (0.25,), (0.125,))
    )


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A folder with `medusa`, `eagle3` and `parallel`, whose trimmed LM head is the target's."""
    write_medusa(tmp_path / "medusa", medusa_heads(SOURCE), description(), "fasterdecoding", torch.float32)
    drafter = eagle3_drafter(SOURCE, TAPS, num_ids=100)
    write_eagle3(tmp_path / "eagle3", drafter, description(), "specforge", torch.float32)
    blocks = parallel_drafter(SOURCE, (1, 2, 5), num_ids=100)
    blocks.shares_lm_head = True
    write_parallel(tmp_path / "parallel", blocks, description(), torch.float32)
    return tmp_path


def config_of(heads: Path, target: str = f"random:llama?{TARGET}", *overrides: str) -> Config:
    return load_config(
        "tiny-random",
        [
            f"target.model={target}",
            "draft.methods=[medusa, eagle3, parallel]",
            f"draft.medusa.model={heads / 'medusa'}",
            f"draft.eagle3.model={heads / 'eagle3'}",
            f"draft.parallel.model={heads / 'parallel'}",
            *overrides,
        ],
    )


def built(name: str, config: Config) -> DraftMethod:
    target = read_model_config(config, "target", silent)
    slots, estimator = DraftedSlots(2, 8, 16), AcceptanceEstimator()
    tracer = Tracer("draft", False)
    return METHODS[name].build(
        MethodContext(config, target, torch.device("cpu"), slots, estimator, tracer, silent)
    )


def test_what_the_target_is_asked_for_is_what_the_built_methods_need(heads: Path) -> None:
    config = config_of(heads)
    target = SOURCE.config
    assert layers_needed(config, target) == (1, 2, 3, 4, 5, 6)
    for name in ("medusa", "eagle3", "parallel"):
        assert built(name, config).needs == METHODS[name].needs_of(config, target)


def test_calibrated_accuracies_are_those_of_the_checkpoint(heads: Path) -> None:
    medusa = built("medusa", config_of(heads))
    assert isinstance(medusa, MedusaMethod)
    assert medusa._calibrated.tolist() == [[0.5, 0.25, 0.125], [0.25, 0.0, 0.0], [0.125, 0.0, 0.0]]
    assert table_of(()).size == 0


@pytest.mark.parametrize(("name", "tensor"), [("medusa", FINAL_NORM), ("eagle3", EMBEDDING)])
def test_only_the_files_are_fetched_that_hold_what_a_method_reads_of_the_target(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tensor: str
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    model, tensors = random_tensors("llama", TARGET)
    write_safetensors(hub.remote, model, tensors, num_files=5)
    method = built(name, config_of(heads, "org/name"))
    place = sorted(tensors).index(tensor) % 5
    assert hub.fetched_weights() == [f"model-{place + 1:05}-of-00005.safetensors"]
    if isinstance(method, Eagle3Method):
        rows = method._drafter.embedding.rows(torch.tensor([3, 5]), False)
        assert torch.equal(rows, tensors[EMBEDDING][[3, 5]])


def test_a_parallel_drafter_takes_the_rows_of_its_ids_from_the_targets_head(heads: Path) -> None:
    method = built("parallel", config_of(heads, f"random:llama?{TARGET}", "draft.dtype=float32"))
    assert isinstance(method, ParallelMethod)
    served = method._drafter
    rows = torch.randn(3, 64)
    head = read(SOURCE, HEAD)[served.drafter.lm_head.ids]
    assert head.shape == (100, 64)
    torch.testing.assert_close(served.logits(rows), rows @ head.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_own", [True, False])
def test_the_targets_head_is_its_own_where_it_has_one_whatever_its_configuration_says(
    heads: Path, tmp_path: Path, has_own: bool
) -> None:
    model, tensors = random_tensors("llama", TARGET)
    said = replace(model, tied_embeddings=True)
    kept = tensors if has_own else {name: rows for name, rows in tensors.items() if name != HEAD}
    write_safetensors(tmp_path / "target", said, kept)
    method = built("parallel", config_of(heads, str(tmp_path / "target"), "draft.dtype=float32"))
    assert isinstance(method, ParallelMethod)
    served, rows = method._drafter, torch.randn(3, 64)
    head = tensors[HEAD if has_own else EMBEDDING][served.drafter.lm_head.ids]
    torch.testing.assert_close(served.logits(rows), rows @ head.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["medusa", "eagle3", "parallel"])
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("num_layers=6&hidden_size=128&vocab_size=320", "hidden size 64, not 128"),
        ("num_layers=6&hidden_size=64&vocab_size=330", "vocabulary 320, not 330"),
        ("num_layers=7&hidden_size=64&vocab_size=320", "number of layers 6, not 7"),
    ],
)
def test_heads_of_another_target_are_refused(heads: Path, name: str, target: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^draft\.{name}\.model must be .*of its target: {said}$"):
        built(name, config_of(heads, f"random:llama?{target}"))


def test_an_eagle3_drafter_is_known_by_the_targets_embedding_and_taps(heads: Path) -> None:
    with pytest.raises(ValueError, match=r"^draft\.eagle3\.model .*embedding has other values"):
        built("eagle3", config_of(heads, f"random:llama?{TARGET}&seed=1"))
    unnamed = replace(description(), target_num_layers=0)
    write_eagle3(heads / "eagle3", eagle3_drafter(SOURCE, (2, 3, 7)), unnamed, "specforge", torch.float32)
    config = config_of(heads)
    for refused in (lambda: built("eagle3", config), lambda: layers_needed(config, SOURCE.config)):
        with pytest.raises(
            ValueError, match=r"^draft\.eagle3\.model: .*must name layers of the target, which has 6"
        ):
            refused()


def test_a_parallel_drafter_is_known_by_the_targets_embedding_and_taps(heads: Path) -> None:
    with pytest.raises(ValueError, match=r"^draft\.parallel\.model .*embedding has other values"):
        built("parallel", config_of(heads, f"random:llama?{TARGET}&seed=1"))
    unnamed = replace(description(), target_num_layers=0)
    write_parallel(heads / "parallel", parallel_drafter(SOURCE, (2, 7)), unnamed, torch.float32)
    config = config_of(heads)
    for refused in (lambda: built("parallel", config), lambda: layers_needed(config, SOURCE.config)):
        with pytest.raises(
            ValueError, match=r"^draft\.parallel\.model must read layers of .*has 6, got inputs of"
        ):
            refused()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("shipped:nobody", r"no heads of that name come with the package \(there are: shipped:mine\), got"),
        ("nowhere", r"no directory nowhere \(and it is not a Hugging Face id or shipped:NAME\)"),
        (__file__, "is not a directory with config.json"),
    ],
)
def test_heads_that_are_not_there_are_named(
    heads: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    shipped(monkeypatch, heads)
    config = config_of(heads, f"random:llama?{TARGET}", f"draft.eagle3.model={model}")
    for refused in (lambda: built("eagle3", config), lambda: layers_needed(config, SOURCE.config)):
        with pytest.raises(ValueError, match=rf"^draft\.eagle3\.model: .*{said}"):
            refused()


def test_heads_that_come_with_the_package_are_found_by_name(
    heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(monkeypatch, heads)
    config = config_of(heads, f"random:llama?{TARGET}", "draft.medusa.model=shipped:mine")
    assert built("medusa", config).name == "medusa"


def shipped(monkeypatch: pytest.MonkeyPatch, heads: Path) -> None:
    (heads / "heads").mkdir()
    (heads / "medusa").rename(heads / "heads" / "mine")
    for module in (loader, resolver):
        monkeypatch.setattr(module, "HEADS_DIR", heads / "heads")


def test_the_embedding_stays_in_the_checkpoint_unless_there_is_a_gpu() -> None:
    stored = embedding_of(SOURCE, torch.float32, torch.device("cpu"))
    assert isinstance(stored, StoredEmbedding)
    in_memory = embedding_of(SOURCE, torch.float32, torch.device("meta"))
    assert isinstance(in_memory, MatrixEmbedding)
    assert in_memory.matrix.shape == (320, 64)


@pytest.mark.parametrize("hidden_size", [64, 48])
def test_a_draft_model_takes_the_head_that_is_given_if_it_fits(tmp_path: Path, hidden_size: int) -> None:
    head = make_lm_head(LmHeadShape(hidden_size, 3, hidden_size), torch.tensor([1, 5, 30]))
    write_lm_head(tmp_path, head, HeadDescription(target_vocab_size=320), torch.float32)
    config = load_config(
        "tiny-random",
        [
            f"target.model=random:llama?{TARGET}",
            f"draft.model=random:llama?{TARGET}",
            "draft.methods=[model]",
            f"draft.head={tmp_path}",
        ],
    )
    if hidden_size == 64:
        method = built("model", config)
        assert isinstance(method, ModelMethod)
        assert method._model.weights.head.vocabulary.ids(torch.arange(3)).tolist() == [1, 5, 30]
        return
    with pytest.raises(
        ValueError, match=r"draft\.head must be a head for draft\.model, whose rows have 64 columns"
    ):
        built("model", config)
