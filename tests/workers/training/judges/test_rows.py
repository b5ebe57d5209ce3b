"""Rows of labelled tokens: a tree of texts gives what each text gives on its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.judges.labels import LabelledText
from outrider.workers.training.judges.rows import JudgeRowComputer, judge_rows, trees_of
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from support.tiny import tiny_drafter, tiny_target

PROMPT = (5, 9, 11)


def text(
    name: str, output: tuple[int, ...], labels: str, problem: str = "p", kind: str = "k"
) -> LabelledText:
    return LabelledText(name, problem, "d", kind, PROMPT, output, labels)


TEXTS = [
    text("0", (20, 21, 22, 23), "gggg"),
    text("1", (20, 21, 30), "ggb", kind="number"),
    text("2", (20, 40, 41), "gg.", kind="route"),
    text("3", (20, 21, 22, 23), "...b"),  # contradicts the first
    text("4", (20, 50), "gb", problem="q"),
]


@pytest.fixture(scope="module")
def models() -> tuple[TargetFeatures, TargetFeatures]:
    found = []
    for resolved in (tiny_target(), tiny_drafter()):
        source = open_source(resolved)
        found.append(TargetFeatures(source, (source.config.num_layers,), torch.float32, 1))
    return found[0], found[1]


def test_rows_of_a_tree_are_those_of_its_texts(
    models: tuple[TargetFeatures, TargetFeatures], tmp_path: Path
) -> None:
    target, draft = models
    trees = trees_of(TEXTS)
    assert [tree.num_contradictory for tree in trees] == [1, 0]
    assert len(trees[0].tree.tokens) == len(PROMPT) + 4 + 1 + 2
    rows = judge_rows(trees, lambda: JudgeRowComputer(target, draft), tmp_path, "models", silent)
    expected: dict[tuple[str, tuple[int, ...]], bool] = {}
    for labelled in TEXTS:
        for place, label in enumerate(labelled.labels):
            if label != ".":
                expected[labelled.problem, labelled.output_tokens[: place + 1]] = label == "g"
    del expected["p", (20, 21, 22, 23)]
    assert len(rows) == len(expected)
    last = target.model.config.num_layers
    for (problem, output), is_good in expected.items():
        tokens = [*PROMPT, *output]
        (own,), (other,) = target.rows([tokens]), draft.rows([tokens])
        law = target.model.logits(own[last][-2:-1])[0].log_softmax(-1)
        row = torch.cat([own[last][-1], other[last][-1]])
        same = np.abs(rows.rows - row.numpy()).max(axis=1) < 1e-4
        (index,) = np.flatnonzero(same & (rows.problems == problem))
        assert rows.is_good[index] == is_good
        assert rows.tokens[index] == output[-1]
        assert rows.logprobs[index] == pytest.approx(float(law[output[-1]]), abs=1e-4)
        assert rows.choice_logprobs[index] == pytest.approx(float(law.max()), abs=1e-4)
        assert rows.entropies[index] == pytest.approx(float(-(law.exp() * law).sum()), abs=1e-3)
        assert rows.is_mismatch[index] == (int(law.argmax()) != output[-1])
    assert sorted(rows.kinds.tolist()) == sorted(["k"] * 5 + ["number", "route"])


def test_rows_are_computed_once(models: tuple[TargetFeatures, TargetFeatures], tmp_path: Path) -> None:
    target, _ = models
    trees = trees_of(TEXTS)
    first = judge_rows(trees, lambda: JudgeRowComputer(target, None), tmp_path, "models", silent)

    def refuse() -> JudgeRowComputer:
        raise AssertionError("the rows are there")

    again = judge_rows(trees, refuse, tmp_path, "models", silent)
    np.testing.assert_array_equal(first.rows, again.rows)
    with pytest.raises(AssertionError):
        judge_rows(trees, refuse, tmp_path, "other models", silent)
    with pytest.raises(AssertionError):
        judge_rows(trees_of(TEXTS[:1]), refuse, tmp_path, "models", silent)


def test_of_texts_that_end_alike_a_few_tokens_of_the_end_are_kept() -> None:
    end = tuple(range(100, 140))
    (tree,) = trees_of([text("0", (20, *end), "g" * 41), text("1", (21, *end), "g" * 41)])
    assert len(tree.tree.tokens) == len(PROMPT) + 41 + 1 + 8
