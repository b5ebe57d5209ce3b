"""Whose time it is: on a GPU that works later than it is told to, each stretch gets its own."""

from __future__ import annotations

import time

import pytest
import torch

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.target_rank import TargetRank
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource
from support.pretend_gpu import pretend_gpu
from support.stand_in_cuda import StandInCuda


def test_the_target_books_a_forward_under_forward_though_only_sampling_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = StandInCuda()
    cuda.install(monkeypatch)
    source = RandomSource("random:llama?hidden_size=32&num_heads=4&vocab_size=96")
    plan, solo = ShardPlan(source.config, 0, 1), SoloCommunicator()
    tracer = Tracer("target 0", enabled=True)
    with pretend_gpu() as device:
        model = Transformer(load_weights(plan, source, torch.float32, device, packed=False), solo)
        cache = PagedCache(source.config, plan, 8, 4, torch.float32, device)
        rank = TargetRank(model, cache, 1, source.config.max_context, tracer)
        forward, sample = rank._forward.run, rank._sampler.sample_prepared

        def slow_forward() -> Hidden:
            cuda.advance(8.0)  # of the GPU's time; the host goes on at once
            return forward()

        def slow_sample(*arguments: object) -> object:
            cuda.advance(2.0)
            return sample(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(rank._forward, "run", slow_forward)
        monkeypatch.setattr(rank._sampler, "sample_prepared", slow_sample)
        step = SequenceStep(0, (), (0,), (5, 6), (0, 0), 1)
        scores = rank.step(Draft(1, (SequenceStart(0, 2, 0, SamplingParams()),), (), Steps.of([step])))
    assert (scores.commit_s, scores.forward_s, scores.sample_s) == pytest.approx((0.0, 8e-3, 2e-3))
    assert {kind: s for kind, s in tracer.totals().items() if s} == pytest.approx(
        {"forward": 8e-3, "sample": 2e-3}
    )
    spans = [(event["name"], event["dur"], event["args"]) for event in tracer.events()[1:]]
    assert spans[1:] == [("forward", 8000.0, {"rows": 2}), ("sample", 2000.0, {"rows": 1})]


def test_what_brings_no_result_to_the_host_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandInCuda()
    cuda.install(monkeypatch)
    stretches = Stretches(torch.device("cuda"), Tracer("draft", False))
    for milliseconds in (3.0, 5.0):  # events are used again
        stretches.begin()
        cuda.advance(milliseconds)
        stretches.end("forward", 7)
        assert cuda.num_waits == (milliseconds == 5.0)
        assert stretches.settle() == pytest.approx([milliseconds / 1e3])
    assert (cuda.num_waits, cuda.num_events) == (2, 2)


def test_on_a_cpu_the_clock_of_the_host_counts_and_outer_spans_are_charged_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    tracer = Tracer("draft", False)
    stretches = Stretches(torch.device("cpu"), tracer)
    with tracer.span("draft"):
        stretches.begin()
        now[0] += 5_000
        stretches.end("forward")
        now[0] += 2_000
        stretches.end("sample")
        now[0] += 1_000
        assert stretches.settle() == pytest.approx([5e-6, 2e-6])
    assert {kind: s for kind, s in tracer.totals().items() if s} == pytest.approx(
        {"forward": 5e-6, "sample": 2e-6, "draft": 1e-6}
    )
