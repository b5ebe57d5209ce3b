"""Prometheus metrics: vLLM's names where the meaning is the same, ours (`outrider_`) where it is not.

vLLM's names and buckets: https://docs.vllm.ai/en/latest/design/metrics.html
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from outrider.cluster.api import Piece
from outrider.workers.sequences.sequence import RequestStats

_TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
_BETWEEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_WHOLE_S = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

Stats = Mapping[str, Mapping[str, Any]]
"""`Engine.stats()`."""


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that ran.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in shared pages.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in shared pages.")
        self._drafts = self._counter(
            "vllm:spec_decode_num_drafts", "Rounds of a sequence with drafted tokens."
        )
        self._drafted = self._counter(
            "vllm:spec_decode_num_draft_tokens", "Drafted tokens, all nodes of trees."
        )
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self._kept = self._counter(
            "outrider_kept_tokens", "Accepted tokens that are not the target's own choice."
        )
        self._rounds = self._counter("outrider_rounds", "Rounds of a sequence that gave tokens.")
        self._preemptions = self._counter(
            "vllm:num_preemptions", "Times a sequence lost its pages to others."
        )
        self._per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafted tokens by their depth in the tree, from 0.",
            ("model_name", "position"),
            registry=self._registry,
        )
        self._ended = Counter(
            "vllm:request_success",
            "Answers that ended, by why; those that failed or were left included.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._refused = Counter(
            "outrider_refused_requests",
            "Requests that were answered with an error, by HTTP status.",
            ("model_name", "status"),
            registry=self._registry,
        )
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "To the first token.", _TTFT_S)
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between pieces of text.", _BETWEEN_S
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "To the end of an answer.", _WHOLE_S
        )
        self._num_prompt = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of an answer.", _TOKENS
        )
        self._num_generated = self._histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS
        )

    def render(self, stats: Stats) -> bytes:
        """In Prometheus' text format. `stats`: of the engine now, empty where it is gone."""
        self._engine.stats = stats
        return generate_latest(self._registry)

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._model_name, str(status)).inc()

    def observe_first(self, waited_s: float) -> None:
        """The first token of an answer came."""
        self._ttft.observe(waited_s)

    def observe_next(self, waited_s: float, num_tokens: int) -> None:
        """Tokens came, `waited_s` after those before them (0 for the first)."""
        self._generation_tokens.inc(num_tokens)
        if waited_s:
            self._between.observe(waited_s)

    def observe_end(self, reason: str, last: Piece, num_tokens: int, took_s: float) -> None:
        """An answer ended: with its reason, or `abort` where the client left or it failed."""
        self._ended.labels(self._model_name, reason).inc()
        if not last.num_prompt_tokens:
            return  # it was never admitted
        self._whole.observe(took_s)
        self._num_prompt.observe(last.num_prompt_tokens)
        self._num_generated.observe(num_tokens)
        self._prompt_tokens.inc(last.num_prompt_tokens)
        self._queries.inc(last.num_prompt_tokens)
        self._add(last.stats)

    def _add(self, stats: RequestStats) -> None:
        self._hits.inc(stats.num_cached_prompt_tokens)
        self._rounds.inc(stats.num_rounds)
        self._drafts.inc(stats.depth_drafted[0] if stats.depth_drafted else 0)
        self._drafted.inc(stats.num_drafted)
        self._accepted.inc(stats.num_accepted)
        self._kept.inc(stats.num_kept)
        self._preemptions.inc(stats.num_recomputed)
        for position, number in enumerate(stats.depth_accepted):
            self._per_position.labels(self._model_name, str(position)).inc(number)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)


class AnswerTimes:
    """Times and counts of the choices of one request, from its arrival; `close` must be called."""

    def __init__(self, metrics: ServerMetrics, num_choices: int) -> None:
        self._metrics = metrics
        self._arrival_s = time.monotonic()
        self._before_s = [0.0] * num_choices  # when the last tokens came; 0: none came
        self._num_tokens = [0] * num_choices
        self._last = dict.fromkeys(range(num_choices), Piece())

    def add(self, index: int, piece: Piece) -> None:
        """The next piece of a choice has come."""
        self._last[index] = piece
        if piece.tokens:
            now_s, before_s = time.monotonic(), self._before_s[index]
            if not before_s:
                self._metrics.observe_first(now_s - self._arrival_s)
            self._metrics.observe_next(now_s - before_s if before_s else 0.0, len(piece.tokens))
            self._before_s[index] = now_s
            self._num_tokens[index] += len(piece.tokens)
        if piece.finish_reason:
            self._end(index, piece.finish_reason)

    def close(self) -> None:
        """Choices without an end do not get one."""
        for index in list(self._last):
            self._end(index, "abort")

    def _end(self, index: int, reason: str) -> None:
        took_s = time.monotonic() - self._arrival_s
        self._metrics.observe_end(reason, self._last.pop(index), self._num_tokens[index], took_s)


class _EngineCollector(Collector):
    """What the engine's processes say of themselves when they are asked."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.stats: Stats = {}

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("outrider_up", "Whether the engine answers.", float(bool(self.stats)))
        if not self.stats:
            return
        own, draft = self.stats["coordinator"], self.stats.get("draft", {})
        restarts = CounterMetricFamily(
            "outrider_restarts", "Times that lost workers were started again.", labels=("model_name",)
        )
        restarts.add_metric((self._model_name,), own["num_restarts"])
        yield restarts
        num_running = draft.get("num_running", 0)
        yield self._gauge("vllm:num_requests_running", "Sequences with a slot.", num_running)
        waiting = max(own["num_open_requests"] - num_running, 0)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", waiting)
        restarting = float(not draft)
        yield self._gauge("outrider_restarting", "Whether lost workers are being started again.", restarting)
        if not draft:
            return
        num_pages, num_free = draft["num_pages"], draft["num_available_pages"]
        yield self._gauge("outrider_pages", "KV pages that there are.", num_pages)
        yield self._gauge("outrider_available_pages", "KV pages that a sequence can have.", num_free)
        used = 1 - num_free / num_pages
        yield self._gauge("vllm:kv_cache_usage_perc", "Used fraction of the KV pages; 1 is all.", used)
        busy = CounterMetricFamily(
            "outrider_busy_seconds",
            "Seconds of a process by kind of work; rate() is the share.",
            labels=("model_name", "worker", "kind"),
        )
        memory = GaugeMetricFamily(
            "outrider_peak_memory_bytes", "Peak memory of a process.", labels=("model_name", "worker")
        )
        for worker, said in self.stats.items():
            for kind, seconds in said.get("busy_s", {}).items():
                busy.add_metric((self._model_name, worker, kind), seconds)
            if "peak_memory_bytes" in said:
                memory.add_metric((self._model_name, worker), said["peak_memory_bytes"])
        yield busy
        yield memory

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nothing is asked before the first scrape

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
