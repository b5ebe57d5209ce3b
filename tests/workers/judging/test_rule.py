"""The rule `judge` on a tree of three drafted tokens; the judge likes rows by their first column.

node 0 = 10 ─┬─ 1 = 11 ─── 2 = 13
             └─ 3 = 12
"""

import numpy as np
import pytest
import torch

from outrider.workers.judging.head import JudgeDescription, JudgeHead
from outrider.workers.judging.identity import ModelIdentity
from outrider.workers.judging.rule import Judge, JudgeRule, judge_rules
from outrider.workers.sequences.rules import Verdicts
from outrider.workers.sequences.sequence import AcceptanceOptions
from outrider.workers.sequences.tree import DraftTrees
from support.steps import node_scores

TREES = DraftTrees(
    np.array([4]), np.array([[10, 11, 13, 12]]), np.array([[0, 0, 1, 0]]), np.zeros((1, 4), np.int64)
)
TARGET = ModelIdentity("tiny", 2, 5, 100, "", "")


def judge() -> Judge:
    head = JudgeHead(2)
    head.linear.weight.data[:] = torch.tensor([[1.0, 0.0]])
    head.linear.bias.data[:] = 0.0
    return Judge("likes", head, JudgeDescription("target", TARGET, None, 0.5, (), ()))


def verdict(
    rows: list[float],
    threshold: float = 0.5,
    sampled: tuple[int, ...] = (99, 99, 99, 99),
    pushed_down: tuple[int, ...] = (),
    removed: tuple[int, ...] = (),
) -> Verdicts:
    hidden = torch.zeros(1, 4, 2)
    hidden[0, :, 0] = torch.tensor(rows)
    is_pushed_down, laws = np.zeros((1, 4), dtype=np.bool_), np.full((1, 4), -1.0)
    is_pushed_down[0, list(pushed_down)] = True
    laws[0, list(removed)] = -np.inf
    scores = node_scores(
        np.array([sampled]), child_laws=laws, is_pushed_down=is_pushed_down, hidden={5: hidden}
    )
    return JudgeRule(judge(), threshold).verdict(TREES, scores)


def path(verdicts: Verdicts) -> list[int]:
    return verdicts.paths[0, : verdicts.num_accepted[0] + 1].tolist()


def test_what_scores_above_the_threshold_is_kept() -> None:
    verdicts = verdict([9.0, 1.0, 1.0, -1.0])
    assert path(verdicts) == [0, 1, 2]
    assert verdicts.is_kept[0, 1:3].all()
    assert verdicts.judged[0, :3] == pytest.approx([0.0, 0.7311, 0.7311], abs=1e-4)
    assert path(verdict([9.0, 1.0, 1.0, -1.0], threshold=0.8)) == [0]
    assert path(verdict([9.0, -1.0, 9.0, -1.0])) == [0]  # 13 hangs below a token that is out


def test_at_threshold_1_the_rule_is_exact() -> None:
    assert path(verdict([99.0] * 4, threshold=1.0)) == [0]
    verdicts = verdict([99.0] * 4, threshold=1.0, sampled=(12, 99, 99, 7))
    assert path(verdicts) == [0, 3]
    assert verdicts.next_tokens[0] == 7
    assert not verdicts.is_kept.any()


def test_what_the_request_works_against_is_up_to_exact() -> None:
    assert path(verdict([9.0] * 4, pushed_down=(1,))) == [0, 3]
    assert path(verdict([9.0] * 4, pushed_down=(1,), sampled=(11, 99, 99, 99))) == [0, 1, 2]
    assert path(verdict([9.0] * 4, removed=(2, 3))) == [0, 1]


def test_judges_are_found_by_name() -> None:
    one, other = judge(), judge()
    make = judge_rules({"one": one, "other": other})["judge"]
    asked = AcceptanceOptions("judge", judge="one", threshold=0.7)
    assert make(asked) == make(asked) == JudgeRule(one, 0.7)
    assert make(asked) != JudgeRule(other, 0.7)
    assert make(asked).needs.hidden.layers == (5,)
    assert judge_rules({}) == {}
