"""Which texts are trained on, and in which order."""

from dataclasses import replace
from pathlib import Path

import pytest

from outrider.configs.training import TextsConfig
from outrider.workers.training.data import BatchPlan, Manifest, read_corpus
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import DistilledText, TextWriter

LENGTHS = [10 + (7 * number) % 50 for number in range(100)]


def test_every_text_is_read_once_a_pass_in_batches_of_like_size() -> None:
    plan = BatchPlan(LENGTHS, batch_tokens=200, num_groups=2, seed=1)
    seen: list[int] = []
    step = 0
    while len(seen) < len(LENGTHS):
        groups = plan.groups(step)
        sizes = [sum(LENGTHS[text] for text in group) for group in groups]
        assert 100 < sum(sizes) < 300
        assert max(sizes) - min(sizes) <= 60  # one text
        seen += [text for group in groups for text in group]
        step += 1
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_the_order_depends_on_the_seed_and_changes_from_pass_to_pass() -> None:
    def steps(seed: int, first: int) -> list[list[list[int]]]:
        plan = BatchPlan(LENGTHS, 200, 1, seed)
        return [plan.groups(step) for step in range(first, first + 5)]

    assert steps(0, 0) == steps(0, 0)
    assert steps(0, 0) != steps(1, 0)
    assert steps(0, 20) != steps(0, 0)


def write(folder: Path, count: int) -> None:
    with TextWriter(folder, Description("m", 100, "", {}, "")) as writer:
        for number in range(count):
            tokens = tuple(range(number, number + 6))
            writer.write(
                DistilledText(str(number), tokens[:2], tokens[2:], 0.0, number % 2 == 0, "x", "length")
            )


def test_every_so_manyth_text_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, 9)
    corpus = read_corpus(TextsConfig((str(tmp_path),), eval_every=4), None)
    assert [int(text.tokens[0]) for text in corpus.held_out] == [3, 7]
    assert [int(text.tokens[0]) for text in corpus.training] == [0, 1, 2, 4, 5, 6, 8]
    assert corpus.training[0].num_unlearned == 2
    assert corpus.manifest == Manifest({str(tmp_path): 9})
    again = read_corpus(
        TextsConfig((str(tmp_path),), eval_every=4, loss_on_prompts=True), Manifest({str(tmp_path): 5})
    )
    assert [int(text.tokens[0]) for text in again.training] == [0, 1, 2, 4]
    assert again.training[0].num_unlearned == 0
    assert again.digest != corpus.digest


def test_a_folder_with_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none to train on"):
        read_corpus(TextsConfig((str(tmp_path),)), None)
    with pytest.raises(
        ValueError, match=r"texts.directories must be folders with texts-\*.jsonl, got '.*/none'"
    ):
        read_corpus(TextsConfig((str(tmp_path / "none"),)), None)


def test_texts_too_few_to_hold_one_out_are_said_to_be(tmp_path: Path) -> None:
    write(tmp_path, 9)
    few = TextsConfig((str(tmp_path),), eval_every=10)
    with pytest.raises(
        ValueError, match=r"texts\.eval_every must be at most 9, .* got 10; or texts\.eval_dir"
    ):
        read_corpus(few, None)
    assert len(read_corpus(replace(few, eval_directories=(str(tmp_path),)), None).training) == 9
