"""The law against transformers' own logits processors, and penalties against the OpenAI formula by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from outrider.kernels.shard_ids import ShardIds
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling.context import PenaltyState, RowParameters, SampledRows
from outrider.workers.sampling.law import edit_rows, nuclei
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from support.sampling_reference import edited_logits
from support.transformers_law import transformers_law

VOCAB_SIZE = 500
PROMPT = [3, 7, 7, 450, 12]


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def our_law(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, which `propose` lists when asked for all of it."""
    sampler = Sampler(VOCAB_SIZE, VocabularyRange(0, VOCAB_SIZE), SoloCommunicator())
    row = SampledRows(params, np.array([5]), PenaltyState(PROMPT))
    ids, log_probs = sampler.propose(logits, [row], VOCAB_SIZE)
    law = torch.empty(VOCAB_SIZE)
    law[ids[0]] = log_probs[0]
    return law


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": VOCAB_SIZE},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"logit_bias": ((7, 5.0), (100, -30.0), (499, 2.5))},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
        {"top_k": 30, "top_p": 0.5},
        {
            "temperature": 0.8,
            "top_k": 100,
            "top_p": 0.95,
            "repetition_penalty": 1.2,
            "logit_bias": ((3, 4.0), (9, 9.0)),
        },
    ],
)
def test_law_is_that_of_transformers(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for seed in range(8):
        logits = random_logits(seed)
        expected = transformers_law(params, PROMPT, logits)
        ours = our_law(params, logits)
        assert torch.equal(torch.isinf(ours), torch.isinf(expected))
        kept = torch.isfinite(expected)
        # float32 sums over 500 terms of different order
        torch.testing.assert_close(ours[kept], expected[kept], atol=2e-5, rtol=0)


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [5, 9, 200, 300]] = 1.0
    logits[0, 77] = 2.0
    params = SamplingParams(top_k=3)
    expected = transformers_law(params, PROMPT, logits)
    ours = our_law(params, logits)
    assert torch.isfinite(ours).nonzero().flatten().tolist() == [5, 9, 77, 200, 300]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_greedy_ignores_truncation() -> None:
    sampler = Sampler(VOCAB_SIZE, VocabularyRange(0, VOCAB_SIZE), SoloCommunicator())
    logits = random_logits(0)
    row = SampledRows(
        SamplingParams(temperature=0.0, top_p=0.1, top_k=3), np.array([0]), PenaltyState(PROMPT)
    )
    assert sampler.sample(logits, [row]).tokens.item() == logits.argmax().item()


def test_presence_and_frequency_by_hand() -> None:
    # Token 7 is in the prompt only, 20 twice in the output, 21 once in the output and once on the path.
    state = PenaltyState([7])
    for token in (20, 20, 21):
        state.add(token)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = torch.ones(VOCAB_SIZE)
    edit_rows(
        row[None],
        [SampledRows(params, np.array([9]), state, [(21, 22)])],
        ShardIds.from_first(0, row.numel()),
    )
    expected = torch.ones(VOCAB_SIZE)
    expected[20] = 1 - 0.5 - 2 * 0.25
    expected[21] = 1 - 0.5 - 2 * 0.25
    expected[22] = 1 - 0.5 - 0.25
    assert torch.equal(row, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {
            "repetition_penalty": 1.1,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "logit_bias": ((4, 3.0), (5, -3.0), (6, 1.0)),
        },
        {"logit_bias": ((0, 1.0), (499, -1.0))},
    ],
)
@pytest.mark.parametrize("shard", [range(500), range(5), range(5, 470), range(470, 500)])
def test_edits_of_a_shard_and_their_undoing(fields: dict[str, Any], shard: range) -> None:
    params = SamplingParams(**fields)
    generator = np.random.default_rng(0)
    prompt, output, path = (generator.integers(0, 30, 12).tolist() for _ in range(3))
    state = PenaltyState(prompt)
    for token in output:
        state.add(token)
    logits = random_logits(3)[0]
    row = logits[shard.start : shard.stop].clone()
    edits = edit_rows(
        row[None],
        [SampledRows(params, np.array([24]), state, [path])],
        ShardIds.from_first(shard.start, len(shard)),
    )
    expected = edited_logits(logits.numpy(), params, prompt, output + path)[shard.start : shard.stop]
    assert row.numpy().tolist() == expected.tolist()
    edits.undo(row[None])
    assert torch.equal(row, logits[shard.start : shard.stop])


def counted(state: PenaltyState, path: Sequence[int]) -> dict[int, int]:
    ids, counts, seen = state.along([path])
    assert seen.all()
    return dict(zip(ids.tolist(), counts[0].tolist(), strict=True))


def test_penalty_state_grows_as_if_built_at_once() -> None:
    generator = np.random.default_rng(1)
    prompt, output = generator.integers(0, 300, 80).tolist(), generator.integers(0, 900, 600).tolist()
    state = PenaltyState(prompt)
    for token in output:
        state.add(token)
    expected = {token: [*output, 5, 5, 1000].count(token) for token in {*prompt, *output, 5, 1000}}
    assert counted(state, (5, 5, 1000)) == expected


def test_a_path_does_not_change_the_sequence() -> None:
    state = PenaltyState([1, 2])
    assert counted(state, (1, 3, 3)) == {1: 1, 2: 0, 3: 2}
    assert counted(state, ()) == {1: 0, 2: 0}


def test_paths_of_several_rows_are_counted_apart() -> None:
    state = PenaltyState([1, 2])
    ids, counts, seen = state.along([(), (3,), (1, 3, 4)])
    assert ids.tolist() == [1, 2, 3, 4]
    assert counts.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]
    assert seen.tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]


def num_kept(logits: np.ndarray, params: SamplingParams, total: float = 0.0) -> int:
    batch = RowParameters([SampledRows(params, np.array([0]), PenaltyState(()))])
    no_floor, totals = np.array([-np.inf], dtype=np.float32), np.array([total])
    found, certain = nuclei(logits[None], no_floor, totals, batch, np.array([0]))
    assert certain.all()
    return int(np.count_nonzero(logits > found.lowest) + found.num_lowest[0])


def test_number_kept_by_hand() -> None:
    # Probabilities 0.4, 0.3, 0.2, 0.1
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    total = float(np.exp(logits - logits[0]).sum())
    assert num_kept(logits, SamplingParams(top_p=0.5), total) == 2
    assert num_kept(logits, SamplingParams(top_p=0.39), total) == 1
    assert num_kept(logits, SamplingParams(top_p=0.71), total) == 3
    assert num_kept(logits, SamplingParams(min_p=0.6), total) == 2
    assert num_kept(logits, SamplingParams(top_k=3), total) == 3
    # After top-k = 2 the masses are 4/7 and 3/7.
    assert num_kept(logits, SamplingParams(top_k=2, top_p=0.56), total) == 1
    assert num_kept(logits, SamplingParams(top_k=2, top_p=0.58), total) == 2


def test_ties_at_the_kth_token_stay() -> None:
    logits = np.array([3, 2, 2, 2, 1], dtype=np.float32)
    kept = [num_kept(logits, SamplingParams(top_k=k)) for k in (0, 1, 2, 3, 4, 5, 9)]
    assert kept == [5, 1, 4, 4, 4, 5, 5]
