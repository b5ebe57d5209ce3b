"""A tiny draft model and the engine around it, played by hand; every row is compared with a fresh forward."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.model import ModelMethod
from outrider.workers.drafting.ngram import NgramMethod
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.model.batch import ForwardBatch
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.cuda_graphs import Forward, Staged
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.sampling.context import SampledRows
from outrider.workers.sampling.sampler import Prepared, Sampler
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import GrowingTrees
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource
from support.drafted import GREEDY, answer, children_of, cut_of, sequence_of
from support.rows import SequenceRows, batch_of, chain

VOCAB = 96
# One row in a batch of several and the same row alone are summed in another order. Measured: 4e-6 at most.
TOLERANCE = 5e-5


@lru_cache
def draft_model() -> Transformer:
    return model_on(SoloCommunicator())


def model_on(communicator: Communicator) -> Transformer:
    """The part of one rank."""
    torch.set_num_threads(1)
    spec = f"random:llama?hidden_size=32&intermediate_size=48&num_heads=4&num_kv_heads=2&vocab_size={VOCAB}"
    source = RandomSource(spec)
    plan = ShardPlan(source.config, communicator.rank, communicator.size, "draft")
    weights = load_weights(plan, source, torch.float32, torch.device("cpu"), packed=False)
    return Transformer(weights, communicator)


def cache_of(num_pages: int, page_size: int, model: Transformer | None = None) -> PagedCache:
    model = model or draft_model()
    return PagedCache(model.config, model.plan, num_pages, page_size, torch.float32, torch.device("cpu"))


def fresh_logits(texts: SequenceABC[SequenceABC[int]]) -> torch.Tensor:
    """Logits after the last token of each text, computed from nothing: [num_texts, VOCAB]."""
    model, page_size = draft_model(), 16
    rows, first = [], 0
    for text in texts:
        num_pages = -(-len(text) // page_size)
        rows.append(SequenceRows(range(first, first + num_pages), 0, chain(len(text)), 0, list(text)))
        first += num_pages
    hidden = model.forward(batch_of(rows, page_size, model.device), cache_of(first, page_size)).last
    last = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    return model.logits(hidden[last])


def small_method(slots: DraftedSlots, model: Transformer, cache: PagedCache) -> ModelMethod:
    """Method `model` over a cache, two children below each of at most two nodes of a sequence in a step."""
    vocab_size = model.config.vocab_size
    vocabulary = VocabularyRange(0, vocab_size)
    return ModelMethod(
        slots=slots,
        estimator=AcceptanceEstimator(),
        model=model,
        cache=cache,
        pool=PagePool(cache.num_pages, cache.page_size, True),
        sampler=Sampler(vocab_size, vocabulary, SoloCommunicator(), model.kernels),
        num_target_tokens=vocab_size,
        max_children=2,
        rows_per_sequence=2,
        max_rows=4,
        prefill_chunk=8,
        tracer=Tracer("draft", False),
    )


class RecordingSampler(Sampler):
    """Keeps the logits from which children were proposed."""

    def __init__(self) -> None:
        super().__init__(VOCAB, VocabularyRange(0, VOCAB), SoloCommunicator())
        self.proposed: list[tuple[torch.Tensor, SampledRows]] = []

    def propose_prepared(
        self, logits: torch.Tensor, prepared: Prepared, num: int, there: SequenceABC[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alone = [
            replace(group, positions=group.positions[i : i + 1], paths=group.paths[i : i + 1])
            for group in prepared.groups
            for i in range(len(group.positions))
        ]
        self.proposed += zip(logits.clone(), alone, strict=True)
        return super().propose_prepared(logits, prepared, num, there)


class InOneBuffer(Forward):
    """A forward whose result is overwritten by the next call, as graphs do it."""

    def __init__(self, forward: Forward) -> None:
        self.num_calls = 0
        self._forward = forward
        self._buffer = torch.empty(0)

    def stage(self, batch: ForwardBatch, others: SequenceABC[torch.Tensor] = ()) -> Staged:
        return self._forward.stage(batch, others)

    def send(self, staged: Staged) -> list[torch.Tensor]:
        return self._forward.send(staged)

    @torch.inference_mode()
    def run(self) -> Hidden:
        self.num_calls += 1
        self._buffer.fill_(torch.nan)
        hidden = self._forward.run()
        self._buffer = hidden.last
        return hidden


class Drafting:
    """A draft model and the engine around it, played by hand. A sequence's slot is the seed of its noise."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        num_target_tokens: int = VOCAB,
        rows_per_sequence: int = 4,
        max_rows: int = 8,
        max_children: int = 3,
        model: Transformer | None = None,
    ) -> None:
        """model: of rank 0, where others follow; else there is one rank."""
        model = model or draft_model()
        self.engine = DraftEngine(DraftedSlots(4, 8, 16))
        self.trees: GrowingTrees = self.engine.trees
        self.pool = PagePool(num_pages, page_size, prefix_sharing=True)
        self.sampler = RecordingSampler()
        self.model = ModelMethod(
            slots=self.engine.slots,
            estimator=self.engine.estimator,
            model=model,
            cache=cache_of(num_pages, page_size, model),
            pool=self.pool,
            sampler=self.sampler,
            num_target_tokens=num_target_tokens,
            max_children=max_children,
            rows_per_sequence=rows_per_sequence,
            max_rows=max_rows,
            prefill_chunk=24,
            tracer=Tracer("draft", False),
        )
        self.forward = self.model._rank.run = InOneBuffer(self.model._rank.run)
        ngram = NgramMethod(self.engine.slots, self.engine.estimator, NgramConfig(min_match=1))
        for method in (ngram, self.model):
            self.engine.add(method)
        self.running: list[int] = []
        self.num_rows_checked = 0

    def start(
        self,
        prompt: SequenceABC[int],
        sampling: SamplingParams = GREEDY,
        methods: tuple[str, ...] = ("model",),
        max_depth: int = 4,
    ) -> Sequence:
        if not sampling.uses_context:  # too little to matter, but now each row says its path
            sampling = replace(sampling, frequency_penalty=1e-9)
        slot = next(slot for slot in range(4) if slot not in self.running)
        sequence = sequence_of(prompt, slot, methods, 8, max_depth, replace(sampling, seed=slot))
        self.running.append(slot)
        self.engine.start(sequence)
        return sequence

    def finish(self, slot: int) -> None:
        self.engine.finish(self.engine.slots.sequence(slot))
        self.running.remove(slot)

    def step(self, *slots: int) -> bool:
        """A step, of which all rows are compared with a fresh forward over their paths."""
        self.sampler.proposed.clear()
        progress = self.engine.expand(self.model, np.array(slots or self.running, dtype=np.int64))
        assert progress == bool(self.sampler.proposed)
        if progress:
            rows = [row for _, row in self.sampler.proposed]
            texts = [[*self.engine.slots.sequence(row.params.seed).tokens, *row.paths[0]] for row in rows]
            assert [row.positions.tolist() for row in rows] == [[len(text)] for text in texts]
            logits = torch.stack([logits for logits, _ in self.sampler.proposed])
            torch.testing.assert_close(logits, fresh_logits(texts), atol=TOLERANCE, rtol=0.0)
            self.num_rows_checked += len(rows)
        return progress

    def verdict(self, slot: int, chosen: list[int], said: dict[int, int]) -> list[int]:
        """Send the nodes `chosen`; the target says `said` by node, and token 0 after the others."""
        return answer(self.engine, [slot], cut_of(self.trees, {slot: chosen}), [said])[0]

    def children(self, slot: int, node: int = 0) -> list[int]:
        return children_of(self.trees, slot, node)

    def survival(self, slot: int, chosen: list[int]) -> float:
        return self.engine.survival(self.model, np.array([slot]), cut_of(self.trees, {slot: chosen}))
