"""What rules ask about the model's own law, over vocabulary shards; the numbers are torch's."""

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
    entropies = -(law.exp() * law.clamp_min(-1e30)).sum(dim=1)
    for samples in answers(cuts, logits, questions, kernels):
        expected = law[questions.rows, questions.tokens].float()
        torch.testing.assert_close(samples.token_logprobs, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(samples.entropies, entropies[[1, 0, 2]].float(), atol=1e-5, rtol=1e-5)
        # What the request itself asked for stands beside it, of the same law.
        assert samples.logprobs[0] == pytest.approx(float(law[0, samples.tokens[0]]), abs=1e-5)
        assert samples.top_ids[0].tolist() == law[0].topk(2).indices.tolist()
        assert samples.logprobs[1:].tolist() == [0.0, 0.0, 0.0]


@PLACES
def test_a_row_that_is_no_law_answers_zeros_and_spoils_no_other(kernels: KernelSelection) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 20] = torch.nan
    questions = LawQuestions(np.array([1, 2]), np.array([5, 5]), np.array([0, 1, 2]))
    (samples,) = answers([], logits, questions, kernels)
    assert samples.valid.tolist() == [True, False, True]
    assert samples.token_logprobs.tolist() == [0.0, pytest.approx(-np.log(100), abs=1e-5)]
    assert samples.entropies.tolist() == pytest.approx([np.log(100), 0.0, np.log(100)], abs=1e-5)
