"""Sampling where a GPU left the logits: the same as on the host, with few numbers brought there.

The operators' CPU implementations stand in for the kernels.
"""

from typing import Any

import numpy as np
import pytest
import torch

from outrider.kernels.noise import noise_keys
from outrider.kernels.sample_shard import SUMS, WINNER, AskedRows, sample_shard
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.kernels.shard_ids import ShardIds
from outrider.kernels.shard_logits import ShardLogits
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling import device_shard
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.device_shard import DeviceShard
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from support.thread_group import ThreadCommunicator, run_ranks

VOCAB_SIZE = 20_001
KERNELS = KernelSelection.of(ENTRIES)
PLAIN = [SamplingParams(temperature=t, seed=3) for t in (0.0, 0.7, 1.0, 1.5)]
EDITED = [
    SamplingParams(seed=4, repetition_penalty=1.3, logit_bias=((5, 9.0), (9_000, 12.0))),
    SamplingParams(temperature=0.0, frequency_penalty=0.7, presence_penalty=0.2),
]
TRUNCATED = [
    SamplingParams(temperature=0.8, top_k=40, seed=5),
    SamplingParams(temperature=0.9, top_p=0.9, min_p=0.01, seed=6, repetition_penalty=1.1),
    SamplingParams(temperature=1.5, top_p=0.999, seed=7),  # of thousands of tokens
]
REPORTED = [
    SamplingParams(seed=8, logprobs=True),
    SamplingParams(top_p=0.8, seed=9, logprobs=True, top_logprobs=20, presence_penalty=1.0),
]
EVERYTHING = [*PLAIN, *EDITED, *TRUNCATED, *REPORTED]


def rows_of(params: list[SamplingParams]) -> list[SampledRows]:
    return [
        SampledRows(each, np.array([9 + i]), PenaltyState([1, 2, 2, 7]), [(7, 11)])
        for i, each in enumerate(params)
    ]


def logits_for(rows: list[SampledRows]) -> torch.Tensor:
    """As of a model in bfloat16: ties everywhere."""
    generator = torch.Generator().manual_seed(len(rows))
    return (torch.randn(len(rows), VOCAB_SIZE, generator=generator) * 3).bfloat16().float()


def whole_sampler(kernels: KernelSelection) -> Sampler:
    return Sampler(VOCAB_SIZE, VocabularyRange(0, VOCAB_SIZE), SoloCommunicator(), kernels)


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each tensor that is brought to the host."""
    sizes: list[int] = []
    to_host = torch.Tensor.cpu

    def recording(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return to_host(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", recording)
    return sizes


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("params", [PLAIN, EDITED, TRUNCATED, REPORTED, EVERYTHING])
def test_samples_are_those_of_the_host(params: list[SamplingParams], size: int) -> None:
    rows = rows_of(params)
    logits = logits_for(rows)
    expected = whole_sampler(REFERENCES).sample(logits, rows)
    edges = [VOCAB_SIZE * i // size for i in range(size + 1)]

    def work(communicator: ThreadCommunicator) -> None:
        shard = range(edges[communicator.rank], edges[communicator.rank + 1])
        own = logits[:, shard.start : shard.stop].contiguous()
        before = own.clone()
        samples = Sampler(VOCAB_SIZE, VocabularyRange(shard.start, shard.stop), communicator, KERNELS).sample(
            own, rows
        )
        assert torch.equal(own, before)
        assert torch.equal(samples.tokens, expected.tokens)
        assert torch.equal(samples.top_ids, expected.top_ids)
        torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(samples.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=0)

    run_ranks(size, work)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_proposals_are_those_of_the_host(num: int) -> None:
    rows = rows_of(EVERYTHING)
    logits = logits_for(rows)
    expected_ids, expected = whole_sampler(REFERENCES).propose(logits, rows, num)
    before = logits.clone()
    ids, log_probs = whole_sampler(KERNELS).propose(logits, rows, num)
    assert torch.equal(logits, before)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def test_no_row_is_brought_to_the_host(brought: list[int]) -> None:
    rows = rows_of(EVERYTHING)
    logits = logits_for(rows)
    whole_sampler(KERNELS).sample(logits, rows)
    whole_sampler(KERNELS).propose(logits, rows, 3)
    assert sum(brought) < VOCAB_SIZE / 4
    brought.clear()
    whole_sampler(REFERENCES).sample(logits, rows)
    assert max(brought) == len(rows) * VOCAB_SIZE


def test_rows_bring_one_record_each(brought: list[int]) -> None:
    rows = rows_of(PLAIN)
    whole_sampler(KERNELS).sample(logits_for(rows), rows)
    assert brought == [len(rows) * (SUMS.itemsize + WINNER.itemsize)]


def test_one_launch_samples_all_rows_of_a_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []

    def recording(logits: torch.Tensor, asked: AskedRows, *arguments: Any, **flags: Any) -> Any:
        assert flags["use_kernel"]
        sampled.append(len(asked.rows))
        return sample_shard(logits, asked, *arguments, **flags)

    monkeypatch.setattr(device_shard, "sample_shard", recording)
    rows = rows_of(EVERYTHING)
    whole_sampler(KERNELS).sample(logits_for(rows), rows)
    whole_sampler(KERNELS).propose(logits_for(rows), rows, 4)
    assert sampled == [len(rows), len(rows)]


@pytest.mark.parametrize("size", [1, 2])
def test_one_look_is_enough_for_most(size: int, brought: list[int]) -> None:
    """Of several rows, truncated, edited, reported and not; then no row is looked at."""
    params = [
        *PLAIN[:2],
        *EDITED,
        TRUNCATED[0],
        SamplingParams(temperature=0.6, top_p=0.8, min_p=0.05, seed=2),
        *REPORTED,
    ]
    rows = rows_of(params)
    logits = logits_for(rows) * 2
    edges = [VOCAB_SIZE * i // size for i in range(size + 1)]
    expected = whole_sampler(REFERENCES).sample(logits, rows)
    brought.clear()

    def work(communicator: ThreadCommunicator) -> None:
        shard = VocabularyRange(edges[communicator.rank], edges[communicator.rank + 1])
        sampler = Sampler(VOCAB_SIZE, shard, communicator, KERNELS)
        samples = sampler.sample(logits[:, shard.first : shard.end].contiguous(), rows)
        assert torch.equal(samples.tokens, expected.tokens)
        assert torch.equal(samples.top_ids, expected.top_ids)
        torch.testing.assert_close(samples.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=0)

    run_ranks(size, work)
    assert len(brought) == size


def test_tokens_run_out() -> None:
    """Three tokens are left of the vocabulary; the first removed ones follow, as on the host."""
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [7, 100, 250]] = torch.tensor([1.0, 3.0, 2.0])
    ids = ShardIds.from_first(50, 300)
    device, host = DeviceShard(logits, ids, KERNELS), ShardLogits(logits, ids)
    rows, temperatures = np.arange(2), np.array([0.0, 1.0], dtype=np.float32)
    keys = noise_keys(np.array([1, 3], dtype=np.uint64), np.array([2, 4]))
    np.testing.assert_array_equal(*(shard.best(rows, temperatures, keys, 6) for shard in (device, host)))
    np.testing.assert_array_equal(*(shard.top(rows, 6) for shard in (device, host)))
