"""The rule `judge`: a drafted token stands if `exact` accepts it or the judge finds that it does no harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from outrider.workers.judging.head import JudgeDescription, JudgeHead
from outrider.workers.sequences.hidden import HiddenNeeds
from outrider.workers.sequences.rules import NodeScores, Rule, RuleMaker, RuleNeeds, Verdicts, longest_paths
from outrider.workers.sequences.segments import pick
from outrider.workers.sequences.sequence import AcceptanceOptions
from outrider.workers.sequences.tree import DraftTrees, Floats


@dataclass(frozen=True, eq=False)
class Judge:
    """A judge that is loaded. description: whom it belongs to, and its calibration."""

    name: str
    head: JudgeHead
    description: JudgeDescription

    @property
    def needs(self) -> RuleNeeds:
        """Its rows, and what the law says of drafted tokens."""
        return RuleNeeds(
            child_logprobs=True,
            hidden=HiddenNeeds((self.description.target.num_layers,)),
            draft_rows=self.description.drafter is not None,
        )

    @torch.inference_mode()
    def scores(self, trees: DraftTrees, scores: NodeScores) -> Floats:
        """[B, K]: from 0 to 1, near 1 for nodes whose tokens do no harm; 0 where it has no row to read."""
        rows, has_rows = scores.hidden.get(self.description.target.num_layers), trees.exists
        if rows is None:  # all are in the middle of their prompts
            return np.zeros(has_rows.shape)
        if self.description.drafter is not None:
            rows = torch.cat([rows.float(), scores.draft_rows.to(rows.device).float()], dim=2)
            has_rows = has_rows & scores.has_draft_row
        logits = self.head(rows.to(self.head.linear.weight.device))
        found: Floats = torch.sigmoid(logits).double().cpu().numpy()
        return found * has_rows


@dataclass(frozen=True)
class JudgeRule(Rule):
    """Judge Decoding (arXiv 2501.19309): keeps a drafted token where its judge's score is above `threshold`.

    A token that the request itself makes less likely (penalties, a negative bias) or impossible is up to `exact`: the
    judge knows the model's mind, not the request's. Of several paths the longest wins, then the likeliest under the
    law that the request asks for. At threshold 1 the rule is `exact`.
    """

    judge: Judge
    threshold: float

    name = "judge"
    is_lossless = False

    @property
    def needs(self) -> RuleNeeds:
        """The rows that its judge reads."""
        return self.judge.needs

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        judged = self.judge.scores(trees, scores)
        verdicts = longest_paths(trees, scores, (judged > self.threshold) & ~scores.is_pushed_down)
        of_paths = pick(judged, verdicts.paths)
        of_paths[:, 0] = 0.0
        on_path = np.arange(of_paths.shape[1]) <= verdicts.num_accepted[:, None]
        return verdicts._replace(judged=of_paths * on_path)


def judge_rules(judges: Mapping[str, Judge]) -> Mapping[str, RuleMaker]:
    """The rule `judge` for requests that name one of these; nothing without judges."""

    def make(options: AcceptanceOptions) -> JudgeRule:
        return JudgeRule(judges[options.judge], options.threshold)

    return {JudgeRule.name: make} if judges else {}
