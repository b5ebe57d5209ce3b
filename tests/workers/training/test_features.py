"""Hidden rows of whole texts: those that the transformer gives text by text, on the fly and from files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.kept_rows import (
    KeptFiles,
    hidden_bytes,
    keep_features,
    kept_tokens,
    parse_layers,
)
from outrider.workers.training.texts import DistilledText
from outrider.workers.weights.resolver import open_source
from support.models import random_model
from support.rows import SequenceRows, batch_of, chain

SOURCE = open_source(random_model("num_layers=4&seed=5"))
LAYERS = (0, 2, 4)
CPU = torch.device("cpu")
# float32; one text at a time and many sum in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def features() -> TargetFeatures:
    return TargetFeatures(SOURCE, LAYERS, torch.float32, threads=1)


def texts(*lengths: int) -> list[DistilledText]:
    rng = np.random.default_rng(1)
    made = []
    for number, length in enumerate(lengths):
        tokens = tuple(rng.integers(0, SOURCE.config.vocab_size, length).tolist())
        made.append(DistilledText(f"t{number}", tokens[:1], tokens[1:], 1.0, True, "written", "stop"))
    return made


def alone(tokens: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """The transformer over one text."""
    plan = ShardPlan(SOURCE.config, 0, 1)
    model = Transformer(load_weights(plan, SOURCE, torch.float32, CPU, packed=False), SoloCommunicator())
    cache = PagedCache(SOURCE.config, plan, 200, 16, torch.float32, CPU)
    pages = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    rows = SequenceRows(pages, 0, chain(len(tokens)), 0, tokens)
    return dict(model.forward(batch_of([rows], 16, CPU), cache, LAYERS).taps)


def assert_rows(found: dict[int, torch.Tensor], tokens: tuple[int, ...]) -> None:
    expected = alone(tokens)
    assert tuple(found) == LAYERS
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], expected[layer], **TOLERANCE)


def test_rows_of_many_texts_are_those_of_each_alone(features: TargetFeatures) -> None:
    several = texts(1, 700, 3, 17, 2100, 64, 65)  # one of them more than a forward otherwise takes
    for text, found in zip(several, features.rows([text.tokens for text in several]), strict=True):
        assert_rows(found, text.tokens)


def test_rows_may_be_learned_from(features: TargetFeatures) -> None:
    (rows,) = features.rows([[1, 2, 3]])
    weight = torch.ones(rows[4].shape[1], requires_grad=True)
    (rows[4] @ weight).sum().backward()
    assert weight.grad is not None


def test_kept_rows_are_read_by_text_and_a_pass_goes_on_behind_its_last_file(
    features: TargetFeatures, tmp_path: Path
) -> None:
    several = texts(40, 50, 30, 9, 70)
    shard_bytes = hidden_bytes(100, LAYERS, SOURCE.config.hidden_size, torch.float32)
    done: list[int] = []
    keep_features(features, several[:3], tmp_path, torch.float32, done.append, shard_bytes)
    first_file = (tmp_path / "hidden-00000.safetensors").read_bytes()
    assert done == [90, 30]
    (tmp_path / "hidden-00002.safetensors.partial").write_bytes(b"cut off")
    keep_features(features, several, tmp_path, torch.float32, done.append, shard_bytes)
    assert done == [90, 30, 79]
    assert (tmp_path / "hidden-00000.safetensors").read_bytes() == first_file
    assert len(list(tmp_path.glob("hidden-*"))) == 3
    assert kept_tokens(tmp_path) == 199
    files = KeptFiles(tmp_path)
    assert files.layers == LAYERS
    for text in reversed(several):
        assert files.num_rows(text.id) == len(text.tokens)
        assert_rows(files.rows(text.id, LAYERS, len(text.tokens)), text.tokens)
        assert_rows(files.rows(text.id, LAYERS, 5), text.tokens[:5])
    assert files.num_rows("x") == 0


def test_rows_are_kept_in_another_dtype_and_not_in_two(features: TargetFeatures, tmp_path: Path) -> None:
    (text,) = texts(20)
    keep_features(features, [text], tmp_path, torch.bfloat16, lambda tokens: None)
    (rows,) = features.rows([text.tokens])
    assert torch.equal(KeptFiles(tmp_path).rows(text.id, (2,), 20)[2], rows[2].bfloat16())
    with pytest.raises(ValueError, match="--hidden-dtype must give bfloat16 as in"):
        keep_features(features, [text], tmp_path, torch.float32, lambda tokens: None)
    features_of_others = TargetFeatures(SOURCE, (1,), torch.float32, threads=1)
    with pytest.raises(ValueError, match="--keep-hidden must be 0,2,4 as in"):
        keep_features(features_of_others, [text], tmp_path, torch.bfloat16, lambda tokens: None)


def test_a_folder_without_rows_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold hidden rows"):
        KeptFiles(tmp_path)
    (tmp_path / "hidden-00000.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"hidden-00000\.safetensors holds no hidden rows of ours"):
        KeptFiles(tmp_path)


def test_layers_by_name_and_number() -> None:
    assert parse_layers("medusa", 30) == (30,)
    assert parse_layers("eagle3", 30) == (2, 15, 27, 30)
    assert parse_layers("2, 15", 30) == (2, 15)
    for wanted in ("eagle", "31", "2,2", "", "-1"):
        with pytest.raises(ValueError, match="--keep-hidden must be medusa, eagle3"):
            parse_layers(wanted, 30)
