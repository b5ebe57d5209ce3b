"""A draft model of several ranks: the text is plain decoding's, whoever shares, lacks or is cancelled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.draft_heads.checkpoint import read_lm_head, write_lm_head
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.trim import trimmed
from outrider.workers.model.draft_heads import served_head
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import TokenEvent
from outrider.workers.training.head_source import head_of_model
from outrider.workers.weights.source import WeightSource
from support.equality import PLAIN, Reference, assert_same_texts, assert_same_tokens, decode, num_accepted
from support.local_engine import LocalEngine
from support.thread_group import thread_group
from support.tiny import (
    BOTH,
    GREEDY,
    MODEL,
    VOCAB_SIZE,
    loop_options,
    random_tokens,
    tiny_cases,
    tiny_drafter,
)

WARM = SamplingParams(
    temperature=0.8, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2, max_tokens=24
)


@pytest.mark.parametrize(
    ("draft_ranks", "target_ranks", "loop"),
    [(2, 1, "2 lanes, ahead"), (3, 2, "1 lane, ahead"), (2, 3, "serial, 2 lanes")],
)
def test_a_drafter_of_several_ranks_gives_the_text_of_transformers(
    target: WeightSource,
    drafter: WeightSource,
    reference: Reference,
    ties: list[Mismatch],
    draft_ranks: int,
    target_ranks: int,
    loop: str,
) -> None:
    """Prompts that begin alike, too few pages for all of them at once, one that is cancelled."""
    system = tuple(random_tokens(100, 38))
    what, all_stats = f"{draft_ranks} draft ranks, {loop}", []
    with LocalEngine(
        target,
        drafter,
        communicators=thread_group(target_ranks),
        draft_communicators=thread_group(draft_ranks),
        options=loop_options(loop, fixed_budget=True),
        num_pages=22,
    ) as engine:
        for draft, sampling in ((MODEL, replace(GREEDY, max_tokens=32)), (BOTH, WARM)):
            cases = tiny_cases((5, 17, 40, 130, 3, 64, 99, 200), sampling)
            cases += [
                replace(case, id=f"with a system {case.id}", prompt=system + case.prompt)
                for case in cases[:5]
            ]

            def cancel(event: TokenEvent, cancelled: str = cases[2].id) -> None:
                if event.request_id == cancelled and not event.finish_reason:
                    engine.loop.cancel(cancelled)

            texts = decode(engine, cases, draft, cancel)
            assert num_accepted(texts) > 0
            assert texts[cases[2].id].finish_reason == "cancelled"
            said = texts.pop(cases[2].id).tokens
            others = [case for case in cases if case is not cases[2]]
            assert_same_texts(reference, others, texts, ties, what)
            expected = reference.text(cases[2])[: len(said)]
            assert_same_tokens(reference, cases[2], expected, said, ties, what)
            all_stats += [text.stats for text in texts.values()]
        assert sum(stats.num_recomputed for stats in all_stats) > 0
        assert sum(stats.num_cached_prompt_tokens for stats in all_stats) > 0
        few = tiny_cases((5, 17))
        assert_same_texts(reference, few, decode(engine, few, PLAIN), ties, what)
    assert engine.pool.num_available == engine.pool.num_pages


def test_a_head_in_place_of_the_models_is_on_the_first_rank(
    target: WeightSource, drafter: WeightSource, reference: Reference, ties: list[Mismatch], tmp_path: Path
) -> None:
    """And drafts what it would beside one rank."""
    head = trimmed(head_of_model(tiny_drafter()), torch.arange(0, VOCAB_SIZE, 2))
    write_lm_head(tmp_path, head, HeadDescription(target_vocab_size=VOCAB_SIZE), torch.float32)
    served = served_head(read_lm_head(tmp_path)[0], VOCAB_SIZE, packed=True)
    cases, accepted = tiny_cases((5, 17, 40, 130), WARM), []
    for num_ranks in (1, 2):
        with LocalEngine(
            target,
            drafter,
            draft_head=served,
            draft_communicators=thread_group(num_ranks),
            options=loop_options("serial, 1 lane", fixed_budget=True),
        ) as engine:
            texts = decode(engine, cases, MODEL)
        assert_same_texts(reference, cases, texts, ties, f"half a head, {num_ranks} draft ranks")
        accepted.append(num_accepted(texts))
    assert accepted[0] == accepted[1] > 0
