"""Rows in files: those computed anew, and computed once for all methods and heads that read them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from outrider.workers.training.computed_rows import ComputedRows, FeatureComputer, HeldRows
from outrider.workers.training.data import TrainingText
from outrider.workers.training.feature_batch import FeatureBatch, WantedRows
from outrider.workers.training.feature_store import FeatureFiles
from outrider.workers.training.features import TargetFeatures
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from support.models import random_model

SOURCE = open_source(random_model("num_layers=4&seed=5"))
ALL_IDS = torch.arange(SOURCE.config.vocab_size)
EAGLE3 = WantedRows((1, 2, 3), False, ALL_IDS[::2], 4)
OTHER_HEAD = WantedRows((1, 2, 3), False, ALL_IDS, 4)
MEDUSA = WantedRows((), True, ALL_IDS[::2], 4)


class CountingTarget(TargetFeatures):
    """Counts the tokens it reads."""

    num_tokens = 0

    def rows(self, texts):  # type: ignore[no-untyped-def]
        self.num_tokens += sum(map(len, texts))
        return super().rows(texts)


@pytest.fixture(scope="module")
def target() -> CountingTarget:
    return CountingTarget(SOURCE, (1, 2, 3, 4), torch.float32, threads=1)


@pytest.fixture(scope="module")
def texts() -> list[TrainingText]:
    """More than one file of them."""
    rng = np.random.default_rng(1)
    tokens = [rng.integers(0, SOURCE.config.vocab_size, 3 + number % 5) for number in range(300)]
    return [
        TrainingText(ids.astype(np.int32), 1, False, Path("texts"), str(number))
        for number, ids in enumerate(tokens)
    ]


def assert_same(found: FeatureBatch, expected: FeatureBatch) -> None:
    for name, value in vars(expected).items():
        if name == "soft":
            assert torch.equal(found.soft.columns, value.columns)
            torch.testing.assert_close(found.soft.log_probs, value.log_probs, rtol=0, atol=2e-3)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-4)
        else:
            assert getattr(found, name) == value


def test_each_kind_of_row_is_computed_once_for_all_who_read_it(
    target: CountingTarget, texts: list[TrainingText], tmp_path: Path
) -> None:
    total = sum(len(text.tokens) for text in texts)
    some = [299, 0, 256, 255]
    found = []
    for wanted in (EAGLE3, OTHER_HEAD, MEDUSA, EAGLE3):
        computer = FeatureComputer(target, wanted)
        files = FeatureFiles(texts, wanted, tmp_path, "target float32")
        missing, target.num_tokens = files.num_missing, 0
        files.keep(computer, silent)
        found.append((missing, target.num_tokens))
        assert files.num_missing == 0
        assert_same(files.read(some), ComputedRows(texts, wanted, computer).read(some))
    # A head over other ids needs the law alone, of rows that are there; Medusa finds all that it reads.
    assert found == [(total, total), (total, 0), (0, 0), (0, 0)]


def test_rows_of_another_target_are_others(
    target: CountingTarget, texts: list[TrainingText], tmp_path: Path
) -> None:
    FeatureFiles(texts[:2], MEDUSA, tmp_path, "target float32").keep(FeatureComputer(target, MEDUSA), silent)
    assert FeatureFiles(texts[:2], MEDUSA, tmp_path, "other float32").num_missing
    assert FeatureFiles(texts[1:2], MEDUSA, tmp_path, "target float32").num_missing


@pytest.mark.parametrize("wanted", [EAGLE3, MEDUSA])
def test_held_rows_are_computed_when_a_text_is_read_first(
    target: CountingTarget, texts: list[TrainingText], wanted: WantedRows
) -> None:
    computer = FeatureComputer(target, wanted)
    held, anew = HeldRows(texts, wanted, computer), ComputedRows(texts, wanted, computer)
    read = []
    for some in ([7, 3], [3, 12, 7], [12, 3], [299, 0, 3]):
        target.num_tokens = 0
        found = held.read(some)
        read.append(target.num_tokens)
        assert_same(found, anew.read(some))
    lengths = [len(text.tokens) for text in texts]
    assert read == [lengths[7] + lengths[3], lengths[12], 0, lengths[299] + lengths[0]]


def test_rows_that_do_not_fit_are_refused_before_any_is_held(
    target: CountingTarget, texts: list[TrainingText], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    held = HeldRows(texts, EAGLE3, FeatureComputer(target, EAGLE3))
    with pytest.raises(
        ValueError, match=r"texts\.features must be cached or computed: .* fit in the 0\.00 GB"
    ):
        held.read([0])
