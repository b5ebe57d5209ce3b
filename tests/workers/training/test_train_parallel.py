"""Parallel drafters in training: which token is whose label, what a server would compute, and texts by heart."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.configs.training import ParallelConfig, TrainedHeadConfig
from outrider.workers.draft_heads.checkpoint import read_parallel
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.training.block_attention import plan_blocks
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.launch import train
from outrider.workers.training.log import Line
from outrider.workers.training.losses import LOSSES, eager_loss
from outrider.workers.training.parallel import ParallelTraining, drafter_shape
from outrider.workers.training.texts import read_texts
from outrider.workers.training.vocabulary_loss import SoftTargets
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tensors import HEAD
from support.equality import decode
from support.local_engine import LocalEngine
from support.parallel_reference import logits_after
from support.tensor_source import tiny_config
from support.tiny import SLOW_TARGET
from support.tiny_heads import building_parallel, read
from support.training import TARGET, cases, tiny_run, write_texts

# Two texts back to back; capitals are labels.
TEXTS = ["abCDEF", "uvwXY"]
TOKENS = "".join(TEXTS)
IS_LABEL = torch.tensor([token.isupper() for token in TOKENS])
PARALLEL = ParallelConfig(mask_token_id=1, block_size=4, pair_rank=8, anchors=20)


def test_levels_guess_the_tokens_behind_their_anchors_and_no_others() -> None:
    """As in the picture in block_attention.py: "anchor at its place: what levels 0, 1 and 2 guess"."""
    blocks = plan_blocks([6, 5], IS_LABEL, 3, 10, torch.Generator())
    found = {
        f"{TOKENS[anchor]}{place}": "".join(
            TOKENS[anchor + level + 1] for level in range(3) if learned[level]
        )
        for anchor, place, learned in zip(
            blocks.anchors.tolist(), blocks.places.tolist(), blocks.learned, strict=True
        )
    }
    assert found == {"b1": "CDE", "C2": "DEF", "D3": "EF", "E4": "F", "w2": "XY", "X3": "Y"}
    assert blocks.by_text == [(0, 6, 0, 4), (6, 5, 4, 2)]
    few = plan_blocks([6, 5], IS_LABEL, 3, 1, torch.Generator().manual_seed(1))
    assert [count for *_, count in few.by_text] == [1, 1]
    assert not len(plan_blocks([3], torch.zeros(3, dtype=torch.bool), 3, 5, torch.Generator()).anchors)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (PARALLEL, ()),
        (replace(PARALLEL, causal=False, anchor_guesses=False, pair_rank=0, loss="kl"), ()),
        (replace(PARALLEL, learns="text"), (BlockLayer(True, 4), BlockLayer(False, 5, True))),
    ],
)
def test_the_trainer_computes_what_a_server_computes(
    config: ParallelConfig, layers: tuple[BlockLayer, ...]
) -> None:
    """Loss of all blocks at once against losses of logits that were made block by block, by what the server's drafter
    is compared with as well (tests/workers/drafting/test_parallel.py)."""
    torch.manual_seed(0)
    target = replace(tiny_config("llama", num_heads=4, num_kv_heads=2), vocab_size=40)
    hidden, ids = target.hidden_size, torch.arange(0, 40, 2)
    shape = drafter_shape(target, LmHeadShape(hidden, len(ids), hidden), replace(config, taps=(1, 2)))
    drafter = ParallelDrafter(replace(shape, layers=layers or shape.layers), ids)
    for name, weight in drafter.named_parameters():
        if name.startswith("pair.") or "norm" in name:
            weight.data += 0.5 * torch.randn(weight.shape)
    embedding = torch.randn(40, hidden)
    training = ParallelTraining(drafter, embedding, config, torch.float32)
    lengths, first_label = [9, 6], 3
    N, K = sum(lengths), shape.num_levels
    columns = torch.rand(N, len(ids)).topk(4).indices
    batch = FeatureBatch(
        lengths=lengths,
        tokens=torch.randint(2, 40, (N,)),
        is_label=torch.cat([torch.arange(length) >= first_label for length in lengths]),
        taps=torch.randn(N, 2 * hidden),
        normed=torch.empty(N, 0),
        greedy=torch.where(torch.arange(N) % 4 == 1, 1, ids[columns[:, 0]]),  # 1 is no token of the head
        soft=SoftTargets(columns, torch.log_softmax(torch.randn(N, len(ids)), -1).topk(4).values),
    )
    totals = training.count_labels(batch)
    loss, counts = training(batch, totals, measure=False)
    loss.backward()
    assert all(weight.grad is not None for weight in drafter.parameters())

    sums, labels = torch.zeros(K), torch.zeros(K)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        tokens, taps = batch.tokens[part].tolist(), batch.taps[part]
        for anchor in range(first_label - 1, length - 1):
            for level in range(min(K, length - 1 - anchor)):
                at = start + anchor + level
                path = tokens[anchor + 1 : anchor + level + 1]
                logits = logits_after(drafter, embedding, taps, tokens[: anchor + 1], path)
                soft, label = batch.soft.at(torch.tensor([at])), int(batch.greedy[at])
                if config.learns == "text":
                    label = int(batch.tokens[at + 1])
                    soft = SoftTargets(torch.tensor([[label // 2]]), torch.zeros(1, 1))
                if label % 2 == 0:
                    own = (logits[None], soft.columns, soft.log_probs, torch.ones(1), LOSSES[config.loss])
                    sums[level] += eager_loss(*own).detach()
                    labels[level] += 1
        start += length
    assert totals.tolist() == labels.tolist()
    torch.testing.assert_close(counts.sums[:, 2], sums, atol=1e-4, rtol=1e-4)


def test_what_it_learned_by_heart_the_server_accepts(tmp_path: Path) -> None:
    """With a trimmed head that is the target's own, is not stored, and is found again."""
    write_texts(tmp_path)
    used = {token for text in read_texts(tmp_path) for token in text.tokens}
    (tmp_path / "ids.json").write_text(json.dumps(sorted(used)))
    mask = min(set(range(3, 160)) - used)
    base = tiny_run(tmp_path, tmp_path / "run", steps=150)
    config = replace(
        base,
        method="parallel",
        parallel=replace(PARALLEL, mask_token_id=mask),
        head=TrainedHeadConfig("trimmed", str(tmp_path / "ids.json"), frozen=True),
    )
    found = train(config, lambda text: None, silent, lambda line: None)
    assert min(found.top(1)) > 0.9
    assert found.acceptance_length > 4.2  # of 5: its own guess and four drafted
    drafter, description = read_parallel(tmp_path / "run" / "drafter")
    assert description.accuracies == found.accuracies
    assert drafter.shares_lm_head
    assert drafter.lm_head.ids.tolist() == sorted(used)
    target = open_source(TARGET)
    drafter.take_target(read(target, HEAD)[drafter.lm_head.ids])
    with LocalEngine(target, methods=(building_parallel(target, drafter),), profile=SLOW_TARGET) as engine:
        answers = decode(engine, cases(tmp_path), DraftOptions(("parallel",), 4, 4))
    for text in read_texts(tmp_path):
        assert answers[text.id].tokens == text.output_tokens
    # A token with the prompt, then five in a round of one of its own and four drafted, where all are accepted.
    at_best = sum(1 + math.ceil((len(answer.tokens) - 1) / 5) for answer in answers.values())
    assert sum(answer.stats.num_rounds for answer in answers.values()) <= 1.15 * at_best


class KilledError(Exception):
    """Stands for a signal: nothing is written after it."""


def test_a_run_that_was_killed_takes_the_same_anchors_again(tmp_path: Path) -> None:
    write_texts(tmp_path)
    base = replace(tiny_run(tmp_path, tmp_path / "a", steps=4), checkpoint_every=2)
    config = replace(base, method="parallel", parallel=replace(PARALLEL, mask_token_id=0, anchors=3))
    losses: dict[str, list[float]] = {"a": [], "b": []}
    train(config, lambda text: None, silent, lambda line: losses["a"].append(getattr(line, "loss", 0.0)))

    def kill(line: Line) -> None:
        if line.step == 3:
            raise KilledError

    interrupted = replace(config, out=str(tmp_path / "b"))
    with pytest.raises(KilledError):
        train(interrupted, lambda text: None, silent, kill)
    train(interrupted, lambda text: None, silent, lambda line: losses["b"].append(getattr(line, "loss", 0.0)))
    assert len(losses["a"]) == 5  # and a measurement
    assert losses["b"] == losses["a"][2:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_token_id": 160}, r"^parallel\.mask_token_id must be below 160, got 160$"),
        ({"taps": (9,)}, r"^parallel\.taps must be from 1 to 8, got \(9,\)$"),
    ],
)
def test_options_that_do_not_fit_the_target_are_one_line(changes: dict[str, object], said: str) -> None:
    source = open_source(TARGET)
    with pytest.raises(ValueError, match=said):
        drafter_shape(source.config, LmHeadShape(64, 160, 64), replace(PARALLEL, **changes))


def test_a_mask_that_texts_have_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path)
    token = next(read_texts(tmp_path)).tokens[5]
    base = tiny_run(tmp_path, tmp_path / "run", steps=1)
    config = replace(base, method="parallel", parallel=replace(PARALLEL, mask_token_id=token))
    with pytest.raises(
        ValueError, match=rf"parallel\.mask_token_id must be a token that no text has, got {token}"
    ):
        train(config, lambda text: None, silent, lambda line: None)
