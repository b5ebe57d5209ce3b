"""Rows that only need their token, sampled by the kernel's operator (here by its CPU implementation)."""

import pytest
import torch

from outrider.workers.communicator import SoloCommunicator
from outrider.workers.sampling.context import PenaltyState, RowContext
from outrider.workers.sampling.params import SamplingParams
from outrider.workers.sampling.sampler import Sampler
from support.threaded_communicator import ThreadedCommunicator, run_ranks

VOCAB_SIZE = 501


def rows_of(*params: SamplingParams) -> list[RowContext]:
    return [RowContext(each, 9 + i, PenaltyState([1, 2]), ()) for i, each in enumerate(params)]


PLAIN = rows_of(*(SamplingParams(temperature=t, seed=3) for t in (0.0, 0.7, 1.0, 1.5)))


@pytest.mark.parametrize("size", [1, 3])
def test_tokens_are_those_of_the_reference(size: int) -> None:
    logits = torch.randn(len(PLAIN), VOCAB_SIZE) * 3
    expected = Sampler(VOCAB_SIZE, range(VOCAB_SIZE), SoloCommunicator()).sample(logits, PLAIN)
    edges = [VOCAB_SIZE * i // size for i in range(size + 1)]

    def work(communicator: ThreadedCommunicator) -> list[int]:
        shard = range(edges[communicator.rank], edges[communicator.rank + 1])
        sampler = Sampler(VOCAB_SIZE, shard, communicator, use_kernel=True)
        samples = sampler.sample(logits[:, shard.start : shard.stop].contiguous(), PLAIN)
        assert samples.top_ids.shape == samples.top_logprobs.shape == (len(PLAIN), 0)
        return samples.tokens.tolist()

    assert run_ranks(size, work) == [expected.tokens.tolist()] * size


def test_a_batch_in_which_a_row_needs_more_takes_the_reference() -> None:
    rows = PLAIN + rows_of(SamplingParams(temperature=1.0, top_k=5, seed=1), SamplingParams(logprobs=True))
    logits = torch.randn(len(rows), VOCAB_SIZE) * 3
    samplers = [
        Sampler(VOCAB_SIZE, range(VOCAB_SIZE), SoloCommunicator(), use_kernel) for use_kernel in (False, True)
    ]
    expected, samples = (sampler.sample(logits, rows) for sampler in samplers)
    assert torch.equal(samples.tokens, expected.tokens)
    assert torch.equal(samples.logprobs, expected.logprobs)
