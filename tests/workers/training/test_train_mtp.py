"""A head for multi-token prediction learns a tiny Mellum's texts by heart; the server then accepts what it drafts."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.configs.training import MtpConfig, TrainedHeadConfig
from outrider.workers.draft_heads.checkpoint import read_mtp
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.training.launch import train
from outrider.workers.training.texts import read_texts
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tensors import FINAL_NORM, HEAD
from support.equality import PLAIN, decode
from support.local_engine import LocalEngine
from support.tiny import SLOW_TARGET
from support.tiny_heads import building_mtp, read
from support.training import MELLUM, cases, tiny_run, write_texts


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_what_it_learned_by_heart_the_server_accepts(tmp_path: Path, kind: str) -> None:
    write_texts(tmp_path, MELLUM)
    head = (
        TrainedHeadConfig(kind="full", frozen=True)
        if kind == "full"
        else TrainedHeadConfig("low_rank", rank_divisor=2)
    )
    config = replace(
        tiny_run(tmp_path, tmp_path / "run", steps=150, model=MELLUM),
        method="mtp",
        mtp=MtpConfig(unrolled_steps=3, loss_weight=0.5),
        head=head,
    )
    found = train(config, lambda text: None, silent, lambda line: None)
    assert min(found.top(1)) > 0.9
    assert found.acceptance_length > 3.4  # of 4: its own guess and three drafted
    drafter, description = read_mtp(tmp_path / "run" / "drafter")
    assert description.accuracies == found.accuracies
    target = open_source(MELLUM)
    is_full = kind == "full"
    assert drafter.shares_lm_head == is_full
    assert drafter.model.layers == target.config.layers[:1]
    drafter.take_target(read(target, FINAL_NORM), read(target, HEAD) if is_full else None)
    with LocalEngine(target, methods=(building_mtp(target, drafter),), profile=SLOW_TARGET) as engine:
        answers = decode(engine, cases(tmp_path), DraftOptions(("mtp",), 3, 3))
        plain = decode(engine, cases(tmp_path), PLAIN)
    for text in read_texts(tmp_path):
        assert answers[text.id].tokens == plain[text.id].tokens == text.output_tokens
    # A token with the prompt, then four in a round of one of its own and three drafted, where all are accepted.
    at_best = sum(1 + math.ceil((len(answer.tokens) - 1) / 4) for answer in answers.values())
    num_rounds = sum(answer.stats.num_rounds for answer in answers.values())
    assert num_rounds <= 1.1 * at_best
    assert num_rounds < 0.4 * sum(answer.stats.num_rounds for answer in plain.values())
