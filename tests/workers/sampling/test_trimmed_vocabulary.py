"""Logits of some tokens: the law is that of the whole vocabulary with every other token removed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange, VocabularyTable
from support.transformers_law import transformers_law

VOCAB_SIZE = 500
PROMPT = [3, 7, 7, 450, 12]
TABLE = [*range(3, 400, 4), 450, 498]  # 3, 7 and 450 of the prompt, 12 not
PLACES = pytest.mark.parametrize("kernels", [REFERENCES, KernelSelection.of(ENTRIES)])


def sampler_of(table: list[int], kernels: KernelSelection = REFERENCES) -> Sampler:
    return Sampler(len(table), VocabularyTable(table, torch.device("cpu")), SoloCommunicator(), kernels)


def whole_sampler(size: int, kernels: KernelSelection = REFERENCES) -> Sampler:
    return Sampler(size, VocabularyRange(0, size), SoloCommunicator(), kernels)


def row_of(params: SamplingParams, position: int = 5) -> SampledRows:
    return SampledRows(params, np.array([position]), PenaltyState(PROMPT), [()])


def removed_outside(logits: torch.Tensor, table: list[int]) -> torch.Tensor:
    removed = torch.full_like(logits, -torch.inf)
    removed[:, table] = logits[:, table]
    return removed


@PLACES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": VOCAB_SIZE},  # more than there are
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {
            "logit_bias": ((7, 5.0), (100, 90.0), (8, -3.0), (499, 100.0))
        },  # all but 7 are not in the vocabulary
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.7},
    ],
)
def test_law_is_that_of_transformers_with_all_others_removed(
    fields: dict[str, Any], kernels: KernelSelection
) -> None:
    params = SamplingParams(**fields)
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3
    expected = transformers_law(params, PROMPT, removed_outside(logits, TABLE))
    ids, log_probs = sampler_of(TABLE, kernels).propose(
        logits[:, TABLE].contiguous(), [row_of(params)], len(TABLE)
    )
    assert sorted(ids[0].tolist()) == TABLE
    ours = torch.full((VOCAB_SIZE,), -torch.inf)
    ours[ids[0]] = log_probs[0]
    assert torch.equal(torch.isinf(ours), torch.isinf(expected))
    kept = torch.isfinite(expected)
    torch.testing.assert_close(ours[kept], expected[kept], atol=2e-5, rtol=0)


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([(), ((0, 2.0), (5, -100.0), (8, 4.0))]),
    seed=st.integers(0, 2**64 - 1),
)


@PLACES
@settings(max_examples=60, deadline=None)
@given(
    params=parameters,
    size=st.sampled_from([40, 1500, 20_000]),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    num=st.integers(1, 4),
    scale=st.sampled_from([0.01, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_proposals_are_those_of_the_whole_vocabulary_with_all_others_removed(
    kernels: KernelSelection,
    params: SamplingParams,
    size: int,
    share: float,
    num: int,
    scale: float,
    seed: int,
) -> None:
    """Also where the noise belongs to ids far apart, and where fewer than `num` are left."""
    generator = np.random.default_rng(seed)
    table = sorted(generator.choice(size, max(num, int(share * size)), replace=False).tolist())
    logits = torch.from_numpy(generator.standard_normal((1, size)).astype(np.float32)) * scale
    rows = [row_of(params)]
    trimmed, whole = sampler_of(table, kernels), whole_sampler(size, kernels)
    own = logits[:, table].contiguous()
    ids, log_probs = trimmed.propose(own, rows, num)
    expected_ids, expected = whole.propose(removed_outside(logits, table), rows, num)
    assert torch.equal(own, logits[:, table])
    possible = torch.isfinite(expected)
    assert torch.equal(ids[possible], expected_ids[possible])
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
    assert set(ids[0].tolist()) <= set(table)
    assert len(set(ids[0].tolist())) == num
    assert trimmed.sample(own, rows).tokens[0] == ids[0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_whole_vocabularys_choice_is_kept_wherever_the_table_has_it(temperature: float) -> None:
    """Nothing is truncated: the noise of a token is the same in both."""
    num = 300
    logits = torch.randn(num, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    rows = [SampledRows(SamplingParams(temperature=temperature, seed=2), np.arange(num), PenaltyState(()))]
    chosen = whole_sampler(VOCAB_SIZE).sample(logits, rows).tokens
    tokens = sampler_of(TABLE).sample(logits[:, TABLE].contiguous(), rows).tokens
    inside = torch.isin(chosen, torch.tensor(TABLE))
    assert 20 < int(inside.sum()) < num
    assert torch.equal(tokens[inside], chosen[inside])
    assert torch.isin(tokens, torch.tensor(TABLE)).all()


@PLACES
def test_log_probabilities_are_those_of_the_tokens_that_there_are(kernels: KernelSelection) -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 3
    params = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3)
    samples = sampler_of(TABLE, kernels).sample(logits[:, TABLE].contiguous(), [row_of(params)])
    law = torch.log_softmax(removed_outside(logits, TABLE)[0], 0)
    best = law.topk(3)
    assert samples.top_ids[0].tolist() == best.indices.tolist()
    torch.testing.assert_close(samples.top_logprobs[0], best.values)
    torch.testing.assert_close(samples.logprobs[0], best.values[0])
