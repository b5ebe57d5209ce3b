"""Deployments and requests drawn at random: whatever meets in a round, the text is that of transformers.

The other files of this kind try one thing after the other; here pages run out, prefixes are shared, requests end or
are cancelled, laws, methods, ranks and loops differ, all at the same time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer
from outrider.workers.rounds.budget import PassProfile
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, TokenEvent
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from support.confined import TINY_GRAMMARS
from support.equality import Case, Reference, assert_same_tokens
from support.local_engine import LocalEngine, MethodBuilder, default_options, output_tokens
from support.thread_group import thread_group
from support.tiny import FEW_TOKENS, SLOW_TARGET, poor_drafter, random_tokens
from support.tiny_heads import (
    building_eagle3,
    building_medusa,
    building_mtp,
    building_parallel,
    eagle3_drafter,
    mtp_drafter,
    parallel_drafter,
)

METHODS = ("ngram", "model", "medusa", "eagle3", "mtp", "parallel")
PROFILES = (None, SLOW_TARGET, PassProfile((1, 8, 64), (0.01, 0.011, 0.05)))
BLOCKS = (
    (BlockLayer(True),) * 2,
    (BlockLayer(False),) * 2,
    (BlockLayer(True, 12), BlockLayer(False, 9, True)),
)
LOGPROB_TOLERANCE = 2e-4


def heads(draw: random.Random, target: WeightSource) -> list[MethodBuilder]:
    """One of each kind, in any order."""
    num_pages = draw.choice((16, 64, 200))
    eagle3 = eagle3_drafter(target, (0, 1, 2), num_ids=draw.choice((0, 200)), rank=draw.choice((0, 20)))
    parallel = parallel_drafter(
        target,
        (0, 1, 2),
        layers=draw.choice(BLOCKS),
        first_slot=draw.choice((0, 1)),
        pair=draw.choice((NO_PAIR, PairShape("markov", target.config.hidden_size))),
        num_ids=draw.choice((0, 200)),
    )
    found = [
        building_medusa(target),
        building_eagle3(target, eagle3, num_pages),
        building_mtp(target, mtp_drafter(target, rank=draw.choice((0, 40))), num_pages),
        building_parallel(target, parallel, num_pages),
    ]
    draw.shuffle(found)
    return found


def sampling_of(draw: random.Random) -> SamplingParams:
    """Any law."""
    chosen: dict[str, Any] = {
        "temperature": draw.choice((0.0, 0.0, 0.3, 0.8, 1.5)),
        "max_tokens": draw.choice((1, 2, 7, 20, 40)),
        "seed": draw.randrange(2**40),
    }
    if chosen["temperature"] and draw.random() < 0.5:
        chosen["top_k"], chosen["top_p"] = draw.choice((0, 1, 5, 50, 1000)), draw.choice((1.0, 0.9, 0.3))
        chosen["min_p"] = draw.choice((0.0, 0.05, 0.5))
    if draw.random() < 0.25:
        chosen["repetition_penalty"] = draw.choice((0.8, 1.3))
        chosen["presence_penalty"] = draw.choice((0.0, -0.5, 1.0))
        chosen["frequency_penalty"] = draw.choice((0.0, 0.4))
    if draw.random() < 0.4:
        chosen["logit_bias"] = FEW_TOKENS
    if draw.random() < 0.3:
        chosen["stop_token_ids"] = tuple(draw.sample([token for token, _ in FEW_TOKENS], 2))
    if draw.random() < 0.2:
        chosen["min_tokens"] = min(chosen["max_tokens"], draw.choice((3, 9)))
    if draw.random() < 0.2:
        chosen["logprobs"], chosen["top_logprobs"] = True, draw.choice((0, 2, 5))
    return SamplingParams(**chosen)


def requests_of(draw: random.Random, most_nodes: int) -> list[Request]:
    """Some begin alike, some repeat themselves; each is drafted in its own way, or not at all."""
    shared = random_tokens(draw.randrange(50), draw.randint(1, 90))
    found = []
    for number in range(draw.randint(3, 14)):
        own = random_tokens(draw.randrange(1000), draw.randint(1, 90))
        if draw.random() < 0.4:
            own = (own[:6] * 20)[: len(own)]
        beginning = shared[: draw.randint(0, len(shared))] if draw.random() < 0.6 else []
        methods = tuple(draw.sample(METHODS, draw.randint(0, len(METHODS))))
        draft = DraftOptions(methods, draw.randint(1, most_nodes) if methods else 0, draw.randint(1, 8))
        found.append(Request(str(number), (*beginning, *own), sampling_of(draw), draft))
    return found


def check(
    reference: Reference, request: Request, events: Sequence[TokenEvent], ties: list[Mismatch], what: str
) -> None:
    """Text, why it ended, and log-probabilities of one place."""
    sampling, tokens, reason = request.sampling, output_tokens(list(events)), events[-1].finish_reason
    case = Case(request.id, request.prompt_tokens, replace(sampling, logprobs=False, top_logprobs=0))
    expected = reference.text(case)
    if reason == "cancelled":
        assert_same_tokens(reference, case, expected[: len(tokens)], tokens, ties, what)
        return
    num_ties = len(ties)
    assert_same_tokens(reference, case, expected, tokens, ties, what)
    if len(ties) == num_ties:
        assert reason == ("stop" if tokens[-1] in sampling.stop_token_ids else "length"), what
    if sampling.logprobs:
        logprobs = [entry for event in events for entry in event.logprobs]
        assert len(logprobs) == len(tokens)
        place = request.sampling.seed % len(tokens)
        law = reference.logits((*request.prompt_tokens, *tokens[:place])).log_softmax(-1)
        said = [(tokens[place], logprobs[place].logprob), *logprobs[place].top]
        assert all(abs(logprob - law[token].item()) < LOGPROB_TOLERANCE for token, logprob in said), what


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("seed", range(24))
def test_whatever_meets_gives_the_text_of_transformers(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], seed: int
) -> None:
    draw = random.Random(seed)
    page_size, most_nodes = draw.choice((4, 8, 16)), draw.choice((4, 12, 32))
    max_round_tokens = draw.choice((32, 64, 128, 256))
    requests = requests_of(draw, most_nodes)
    longest = max(len(request.prompt_tokens) + request.sampling.max_tokens for request in requests)
    num_pages = max(draw.choice((640, 1280, 3200)) // page_size, (longest + most_nodes) // page_size + 8)
    options = default_options(
        overlapped=draw.random() < 0.7,
        num_lanes=draw.choice((1, 2, 2, 3)),
        draft_ahead=draw.random() < 0.5,
        fixed_budget=draw.random() < 0.5,
        merge_lanes=draw.random() < 0.3,
        draft_costs=draw.random() < 0.2,
        max_round_tokens=max_round_tokens,
    )
    with LocalEngine(
        target,
        draw.choice((drafter, open_source(poor_drafter()))),
        communicators=thread_group(draw.choice((1, 1, 2, 3))),
        options=options,
        num_pages=num_pages,
        page_size=page_size,
        max_sequences=draw.randint(1, 9),
        max_round_tokens=max_round_tokens,
        prefill_chunk=draw.choice((8, 16, 64)),
        prefix_sharing=draw.random() < 0.7,
        max_children=draw.randint(1, 5),
        profile=draw.choice(PROFILES),
        max_nodes=most_nodes,
        methods=heads(draw, target),
        grammars=TINY_GRAMMARS,
        plans_early=draw.random() < 0.4,
    ) as engine:
        left = {request.id: draw.randint(1, 4) for request in requests if draw.random() < 0.15}

        def cancelling(event: TokenEvent) -> None:
            if event.request_id in left:
                left[event.request_id] -= 1
                if not left[event.request_id]:
                    engine.loop.cancel(event.request_id)

        first = draw.randint(1, len(requests))
        events = engine.generate(requests[:first], cancelling)
        events |= engine.generate(requests[first:], cancelling)
        for request in requests:
            check(reference, request, events[request.id], ties, f"seed {seed}, {request.draft}")
    assert engine.pool.num_available == engine.pool.num_pages
