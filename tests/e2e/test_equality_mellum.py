"""A mixture of experts with windows gives transformers' text: short of the window and past it, however it runs."""

from dataclasses import replace

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, TokenEvent
from outrider.workers.weights.resolver import ResolvedModel, open_source
from support.equality import PLAIN, Reference, assert_same_texts, decode, num_accepted
from support.local_engine import LocalEngine
from support.models import random_model
from support.thread_group import thread_group
from support.tiny import GREEDY, METHODS, SLOW_TARGET, VOCAB_SIZE, loop_options, random_tokens, tiny_cases
from support.tiny_heads import building_mtp, mtp_drafter

_SHAPE = f"hidden_size=80&num_heads=5&num_kv_heads=1&head_dim=16&vocab_size={VOCAB_SIZE}&window=5"
# Every other layer sees all, with stretched positions; or none does.
MODELS = {
    "mixed": f"{_SHAPE}&num_layers=4&full_every=2&yarn_factor=4&num_experts=3&experts_per_token=2",
    "all windowed": f"{_SHAPE}&num_layers=2&full_every=0&num_experts=4&experts_per_token=2",
}
PAGE_SIZE = 7
MTP = DraftOptions(("mtp",), 8, 6)


def model(kind: str, perturb: float = 0.0) -> ResolvedModel:
    return random_model(f"{MODELS[kind]}&perturb={perturb}", "mellum")


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def their_text(kind: str) -> Reference:
    return Reference(model(kind))


@pytest.mark.parametrize(("tp_size", "loop"), [(1, "2 lanes, ahead"), (2, "serial, 1 lane"), (3, "2 lanes")])
def test_every_way_to_run_gives_the_text_of_transformers(
    kind: str, their_text: Reference, ties: list[Mismatch], tp_size: int, loop: str
) -> None:
    cases = tiny_cases((3, 17, 40, 130))
    with LocalEngine(
        open_source(model(kind)),
        open_source(model(kind, perturb=0.15)),
        communicators=thread_group(tp_size),
        options=loop_options(loop, fixed_budget=True),
        profile=SLOW_TARGET,
        page_size=PAGE_SIZE,
        prefill_chunk=33,
        methods=(
            building_mtp(open_source(model(kind)), mtp_drafter(open_source(model(kind))), 64, PAGE_SIZE),
        ),
    ) as engine:
        for method, draft in {"plain": PLAIN, **METHODS, "mtp": MTP}.items():
            texts = decode(engine, cases, draft)
            assert_same_texts(their_text, cases, texts, ties, f"{kind}, {method}, tp {tp_size}, {loop}")
            assert draft == PLAIN or num_accepted(texts) > 0
    assert engine.pool.num_available == engine.pool.num_pages


WARM = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, max_tokens=24)


@pytest.mark.parametrize("prefix_sharing", [False, True])
@pytest.mark.parametrize(
    "sampling", [replace(GREEDY, max_tokens=24), WARM], ids=["greedy", "sampled with penalties"]
)
def test_shared_prefixes_and_sequences_computed_again_change_no_token(
    kind: str, their_text: Reference, ties: list[Mismatch], prefix_sharing: bool, sampling: SamplingParams
) -> None:
    system = tuple(random_tokens(100, 3 * PAGE_SIZE + 2))
    cases = [
        replace(case, prompt=system + case.prompt) for case in tiny_cases((5, 17, 40, 3, 64, 30), sampling)
    ]
    with LocalEngine(
        open_source(model(kind)),
        open_source(model(kind, perturb=0.15)),
        options=loop_options("2 lanes", fixed_budget=True),
        page_size=PAGE_SIZE,
        prefix_sharing=prefix_sharing,
        num_pages=22,
        prefill_chunk=33,
    ) as engine:
        first = decode(engine, cases[:1], METHODS["both"])
        texts = first | decode(engine, cases[1:], METHODS["both"])
    assert_same_texts(their_text, cases, texts, ties, f"{kind}, 22 pages, prefix_sharing={prefix_sharing}")
    assert sum(text.stats.num_recomputed for text in texts.values()) > 0 or kind == "all windowed"
    cached = [text.stats.num_cached_prompt_tokens for text in texts.values()]
    assert any(cached) == prefix_sharing
    assert engine.pool.num_available == engine.pool.num_pages


def test_pages_behind_the_window_of_all_layers_serve_others(ties: list[Mismatch]) -> None:
    """A long text holds few pages at a time; where layers are mixed it keeps them all."""
    (case,) = tiny_cases((9,), replace(GREEDY, max_tokens=60))
    fewest: dict[str, int] = {}
    for kind in MODELS:
        with LocalEngine(
            open_source(model(kind)), page_size=PAGE_SIZE, prefix_sharing=False, num_pages=64
        ) as engine:
            pool, available = engine.pool, [64]

            def count(event: TokenEvent, pool: PagePool = pool, available: list[int] = available) -> None:
                available.append(pool.num_available + (64 if event.finish_reason else 0))

            texts = decode(engine, [case], METHODS["ngram"], count)
        assert_same_texts(Reference(model(kind)), [case], texts, ties, f"{kind}, long")
        fewest[kind] = min(available)
        assert pool.num_available == pool.num_pages
    assert fewest["mixed"] <= 64 - (9 + 60 - 8) // PAGE_SIZE
    assert fewest["all windowed"] >= 64 - 5
