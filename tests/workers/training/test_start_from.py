"""What a run begins with: where the checkpoint is found, and what is taken of one with another LM head."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.configs import loader
from outrider.workers.draft_heads.checkpoint import write_parallel
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.pairs import PairShape
from outrider.workers.draft_heads.parallel import ParallelDrafter
from outrider.workers.draft_heads.trim import trimmed_drafter
from outrider.workers.training.launch import train
from outrider.workers.training.saving import start_from
from outrider.workers.weights import resolver
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from support.fake_hub import FakeHub
from support.tiny_heads import parallel_drafter
from support.training import tiny_run, write_texts

TARGET = RandomSource("random:llama?num_layers=6&hidden_size=64&vocab_size=320")
PAIR = PairShape("markov", 8)


def other(ids: torch.Tensor, rank: int = 8) -> ParallelDrafter:
    """A drafter for these ids, none of whose weights is the other's."""
    drafter = trimmed_drafter(parallel_drafter(TARGET, (1, 2), pair=PairShape("markov", rank)), ids)
    for weight in drafter.parameters():
        weight.data += 0.1
    return drafter


@pytest.fixture
def trained(tmp_path: Path) -> ParallelDrafter:
    """A drafter that lies in `tmp_path / "mine"`."""
    drafter = parallel_drafter(TARGET, (1, 2), pair=PAIR, num_ids=100)
    write_parallel(tmp_path / "mine", drafter, HeadDescription(), torch.float32)
    return drafter


@pytest.mark.parametrize("where", ["folder", "shipped", "hub"])
def test_a_checkpoint_is_found_as_those_that_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: ParallelDrafter, where: str
) -> None:
    checkpoint = {"folder": str(tmp_path / "mine"), "shipped": "shipped:mine", "hub": "org/name"}[where]
    for module in (loader, resolver):
        monkeypatch.setattr(module, "HEADS_DIR", tmp_path)
    hub = FakeHub(monkeypatch, tmp_path)
    shutil.copytree(tmp_path / "mine", hub.remote)
    begun = other(trained.lm_head.ids)
    start_from(checkpoint, begun, 6)
    for name, weight in begun.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name


@pytest.mark.parametrize("shares", [False, True])
def test_of_a_drafter_with_other_ids_a_pair_term_takes_the_rows_of_those_that_both_have(
    tmp_path: Path, trained: ParallelDrafter, shares: bool
) -> None:
    trained.shares_lm_head = shares
    write_parallel(tmp_path / "mine", trained, HeadDescription(), torch.float32)
    begun = other(torch.arange(0, 320, 2))
    fresh = {name: weight.clone() for name, weight in begun.state_dict().items()}
    start_from(str(tmp_path / "mine"), begun, 6)
    theirs = trained.state_dict()
    ids = trained.lm_head.ids.tolist()
    assert 0 < len(set(ids) & set(begun.lm_head.ids.tolist())) < 100
    for name, weight in begun.state_dict().items():
        if name == "lm_head.weight":
            assert torch.equal(weight, fresh[name])
        elif name == "pair.markov_w2.weight":
            for place, token in enumerate(begun.lm_head.ids.tolist()):
                row = theirs[name][ids.index(token)] if token in ids else fresh[name][place]
                assert torch.equal(weight[place], row), token
        else:
            assert torch.equal(weight, theirs[name]), name


def test_a_pair_term_of_another_rank_is_refused(tmp_path: Path, trained: ParallelDrafter) -> None:
    with pytest.raises(ValueError, match=r"^start_from must be .* differs in .*pair\.markov_w2\.weight"):
        start_from(str(tmp_path / "mine"), other(trained.lm_head.ids, rank=4), 6)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            "nowhere",
            r"^start_from: no directory nowhere \(and it is not a Hugging Face id or shipped:NAME\)$",
        ),
        (
            "shipped:nobody",
            r"^start_from: no heads of that name come with the package .*shipped:smollm2-eagle3",
        ),
    ],
)
def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_computed(
    tmp_path: Path, checkpoint: str, message: str
) -> None:
    write_texts(tmp_path)
    config = replace(tiny_run(tmp_path, tmp_path / "run", steps=1), start_from=checkpoint)
    with pytest.raises(ValueError, match=message):
        train(config, lambda text: None, silent, lambda line: None)
    assert not (tmp_path / "run" / "features").exists()


def test_a_checkpoint_of_another_kind_is_refused_by_name(tmp_path: Path, trained: ParallelDrafter) -> None:
    write_texts(tmp_path / "texts")
    config = replace(
        tiny_run(tmp_path / "texts", tmp_path / "run", steps=1), start_from=str(tmp_path / "mine")
    )
    with pytest.raises(ValueError, match=r"^start_from: .*mine"):
        train(config, lambda text: None, silent, lambda line: None)
