"""Fitting, calibrating and measuring a judge on made-up rows."""

import numpy as np
import pytest

from outrider.workers.training.judges.fit import (
    Split,
    fit_judge,
    platt,
    scores,
    split_by_problem,
    threshold_for,
)
from outrider.workers.training.judges.measures import (
    by_group,
    chain_length,
    curves,
    quality,
    threshold_table,
    token_class,
    trivial_judges,
)
from outrider.workers.training.judges.rows import JudgeRows

COLUMNS = 12


def made_up(num_problems: int = 60, per_problem: int = 40, signal: float = 2.0, seed: int = 0) -> JudgeRows:
    """A tenth of the tokens is bad; one column tells, the others have scales of their own."""
    generator = np.random.default_rng(seed)
    count = num_problems * per_problem
    is_good = generator.random(count) > 0.1
    scale = 10.0 ** generator.uniform(-2, 3, COLUMNS)
    rows = generator.normal(size=(count, COLUMNS)) * scale + scale
    rows[:, 3] += np.where(is_good, signal, -signal) * scale[3]
    problems = np.array([f"p{index // per_problem}" for index in range(count)])
    choice = np.full(count, -0.1, dtype=np.float32)
    logprobs = np.where(generator.random(count) < 0.3, choice, -3.0 + generator.normal(size=count) * 0.1)
    return JudgeRows(
        rows.astype(np.float32),
        is_good,
        logprobs.astype(np.float32),
        choice,
        generator.random(count).astype(np.float32),
        generator.integers(0, 5, count),
        problems,
        np.array(["d"] * count),
        np.where(is_good, "right", "wrong"),
        0,
    )


def test_no_problem_is_in_two_parts() -> None:
    rows = made_up()
    split = split_by_problem(rows, 0)
    parts = [set(part.problems.tolist()) for part in (split.train, split.calibrate, split.held_out)]
    assert [len(part) for part in parts] == [36, 12, 12]
    assert len(set.union(*parts)) == 60
    other = split_by_problem(rows, 1)
    assert set(other.held_out.problems.tolist()) != parts[2]


@pytest.mark.parametrize("learned", ["all", "mismatches"])
def test_a_judge_finds_what_there_is_and_its_scores_are_probabilities(learned: str) -> None:
    split = split_by_problem(made_up(200), 0)
    fitted = fit_judge(split, learned, 0, 1)  # type: ignore[arg-type]
    asked = split.held_out.at(split.held_out.is_mismatch)
    scored = scores(fitted.head, asked.rows)
    found = quality(scored, asked, 0)
    assert found.auc > 0.98
    assert found.auc_low <= found.auc <= found.auc_high
    # Of tokens with a score near s, about the fraction s is good.
    for low, high in ((0.0, 0.2), (0.5, 0.95), (0.95, 1.0)):
        here = (scored > low) & (scored <= high)
        assert asked.is_good[here].mean() == pytest.approx(scored[here].mean(), abs=0.12)
    drawn = curves(scored, asked.is_good)
    assert (drawn.recalls[0], drawn.recalls[-1]) == (0, 1)
    assert list(drawn.recalls) == sorted(drawn.recalls)


def test_where_there_is_nothing_to_learn_no_judge_is_a_good_one() -> None:
    rows = made_up()
    silent = JudgeRows(**{**rows.__dict__, "rows": np.ones_like(rows.rows)})
    with pytest.raises(ValueError, match=r"nothing was learned from them: AUC 0\.500"):
        fit_judge(split_by_problem(silent, 0), "all", 0, 1)
    split = split_by_problem(made_up(signal=0.02), 0)
    asked = split.held_out.at(split.held_out.is_mismatch)
    assert quality(scores(fit_judge(split, "all", 0, 1).head, asked.rows), asked, 0).auc_low < 0.55


def test_too_few_labels_are_refused_by_name() -> None:
    rows = made_up(3)
    with pytest.raises(
        ValueError, match="harmful and harmless mismatches to measure a judge with, got 0 and 0"
    ):
        fit_judge(split_by_problem(rows, 0), "all", 0, 1)
    good = rows.at(rows.is_good)
    with pytest.raises(ValueError, match="to fit a judge with, got 0 and"):
        fit_judge(Split(good, rows, rows), "all", 0, 1)


def test_platt_turns_the_scale_of_logits_to_odds() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=20_000).astype(np.float32) * 3
    is_good = generator.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits + 1)))
    assert platt(logits, is_good) == (pytest.approx(0.5, abs=0.03), pytest.approx(1.0, abs=0.06))


def test_the_threshold_refuses_the_wanted_part_of_the_harmful_tokens() -> None:
    scored = np.array([0.1, 0.3, 0.6, 0.9, 0.9], dtype=np.float32)
    is_good = np.array([False, False, False, False, True])
    assert threshold_for(scored, is_good, 0.5) == pytest.approx(0.3, abs=0.0011)
    assert threshold_for(scored, is_good, 0.51) == pytest.approx(0.6, abs=0.0011)
    assert threshold_for(scored, is_good, 1.0) == pytest.approx(0.9, abs=0.0011)
    assert threshold_for(scored, is_good, 0.0) == 0.0
    for recall in (0.25, 0.6, 0.9):
        assert (scored[~is_good] <= threshold_for(scored, is_good, recall)).mean() >= recall


def test_the_table_says_what_a_threshold_refuses_keeps_and_gains() -> None:
    rows = made_up(2)
    asked = rows.at(rows.is_mismatch)
    scored = np.where(asked.is_good, 0.8, 0.2).astype(np.float32)
    low, high = threshold_table(scored, asked, (0.5, 0.9), 0.0, 4)
    assert (low.harmful_recall, low.benign_kept, low.acceptance_length) == (1.0, 1.0, 0.0)
    assert (high.harmful_recall, high.benign_kept) == (1.0, 0.0)
    asked = JudgeRows(**{**asked.__dict__, "kinds": np.array(["mined"] * len(asked))})
    low, high = threshold_table(scored, asked, (0.5, 0.9), 0.6, 4)
    share = asked.is_good.mean()
    assert low.acceptance_length == pytest.approx(chain_length(0.6 + 0.4 * share, 4))
    assert (high.acceptance_length, high.speed) == (pytest.approx(chain_length(0.6, 4)), 1.0)
    assert chain_length(0.5, 2) == 1.75
    assert by_group(scored, asked, asked.kinds, 0.5)["mined"]["harmful_refused"] == 1.0


def test_trivial_judges_read_no_hidden_row() -> None:
    rows = made_up()
    words = {0: "12", 1: " +", 2: "apple", 3: "\n", 4: ","}
    assert [token_class(word) for word in words.values()] == ["digits", "operator", "word", "space", "other"]
    split = split_by_problem(rows, 0)
    asked = split.held_out.at(split.held_out.is_mismatch)
    found = trivial_judges(split.train.at(split.train.is_mismatch), asked, words.__getitem__)
    assert set(found) == {"token class", "log-prob", "entropy", "typical", "together"}
    for scored in found.values():
        assert 0.35 < quality(scored, asked, 0).auc < 0.65  # of rows in which nothing else tells
