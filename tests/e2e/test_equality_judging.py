"""Typical acceptance and judges on a tiny model: what they keep, what it cost, and that no other text changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.judging.head import JudgeDescription, JudgeHead
from outrider.workers.judging.identity import ModelIdentity, identify
from outrider.workers.judging.rule import Judge, JudgeRule, judge_rules
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import RULES, NodeScores, RuleMaker, Verdicts
from outrider.workers.sequences.sequence import AcceptanceOptions, Request, TokenEvent
from outrider.workers.sequences.tree import DraftTrees, Floats
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from support.equality import Case, Reference, assert_same_tokens
from support.local_engine import LocalEngine, default_options, output_tokens
from support.thread_group import thread_group
from support.tiny import BOTH, FEW_TOKENS, GREEDY, MODEL, poor_drafter, tiny_cases

FEW = [token for token, _ in FEW_TOKENS]
GOOD = FEW[::2]
BIASED = replace(GREEDY, logit_bias=FEW_TOKENS)
NUM_LAYERS = 2
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def drafter() -> WeightSource:
    """Wrong often enough for rules to differ."""
    return open_source(poor_drafter())


class SeenRule(JudgeRule):
    """Keeps what it decided on: trees, scores and verdicts."""

    seen: list[tuple[DraftTrees, NodeScores, Verdicts]]

    def verdict(self, trees: DraftTrees, scores: NodeScores) -> Verdicts:
        verdicts = super().verdict(trees, scores)
        self.seen.append((trees, scores, verdicts))
        return verdicts


def seen_rule(judge: Judge, threshold: float) -> tuple[SeenRule, dict[str, RuleMaker]]:
    rule = SeenRule(judge, threshold)
    object.__setattr__(rule, "seen", [])
    return rule, {**RULES, "judge": lambda _: rule}


def judge_of(target: WeightSource, head: JudgeHead, drafter: ModelIdentity | None = None) -> Judge:
    kind = "target" if drafter is None else "target_and_draft"
    served = identify("tiny", target, None)
    return Judge("tiny", head, JudgeDescription(kind, served, drafter, 0.5, (), ("six tokens",)))


def probe_for(reference: Reference, good: list[int]) -> JudgeHead:
    """A head made by hand: positive exactly at rows of these tokens, among those of six."""
    random = np.random.default_rng(0)
    texts = [random.choice(FEW, 40).tolist() for _ in range(40)]
    rows = torch.cat([rows[:, 0] for rows, _ in reference.rows(texts, (NUM_LAYERS,))])
    tokens = torch.tensor(texts).flatten()
    wanted = torch.isin(tokens, torch.tensor(good)).float() * 2 - 1
    found = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), wanted[:, None])
    weight = found.solution[:, 0]
    head = JudgeHead.folded(
        weight[:-1], float(weight[-1]), torch.zeros(len(weight) - 1), torch.ones(len(weight) - 1)
    )
    assert torch.equal(head(rows) > 0, wanted > 0)
    return head.requires_grad_(False)


def known_texts(
    case: Case, seen: list[tuple[DraftTrees, NodeScores, Verdicts]]
) -> list[list[tuple[int, ...]]]:
    """Of each decision about a tree, by node, the text down to it."""
    known, found = case.prompt, []
    for trees, _, verdicts in seen:
        paths: list[tuple[int, ...]] = []
        for node in range(int(trees.counts[0])):
            above = known[:-1] if node == 0 else paths[int(trees.parents[0, node])]
            paths.append((*above, int(trees.tokens[0, node])))
        found.append(paths)
        if paths:
            tokens, _ = verdicts.emitted(trees)
            known = (*known, *tokens[0, : verdicts.num_accepted[0] + 1].tolist())
    return found


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_judge_made_by_hand_keeps_exactly_the_tokens_that_it_should(
    target: WeightSource, drafter: WeightSource, reference: Reference, tp_size: int
) -> None:
    check_judging(judge_of(target, probe_for(reference, GOOD)), target, drafter, reference, tp_size)


class JudgeOfParents(Judge):
    """Its rows are those of the tokens before, off by one."""

    def scores(self, trees: DraftTrees, scores: NodeScores) -> Floats:
        rows = scores.hidden[NUM_LAYERS]
        places = torch.from_numpy(trees.parents)[:, :, None].expand_as(rows)
        return super().scores(trees, scores._replace(hidden={NUM_LAYERS: rows.gather(1, places)}))


class JudgeOfNormedRows(Judge):
    """Its rows have been through a norm."""

    def scores(self, trees: DraftTrees, scores: NodeScores) -> Floats:
        rows = scores.hidden[NUM_LAYERS]
        normed = torch.nn.functional.rms_norm(rows, rows.shape[-1:])
        return super().scores(trees, scores._replace(hidden={NUM_LAYERS: normed}))


@pytest.mark.parametrize("wrong", [JudgeOfParents, JudgeOfNormedRows])
def test_a_judge_of_other_rows_does_not_pass(
    target: WeightSource, drafter: WeightSource, reference: Reference, wrong: type[Judge]
) -> None:
    """The check above finds rows that are off by one or taken behind the norm."""
    judge = judge_of(target, probe_for(reference, GOOD))
    with pytest.raises(AssertionError):
        check_judging(wrong(judge.name, judge.head, judge.description), target, drafter, reference, 1)


def check_judging(
    judge: Judge, target: WeightSource, drafter: WeightSource, reference: Reference, tp_size: int
) -> None:
    """Its row is that of the token itself, before the final norm: every score is computed again from there."""
    rule, rules = seen_rule(judge, 0.5)
    case = Case("judged", tuple(FEW * 3), replace(BIASED, max_tokens=40))
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=default_options(fixed_budget=True),
        rules=rules,
    ) as engine:
        found = engine.generate([Request("a", case.prompt, case.sampling, BOTH, AcceptanceOptions("judge"))])[
            "a"
        ]
    num_refused = 0
    for (trees, scores, verdicts), texts in zip(rule.seen, known_texts(case, rule.seen), strict=True):
        if not texts:
            continue
        exists = slice(1, len(texts))
        judged = rule.judge.scores(trees, scores)[0, exists]
        drafted = trees.tokens[0, exists]
        assert (judged > 0.5).tolist() == np.isin(drafted, GOOD).tolist()
        if len(texts) > 1:
            rows = torch.stack([own[-1, 0] for own, _ in reference.rows(texts[1:], (NUM_LAYERS,))])
            np.testing.assert_allclose(judged, torch.sigmoid(judge.head(rows)), atol=1e-3)
        # No good token stands below the last one that came out.
        last = verdicts.paths[0, verdicts.num_accepted[0]]
        below = trees.tokens[0, exists][trees.parents[0, exists] == last]
        assert not np.isin(below, GOOD).any()
        num_refused += len(below)
    kept = [
        t for event in found for t, o in zip(event.tokens, event.origins, strict=True) if o == Origin.KEPT
    ]
    assert len(kept) > 1
    assert num_refused > 0
    assert set(kept) <= set(GOOD)
    check_account(reference, case, found)


def check_account(reference: Reference, case: Case, events: list[TokenEvent]) -> None:
    """A greedy text goes on from what was kept; the account says what that cost."""
    tokens, account = output_tokens(events), events[-1].stats.kept
    origins = [origin for event in events for origin in event.origins]
    ((_, logits),) = reference.rows([(*case.prompt, *tokens)], (0,))
    logits = logits[len(case.prompt) - 1 : -1]
    biased = logits.clone()
    for token, bias in case.sampling.logit_bias:
        biased[:, token] += bias
    own = biased.argmax(dim=1)
    is_kept = torch.tensor([origin == Origin.KEPT for origin in origins])
    assert torch.equal(own == torch.tensor(tokens), ~is_kept)
    laws, row = logits.log_softmax(dim=1), torch.arange(len(tokens))
    gaps = (laws[row, own] - laws[row, torch.tensor(tokens)])[is_kept]
    assert account.num == len(gaps)
    assert account.mean_gap == pytest.approx(float(gaps.mean()), abs=TOLERANCE)
    assert account.worst_gap == pytest.approx(float(gaps.max()), abs=TOLERANCE)


def test_a_judge_waits_for_the_end_of_a_long_prompt(target: WeightSource, drafter: WeightSource) -> None:
    """While it is read no row comes."""
    judge = judge_of(target, JudgeHead(target.config.hidden_size).requires_grad_(False))
    rules = {**RULES, **judge_rules({"tiny": judge})}
    strict = AcceptanceOptions("judge", judge="tiny", threshold=1.0)
    case = tiny_cases((150,))[0]
    with LocalEngine(target, drafter, rules=rules, prefill_chunk=64) as engine:
        texts = [
            output_tokens(engine.generate([Request("a", case.prompt, case.sampling, BOTH, options)])["a"])
            for options in (strict, AcceptanceOptions())
        ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("tp_size", [1, 3])
def test_rules_share_rounds_and_only_those_who_asked_get_other_texts(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], tp_size: int
) -> None:
    """Exact requests beside lossy ones equal plain decoding; a judge at threshold 1 is exact."""
    judge = judge_of(target, probe_for(reference, FEW))
    rules = {**RULES, **judge_rules({"tiny": judge})}
    sampled = SamplingParams(temperature=0.9, top_p=0.8, max_tokens=24)
    cases = [*tiny_cases((5, 171, 140, 33, 90, 64)), *tiny_cases((30, 12), sampled)]
    options = {
        "exact": AcceptanceOptions(),
        "lossy judge": AcceptanceOptions("judge", judge="tiny", threshold=0.5),
        "strict judge": AcceptanceOptions("judge", judge="tiny", threshold=1.0),
        "typical": AcceptanceOptions("typical", epsilon=1e-9, delta=1e-3),
    }
    names = ["exact", "lossy judge", "strict judge", "typical", "exact", "strict judge", "typical", "exact"]
    cases = [replace(case, id=f"{i} {name}") for i, (case, name) in enumerate(zip(cases, names, strict=True))]
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=default_options(fixed_budget=True),
        num_pages=48,  # some are computed again
        rules=rules,
    ) as engine:
        found = engine.generate(
            Request(case.id, case.prompt, case.sampling, BOTH, options[name])
            for case, name in zip(cases, names, strict=True)
        )
    for case, name in zip(cases, names, strict=True):
        events, num_kept = found[case.id], found[case.id][-1].stats.num_kept
        if name in ("exact", "strict judge"):
            tokens = output_tokens(events)
            assert_same_tokens(reference, case, reference.text(case), tokens, ties, f"{name} beside others")
            assert num_kept == 0
        else:
            assert num_kept > 0, case.id
            if case.sampling.is_greedy:
                check_account(reference, case, events)
    assert {rule: counts.num_requests for rule, counts in engine.loop.finished.items()} == {
        "exact": 3,
        "judge": 3,
        "typical": 2,
    }
    assert engine.loop.finished["judge"].kept.least_score > 0.5
    assert engine.pool.num_available == engine.pool.num_pages


def test_a_judge_of_both_models_reads_the_drafters_row_of_the_same_token(
    target: WeightSource, drafter: WeightSource
) -> None:
    """Rows follow their nodes when trees are re-rooted; a node that the drafter has not read is up to `exact`."""
    torch.manual_seed(1)
    head = JudgeHead(2 * target.config.hidden_size).requires_grad_(False)
    rule, rules = seen_rule(judge_of(target, head, identify("drafter", drafter, None)), 0.4)
    case = Case("judged", tuple(FEW * 3), replace(BIASED, max_tokens=40))
    drafted = Reference(poor_drafter())
    with LocalEngine(target, drafter, options=default_options(fixed_budget=True), rules=rules) as engine:
        engine.drafting.methods[1].keep_node_rows()
        engine.generate([Request("a", case.prompt, case.sampling, MODEL, AcceptanceOptions("judge"))])
    num_read = num_unread = 0
    for (trees, scores, _), texts in zip(rule.seen, known_texts(case, rule.seen), strict=True):
        if not texts:
            continue
        has_row = scores.has_draft_row[0, : len(texts)]
        rows = torch.stack([own[-1, 0] for own, _ in drafted.rows(texts, (NUM_LAYERS,))])
        torch.testing.assert_close(
            scores.draft_rows[0, : len(texts)][has_row], rows[has_row], atol=1e-3, rtol=1e-3
        )
        judged = rule.judge.scores(trees, scores)[0, : len(texts)]
        assert (judged[~has_row] == 0).all()
        num_read, num_unread = num_read + has_row[1:].sum(), num_unread + (~has_row[1:]).sum()
    assert num_read > 10
    assert num_unread > 0
