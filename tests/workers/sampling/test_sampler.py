"""Sampling over vocabulary shards against one shard, and both against the law written out in full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from outrider.kernels.sample_shard import MAX_LOGIT
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler, Samples
from outrider.workers.sequences.params import MIN_REPETITION_PENALTY, MIN_TEMPERATURE, SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from support import sampling_reference as reference
from support.thread_group import ThreadCommunicator, run_ranks

# Where rows are sampled: on the host, or where a GPU left them; the operators' CPU implementations stand in for one.
PLACES = pytest.mark.parametrize("kernels", [REFERENCES, KernelSelection.of(ENTRIES)], ids=["host", "device"])
PROMPT, OUTPUT, PATH = [1, 2, 3, 3], [2, 5, 5], (5, 6)
POSITION = 9


def sample_over(
    cuts: list[int], logits: torch.Tensor, rows: list[SampledRows], kernels: KernelSelection = REFERENCES
) -> list[Samples]:
    """What each rank returns when the vocabulary is cut at `cuts`."""
    edges = [0, *cuts, logits.shape[1]]

    def work(communicator: ThreadCommunicator) -> Samples:
        shard = range(edges[communicator.rank], edges[communicator.rank + 1])
        own = logits[:, shard.start : shard.stop].contiguous()
        before = own.clone()
        samples = Sampler(
            logits.shape[1], VocabularyRange(shard.start, shard.stop), communicator, kernels
        ).sample(own, rows)
        assert torch.equal(own.nan_to_num(), before.nan_to_num())
        return samples

    return run_ranks(len(edges) - 1, work)


def sample_alone(
    logits: torch.Tensor, rows: list[SampledRows], kernels: KernelSelection = REFERENCES
) -> Samples:
    return Sampler(logits.shape[1], VocabularyRange(0, logits.shape[1]), SoloCommunicator(), kernels).sample(
        logits, rows
    )


def context(params: SamplingParams, position: int = POSITION) -> SampledRows:
    state = PenaltyState(PROMPT)
    for token in OUTPUT:
        state.add(token)
    return SampledRows(params, np.array([position]), state, [PATH])


@np.errstate(over="ignore")
def edited(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    return reference.edited_logits(logits.numpy(), params, PROMPT, [*OUTPUT, *PATH])


def assert_same(samples: Samples, expected: Samples) -> None:
    assert torch.equal(samples.tokens, expected.tokens)
    assert torch.equal(samples.valid, expected.valid)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-5, rtol=1e-6)
    assert torch.equal(samples.top_ids, expected.top_ids)
    torch.testing.assert_close(samples.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=1e-6)


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, MIN_TEMPERATURE, 0.8, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 1, 5, 40, 200]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 5e-324]),
    min_p=st.sampled_from([0.0, 5e-324, 0.001, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, MIN_REPETITION_PENALTY, 100.0]),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, 2.0]),
    logit_bias=st.sampled_from([(), ((0, 2.0), (5, -100.0), (8, 100.0))]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.just(True),
    top_logprobs=st.sampled_from([0, 1, 5]),
)
LAWS = [
    "normal",
    "peaked",
    "flat",
    "constant",
    "integers",
    "huge",
    "tiny",
    "mostly removed",
    "edge of float32",
]
NO_LAWS = ["nan", "infinite", "all removed", "too large", "too small"]
logits_kinds = st.sampled_from([*LAWS, *NO_LAWS])


def make_logits(kind: str, num_rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    if kind == "peaked":
        logits *= 6
    elif kind == "flat":
        logits *= 0.01
    elif kind == "constant":
        logits[:] = 0.25
    elif kind == "integers":
        logits = (2 * logits).round()
    elif kind == "huge":
        logits *= 1e30
    elif kind == "tiny":
        logits *= 1e-40
    elif kind == "mostly removed":
        logits[:, vocab_size // 5 :] = -torch.inf
    elif kind == "edge of float32":
        logits[:, 1::2] = torch.finfo(torch.float32).min
    elif kind == "nan":
        logits[:, seed % vocab_size] = torch.nan
    elif kind == "infinite":
        logits[:, seed % vocab_size] = torch.inf
    elif kind == "all removed":
        logits[:] = -torch.inf
    elif kind == "too large":
        logits[:, -1] = 1e38
    elif kind == "too small":
        logits[:] = -1e38
    return logits


@PLACES
@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(parameters, logits_kinds), min_size=1, max_size=4),
    vocab_size=st.sampled_from([10, 300, 1500]),
    cuts=st.lists(st.floats(0.01, 0.99), max_size=2),
    seed=st.integers(0, 10_000),
)
def test_sharded_equals_alone_equals_the_law_in_full(
    kernels: KernelSelection,
    rows: list[tuple[SamplingParams, str]],
    vocab_size: int,
    cuts: list[float],
    seed: int,
) -> None:
    """Whatever is allowed, over whatever logits; what is no law is invalid and changes nothing for the others."""
    logits = torch.cat([make_logits(kind, 1, vocab_size, seed + i) for i, (_, kind) in enumerate(rows)])
    for params, _ in rows:
        params.validate(max(vocab_size, 200))
    laws = [edited(logits[i], params) for i, (params, _) in enumerate(rows)]
    valid = [bool(abs(law.max()) <= MAX_LOGIT) for law in laws]
    assume(
        not any(
            params.truncates and is_law and reference.nucleus_is_a_matter_of_rounding(law, params)
            for law, is_law, (params, _) in zip(laws, valid, rows, strict=True)
        )
    )
    edges = sorted({min(max(1, int(cut * vocab_size)), vocab_size - 1) for cut in cuts})
    contexts = [context(params, POSITION + i) for i, (params, _) in enumerate(rows)]
    alone = sample_alone(logits, contexts)
    for samples in [sample_alone(logits, contexts, kernels), *sample_over(edges, logits, contexts, kernels)]:
        assert_same(samples, alone)
    assert alone.valid.tolist() == valid
    for i, (law, (params, kind)) in enumerate(zip(laws, rows, strict=True)):
        if not valid[i]:
            assert kind in NO_LAWS
            assert (alone.tokens[i], alone.logprobs[i]) == (0, 0.0)
            continue
        assert alone.tokens[i] == reference.scores(law, params, POSITION + i).argmax()
        log_probs = reference.raw_log_probs(logits[i].numpy())
        assert alone.logprobs[i].item() == pytest.approx(log_probs[alone.tokens[i]], abs=1e-5, rel=1e-6)
        best = np.lexsort((np.arange(vocab_size), -logits[i].numpy()))[: params.top_logprobs]
        assert alone.top_ids[i, : len(best)].tolist() == best.tolist()
        top_logprobs = alone.top_logprobs[i, : len(best)].numpy()
        np.testing.assert_allclose(top_logprobs, log_probs[best], atol=1e-5, rtol=1e-6)


@PLACES
@pytest.mark.parametrize("cuts", [[], [700], [100, 2900]])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.999),
        SamplingParams(top_p=0.97, min_p=1e-4),
        SamplingParams(min_p=0.01),
        SamplingParams(top_k=1500),
        SamplingParams(top_k=2999, top_p=0.99),
    ],
)
def test_wide_nuclei_need_several_exchanges(
    cuts: list[int], params: SamplingParams, kernels: KernelSelection
) -> None:
    logits = make_logits("flat", 6, 3000, seed=5)
    contexts = [context(replace(params, seed=i)) for i in range(6)]
    samples = sample_over(cuts, logits, contexts, kernels)
    for i in range(6):
        expected = reference.scores(edited(logits[i], params), contexts[i].params, POSITION).argmax()
        assert all(rank.tokens[i] == expected for rank in samples)


@PLACES
def test_top_k_larger_than_a_shard(kernels: KernelSelection) -> None:
    logits = make_logits("normal", 4, 400, seed=2)
    contexts = [context(SamplingParams(top_k=350, seed=i)) for i in range(4)]
    for samples in sample_over([3, 390], logits, contexts, kernels):
        assert torch.equal(samples.tokens, sample_alone(logits, contexts).tokens)


@PLACES
def test_ties_go_to_the_smaller_id_whoever_has_it(kernels: KernelSelection) -> None:
    logits = torch.zeros(2, 100)
    logits[:, [30, 60, 90]] = 1.0
    contexts = [context(SamplingParams(temperature=0.0))] * 2
    for cuts in ([], [50], [31, 60], [30]):
        for samples in sample_over(cuts, logits, contexts, kernels):
            assert samples.tokens.tolist() == [30, 30]


@PLACES
def test_a_shard_without_any_token_left(kernels: KernelSelection) -> None:
    logits = make_logits("normal", 1, 200, seed=0)
    logits[:, :100] = -torch.inf
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(logprobs=True)):
        rows = [context(params)]
        assert all(
            torch.equal(samples.tokens, sample_alone(logits, rows).tokens)
            for samples in sample_over([100], logits, rows, kernels)
        )


@PLACES
def test_a_token_does_not_depend_on_its_batch(kernels: KernelSelection) -> None:
    logits = make_logits("normal", 12, 1000, seed=1)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4),
        SamplingParams(seed=4, top_p=0.9),
        SamplingParams(seed=4, repetition_penalty=1.4, logprobs=True, top_logprobs=2),
    ]
    contexts = [context(kinds[i % 4], position=i) for i in range(12)]
    absent = [
        replace(rows, positions=rows.positions[:0], paths=()) for rows in contexts
    ]  # still reading prompts
    together = sample_alone(
        logits, [rows for pair in zip(absent, contexts, strict=True) for rows in pair], kernels
    ).tokens
    for i in range(12):
        assert sample_alone(logits[i : i + 1], [contexts[i]], kernels).tokens[0] == together[i]


def test_log_probabilities_only_for_rows_that_ask() -> None:
    logits = make_logits("normal", 3, 50, seed=1)
    asks = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=4)
    silent = SamplingParams(temperature=0.0)
    samples = sample_alone(logits, [context(silent), context(asks), context(silent)])
    assert samples.logprobs[[0, 2]].tolist() == [0.0, 0.0]
    assert samples.logprobs[1] == samples.top_logprobs[1, 0] < 0
    assert samples.top_ids.shape == samples.top_logprobs.shape == (3, 4)
    assert sample_alone(logits, [context(silent)] * 3).top_ids.shape == (3, 0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.5, top_k=12, repetition_penalty=1.3),
        SamplingParams(min_p=0.05, frequency_penalty=0.5, logit_bias=((4, 1.0),)),
    ],
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_follow_the_law(params: SamplingParams, vary: str) -> None:
    logits = make_logits("normal", 1, 40, seed=3)
    num = 4000
    if vary == "seed":
        rows = [context(replace(params, seed=seed)) for seed in range(num)]
    else:
        rows = [context(params, position) for position in range(num)]
    tokens = sample_alone(logits.expand(num, -1), rows).tokens
    law = np.exp(reference.processed_log_probs(edited(logits[0], params), params))
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert (counts[law == 0] == 0).all()
    common = law * num >= 5  # the chi-square approximation needs as many; the rest counts as one
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(law[common] * num, law[~common].sum() * num)
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


@PLACES
@settings(max_examples=60, deadline=None)
@given(
    params=parameters,
    kind=logits_kinds,
    vocab_size=st.sampled_from([10, 2000]),
    num=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_proposals_are_the_best_by_score_with_their_log_probabilities(
    kernels: KernelSelection, params: SamplingParams, kind: str, vocab_size: int, num: int, seed: int
) -> None:
    logits = make_logits(kind, 1, vocab_size, seed)
    law = edited(logits[0], params)
    valid = bool(abs(law.max()) <= MAX_LOGIT)
    assume(not (params.truncates and valid and reference.nucleus_is_a_matter_of_rounding(law, params)))
    sampler = Sampler(vocab_size, VocabularyRange(0, vocab_size), SoloCommunicator(), kernels)
    before = logits.clone()
    ids, log_probs = sampler.propose(logits, [context(params)], num)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert ids.shape == log_probs.shape == (1, num)
    assert len(set(ids[0].tolist())) == num
    if not valid:
        assert torch.isinf(log_probs).all()
        return
    assert ids[0, 0] == sampler.sample(logits, [context(params)]).tokens[0]
    scores = reference.scores(law, params, POSITION)
    best = np.lexsort((np.arange(vocab_size), -scores))[:num]
    left = int(np.isfinite(scores).sum())
    assert ids[0, :left].tolist() == best[:left].tolist()
    assert torch.isinf(log_probs[0, left:]).all()
    as_sampled = params if not params.is_greedy else SamplingParams()
    expected = reference.processed_log_probs(law, as_sampled)
    np.testing.assert_allclose(log_probs[0, :left].numpy(), expected[best[:left]], atol=2e-4, rtol=1e-5)


def test_proposals_share_the_noise_of_samples() -> None:
    # The drafter's law differs a little from the target's: the same noise makes them agree more often than
    # two independent draws would.
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 200, generator=generator).expand(300, -1) * 2
    draft = target + 0.3 * torch.randn(300, 200, generator=generator)
    rows = [context(SamplingParams(), position) for position in range(300)]
    shifted = [context(SamplingParams(), position + 1000) for position in range(300)]
    sampler = Sampler(200, VocabularyRange(0, 200), SoloCommunicator())
    tokens = sampler.sample(target, rows).tokens
    coupled = (sampler.propose(draft, rows, 1)[0][:, 0] == tokens).float().mean()
    independent = (sampler.propose(draft, shifted, 1)[0][:, 0] == tokens).float().mean()
    assert coupled > 0.6 > 0.3 > independent
