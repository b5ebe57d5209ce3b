"""Rules other than `exact`: whose choice every token is, what it is said to be worth, and what a rule is told."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.rules import RULES
from outrider.workers.sequences.sequence import AcceptanceOptions, DraftOptions, Request, TokenEvent
from outrider.workers.sequences.tree import DraftTrees
from outrider.workers.weights.source import WeightSource
from support.equality import Case, Reference
from support.linear_probe import LinearProbe
from support.local_engine import LocalEngine, default_options, output_tokens
from support.thread_group import thread_group
from support.tiny import BOTH, loop_options, tiny_cases
from support.toy_rules import EverySecond, Typical
from support.two_taps import TwoTaps

ALL = DraftOptions((*BOTH.methods, LinearProbe.name, TwoTaps.name), 12, 6)
TOYS = (LinearProbe, TwoTaps)
ASKING = SamplingParams(temperature=0.0, max_tokens=24, logprobs=True, top_logprobs=2)
TOLERANCE = 1e-4
T, D, K = Origin.TARGET, Origin.DRAFT, Origin.KEPT


def origins_of(events: list[TokenEvent]) -> list[Origin]:
    return [origin for event in events for origin in event.origins]


def check_text(reference: Reference, case: Case, events: list[TokenEvent]) -> None:
    """A token is the target's own choice iff it is not said to be kept; log-probs and counts are right for all."""
    tokens, origins = output_tokens(events), origins_of(events)
    assert len(tokens) == len(origins) == case.sampling.max_tokens
    ((_, logits),) = reference.rows([(*case.prompt, *tokens)], (0,))
    logits = logits[len(case.prompt) - 1 : -1]
    biased = logits.clone()
    for token, bias in case.sampling.logit_bias:
        biased[:, token] += bias
    is_own = biased.argmax(dim=1) == torch.tensor(tokens)
    ties = (biased.topk(2).values @ torch.tensor([1.0, -1.0])) < TOLERANCE
    assert torch.equal(is_own | ties, torch.tensor([origin != K for origin in origins]) | ties)
    laws = logits.log_softmax(dim=1)
    said = [logprob for event in events for logprob in event.logprobs]
    own = laws[torch.arange(len(tokens)), torch.tensor(tokens)]
    torch.testing.assert_close(torch.tensor([s.logprob for s in said]), own, atol=TOLERANCE, rtol=TOLERANCE)
    best = laws.topk(2).values
    told = torch.tensor([[logprob for _, logprob in s.top] for s in said])
    torch.testing.assert_close(told, best, atol=TOLERANCE, rtol=TOLERANCE)
    stats = events[-1].stats
    assert stats.num_kept >= origins.count(K)  # a text may end before the last that were accepted
    assert stats.num_accepted >= origins.count(K) + origins.count(D)
    assert stats.num_accepted - origins.count(K) - origins.count(D) <= ALL.max_depth
    # Every round but the last gives one token that was not drafted.
    assert stats.num_rounds - 1 <= origins.count(T) <= stats.num_rounds


@pytest.mark.parametrize(("tp_size", "loop"), [(1, "serial, 1 lane"), (2, "2 lanes"), (3, "2 lanes, ahead")])
def test_every_second_drafted_token_is_kept(
    target: WeightSource, drafter: WeightSource, reference: Reference, tp_size: int, loop: str
) -> None:
    options = loop_options(loop, True)
    cases = tiny_cases(sampling=ASKING)
    rule = EverySecond()
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=options,
        num_pages=24,  # some sequences are computed again
        methods=TOYS,
        rules={**RULES, rule.name: lambda _: rule},
    ) as engine:
        names = [rule.name, "exact"] * 2 + [rule.name] * 4
        found = engine.generate(
            Request(case.id, case.prompt, case.sampling, ALL, AcceptanceOptions(name))
            for case, name in zip(cases, names, strict=True)
        )
    num_kept = 0
    for case, name in zip(cases, names, strict=True):
        check_text(reference, case, found[case.id])
        origins = origins_of(found[case.id])
        num_kept += origins.count(K)
        assert not (name == "exact" and K in origins)
        for event in found[case.id]:  # of a round: the drafted ones at even depths only
            assert K not in event.origins[::2]
    assert num_kept > 10
    assert sum(events[-1].stats.num_recomputed for events in found.values()) > 0
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rule_is_told_what_it_needs_and_nobody_else_pays(
    target: WeightSource, drafter: WeightSource, reference: Reference, tp_size: int
) -> None:
    """One request under the rule that asks for all, beside others; every tree it saw is computed again."""
    rule = Typical()
    every_second = EverySecond()
    rules = {**RULES, rule.name: lambda _: rule, EverySecond.name: lambda _: every_second}
    cases = tiny_cases((5, 17, 90, 30), replace(ASKING, max_tokens=16))
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=default_options(fixed_budget=True),
        methods=TOYS,
        rules=rules,
        taps=(1,),
    ) as engine:
        names = ["exact", EverySecond.name, rule.name, "exact"]
        found = engine.generate(
            Request(case.id, case.prompt, case.sampling, ALL, AcceptanceOptions(name))
            for case, name in zip(cases, names, strict=True)
        )
    for case in cases:
        check_text(reference, case, found[case.id])
    case, num_kept = cases[2], 0
    known = case.prompt
    for trees, scores, verdicts in rule.seen:
        assert len(trees.counts) == 1
        if trees.counts[0] == 0:  # in the middle of the prompt
            continue
        texts = [(*known[:-1], *path) for path in paths_of(trees)]
        exists = slice(len(texts))
        rows = reference.rows(texts, (1,))
        hidden = torch.stack([own[-1, 0] for own, _ in rows])
        torch.testing.assert_close(scores.hidden[1][0, exists], hidden, atol=TOLERANCE, rtol=TOLERANCE)
        laws = torch.stack([logits[-1] for _, logits in rows]).log_softmax(dim=1)
        entropies = -(laws.exp() * laws).sum(dim=1)
        np.testing.assert_allclose(scores.entropies[0, exists], entropies, atol=TOLERANCE)
        own = laws[trees.parents[0, exists], trees.tokens[0, exists]][1:]
        np.testing.assert_allclose(scores.child_logprobs[0, exists][1:], own, atol=TOLERANCE, rtol=TOLERANCE)
        tokens, _ = verdicts.emitted(trees)
        known = (*known, *tokens[0, : verdicts.num_accepted[0] + 1].tolist())
        num_kept += int(verdicts.is_kept.sum())
    assert list(known[len(case.prompt) :][:16]) == output_tokens(found[case.id])
    assert num_kept > 0


def paths_of(trees: DraftTrees) -> list[tuple[int, ...]]:
    """The tokens from the root down to each node of a single tree."""
    paths: list[tuple[int, ...]] = []
    for node in range(int(trees.counts[0])):
        token, parent = int(trees.tokens[0, node]), int(trees.parents[0, node])
        paths.append((token,) if node == 0 else (*paths[parent], token))
    return paths
