"""A text under a grammar is, however it is drafted, the one that transformers samples under the same masks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.link.messages import Draft
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.source import WeightSource
from support.confined import END_THINK, ENDS, THINK, TINY_GRAMMARS, TINY_VOCABULARY, confined, forbidden
from support.equality import PLAIN, Case, Reference, assert_same_texts, decode, num_accepted
from support.local_engine import LocalEngine
from support.thread_group import thread_group
from support.tiny import BOTH, MODEL, NGRAM, SLOW_TARGET, loop_options, random_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=28)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=28)
TOP_K = SamplingParams(temperature=1.1, top_k=20, repetition_penalty=1.2, max_tokens=28)

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
SCHEMA = {"json": PERSON, "disable_any_whitespace": True}
LETTERS = {"regex": "([a-f]{3} ){3,5}"}
LIST = {"grammar": 'start: "(" item ("," item)* ")"\nitem: "x" | start | /[0-9]{1,3}/'}
CHOICE = {"choice": ["etaoin", "etaxyz", "shrdlu"]}


def cases() -> list[Case]:
    """Prompts of several lengths; the seed of a case is its number."""
    samplings = [
        confined(GREEDY, SCHEMA),
        confined(SAMPLED, SCHEMA),
        confined(TOP_K, LETTERS),
        replace(confined(SAMPLED, LIST), min_tokens=20),
        replace(confined(GREEDY, CHOICE), min_tokens=20),  # a complete answer ends before
        confined(replace(SAMPLED, logit_bias=((END_THINK, 8.0),)), LETTERS, "open"),
        confined(replace(SAMPLED, logit_bias=((THINK, 4.0), (END_THINK, 6.0))), SCHEMA, "tags"),
        replace(SAMPLED, min_tokens=12, stop_token_ids=(*ENDS, 7, 9, 301), logit_bias=((301, 9.0),)),
    ]
    return [
        Case(f"confined {n}", tuple(random_tokens(n, 5 + 9 * n)), replace(sampling, seed=n))
        for n, sampling in enumerate(samplings)
    ]


def watch(engine: LocalEngine) -> list[int]:
    """Checks all drafted tokens that are sent, against matchers of their own; how many were is counted."""
    send, counted = engine.loop._link.send, []

    def checked(draft: Draft) -> None:
        running = {sequence.slot: sequence for sequence in engine.loop.scheduler.running}
        end = 0
        for slot, num_nodes, first in zip(
            draft.steps.slots.tolist(),
            draft.steps.num_nodes.tolist(),
            draft.steps.first_sampled.tolist(),
            strict=True,
        ):
            begin, end = end, end + num_nodes
            sequence = running[slot]
            sampling, output = (
                sequence.request.sampling,
                sequence.tokens[len(sequence.request.prompt_tokens) :],
            )
            paths: dict[int, list[int]] = {first: []}
            for node in range(first + 1, num_nodes if sampling.is_confined else 0):
                parent = paths[int(draft.steps.parents[begin + node])]
                token = int(draft.steps.tokens[begin + node])
                assert not forbidden(sampling, [*output, *parent], TINY_VOCABULARY)[token], (parent, token)
                paths[node] = [*parent, token]
                counted.append(node)
        send(draft)

    engine.loop._link.send = checked
    return counted


@pytest.mark.parametrize(
    ("tp_size", "loop", "num_pages"),
    [(1, "serial, 1 lane", 512), (2, "2 lanes, ahead", 512), (1, "2 lanes, ahead", 34)],
)
def test_confined_texts_are_those_of_transformers_however_they_are_drafted(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    tp_size: int,
    loop: str,
    num_pages: int,
) -> None:
    """With so few pages some texts are computed again."""
    asked = cases()
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(tp_size),
        options=loop_options(loop, fixed_budget=False),
        profile=SLOW_TARGET,
        grammars=TINY_GRAMMARS,
        num_pages=num_pages,
        page_size=4 if num_pages < 100 else 16,
    ) as engine:
        num_sent, num_recomputed = watch(engine), 0
        for draft in (PLAIN, NGRAM, MODEL, BOTH):
            texts = decode(engine, asked, draft)
            assert_same_texts(reference, asked, texts, ties, f"grammars, {draft}, tp {tp_size}, {loop}")
            num_recomputed += sum(text.stats.num_recomputed for text in texts.values())
            if draft in (MODEL, BOTH):
                assert num_accepted(texts) > 20
        assert num_sent
        assert (num_recomputed > 0) == (num_pages < 100)
    assert engine.pool.num_available == engine.pool.num_pages


def test_what_ends_by_itself_matches(target: WeightSource, drafter: WeightSource) -> None:
    speak = partial(tokenizer_of_size(TINY_VOCABULARY).decode, skip_special_tokens=True)

    def said(asked: object, seeds: Sequence[int]) -> list[str]:
        longer = replace(SAMPLED, max_tokens=400)
        each = [Case(str(n), (5, 6, 7 + n), replace(confined(longer, asked), seed=n)) for n in seeds]
        with LocalEngine(target, drafter, grammars=TINY_GRAMMARS) as engine:
            texts = decode(engine, each, BOTH)
        assert {text.finish_reason for text in texts.values()} == {"stop"}
        return [speak(text.tokens) for text in texts.values()]

    for text in said(SCHEMA, range(4)):
        assert json.loads(text)["name"] in ("ada", "bob")
    assert set(said(CHOICE, range(4))) <= set(CHOICE["choice"])
