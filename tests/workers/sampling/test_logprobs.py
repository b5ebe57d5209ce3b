"""What rules ask about laws, over vocabulary shards; the numbers are torch's."""

import numpy as np
import pytest
import torch

from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.logprobs import LawQuestions
from outrider.workers.sampling.sampler import Sampler, Samples
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from support.thread_group import ThreadCommunicator, run_ranks

PLACES = pytest.mark.parametrize("kernels", [REFERENCES, KernelSelection.of(ENTRIES)], ids=["host", "device"])

BIASED = SamplingParams(temperature=0.3, top_k=2, logit_bias=((7, 3.0),), logprobs=True, top_logprobs=2)
GREEDY = SamplingParams(temperature=0.0)


def answers(
    cuts: list[int], logits: torch.Tensor, questions: LawQuestions, kernels: KernelSelection
) -> list[Samples]:
    """What each rank returns when the vocabulary is cut at `cuts`; the first row is biased, the others are greedy."""
    edges = [0, *cuts, logits.shape[1]]
    groups = [
        SampledRows(BIASED, np.array([3]), PenaltyState(())),
        SampledRows(GREEDY, np.arange(len(logits) - 1), PenaltyState(())),
    ]

    def work(communicator: ThreadCommunicator) -> Samples:
        shard = range(edges[communicator.rank], edges[communicator.rank + 1])
        sampler = Sampler(logits.shape[1], VocabularyRange(shard.start, shard.stop), communicator, kernels)
        return sampler.sample(logits[:, shard.start : shard.stop].contiguous(), groups, questions)

    return run_ranks(len(edges) - 1, work)


@PLACES
@pytest.mark.parametrize("cuts", [[], [40], [1, 90]])
def test_log_probabilities_of_any_tokens_and_entropies(cuts: list[int], kernels: KernelSelection) -> None:
    logits = 4 * torch.randn(4, 100, generator=torch.Generator().manual_seed(5))
    logits[1, 30:] = -torch.inf  # whole shards without a token
    logits[2] = 0.0  # the widest law there is
    law = torch.log_softmax(logits.double(), dim=1)
    questions = LawQuestions(
        rows=np.array([0, 0, 1, 1, 3]), tokens=np.array([7, 99, 2, 60, 0]), entropy_rows=np.array([1, 0, 2])
    )
    biased = (logits[0].double() + 3.0 * (torch.arange(100) == 7)) / 0.3
    first = biased.where(biased >= biased.topk(2).values[1], -torch.inf).log_softmax(dim=0)
    asked_for = torch.stack([first, *law[1:]])  # greedy requests: temperature 1
    entropies = -(asked_for.exp() * asked_for.clamp_min(-1e30)).sum(dim=1)
    for samples in answers(cuts, logits, questions, kernels):
        expected = law[questions.rows, questions.tokens].float()
        torch.testing.assert_close(samples.token_logprobs, expected, atol=1e-5, rtol=1e-5)
        expected = asked_for[questions.rows, questions.tokens].float()
        torch.testing.assert_close(samples.token_laws, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(samples.entropies, entropies[[1, 0, 2]].float(), atol=1e-5, rtol=1e-5)
        # What the request itself asked for stands beside it, of the same law.
        assert samples.logprobs[0] == pytest.approx(float(law[0, samples.tokens[0]]), abs=1e-5)
        assert samples.top_ids[0].tolist() == law[0].topk(2).indices.tolist()
        assert samples.logprobs[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("cuts", [[], [40]])
def test_what_the_request_pushes_down_or_removes_is_told(cuts: list[int]) -> None:
    logits = torch.zeros(1, 100)
    logits[0, :20] = torch.arange(20).flip(0)  # 0 is the likeliest
    params = SamplingParams(
        temperature=0.7, top_k=10, logit_bias=((0, 2.0), (1, -0.5)), repetition_penalty=1.01, seed=3
    )
    tokens = np.array([0, 1, 2, 3, 4, 60])
    questions = LawQuestions(np.zeros(6, dtype=np.int64), tokens, np.zeros(1, dtype=np.int64))
    # 2 is in the prompt, 3 on the way to the node.
    groups = [SampledRows(params, np.array([9]), PenaltyState((2, 50)), [(3,)])]
    edges = [0, *cuts, 100]

    def work(communicator: ThreadCommunicator) -> Samples:
        shard = VocabularyRange(edges[communicator.rank], edges[communicator.rank + 1])
        part = logits[:, shard.first : shard.end].contiguous()
        return Sampler(100, shard, communicator).sample(part, groups, questions)

    for samples in run_ranks(len(edges) - 1, work):
        assert samples.is_pushed_down.tolist() == [False, True, True, True, False, True]
        assert samples.token_laws.isinf().tolist() == [False] * 5 + [True]
        np.testing.assert_allclose(samples.token_logprobs, logits.log_softmax(dim=1)[0, tokens], atol=1e-5)


@PLACES
def test_a_row_that_is_no_law_answers_zeros_and_spoils_no_other(kernels: KernelSelection) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 20] = torch.nan
    questions = LawQuestions(np.array([1, 2]), np.array([5, 5]), np.array([0, 1, 2]))
    (samples,) = answers([], logits, questions, kernels)
    assert samples.valid.tolist() == [True, False, True]
    assert samples.token_logprobs.tolist() == [0.0, pytest.approx(-np.log(100), abs=1e-5)]
    # The bias of the first row, at its temperature, is 10 nats; all others tie with the second best, and are kept.
    first = torch.tensor([10.0] + [0.0] * 99).log_softmax(dim=0)
    assert samples.entropies.tolist() == pytest.approx(
        [-float(first.exp() @ first), 0.0, np.log(100)], abs=1e-5
    )
