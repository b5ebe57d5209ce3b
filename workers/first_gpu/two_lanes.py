"""Rounds of two lanes on one rank, one after the other: the next one planned while the device computes, and not."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from statistics import median

from outrider.workers.first_gpu.report import Row, milliseconds
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.trees import PAGE_SIZE, chain
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.messages import Draft, Scores, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.transformer import Transformer
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.target_rank import TargetRank, serve_rounds
from outrider.workers.trace import Tracer

NUM_LANES = 2
STOP = Draft(0, (), (), Steps.of([]), stop=True)


def two_lanes(setting: Setting, model: Transformer, cache: PagedCache) -> list[Row]:
    """Wall clock of a round from one answer to the next, drafts always there: what a GPU waits for its host, less
    what planning early hides. A lane has one sequence, with the tree and the context of `Sizes.one`."""
    num_rows, _, context = setting.sizes.one
    # One rank of several has nobody here to agree with: it samples from its own share, as if that were all.
    share = len(model.plan.vocab)
    sampler = Sampler(share, VocabularyRange(0, share), SoloCommunicator(), model.kernels)
    tracer = Tracer("target 0", False)
    rank = TargetRank(model, cache, NUM_LANES, model.config.max_context, tracer, sampler=sampler)
    num_rounds = NUM_LANES * (setting.sizes.replays + 1)
    pages_each = -(-(context + (2 + setting.sizes.replays) * 2 + num_rows) // PAGE_SIZE)
    for slot in range(NUM_LANES):
        sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=slot)
        pages = tuple(range(slot * pages_each, (slot + 1) * pages_each))
        tokens = tuple(range(3, 3 + context))
        prompt = SequenceStep(slot, (), pages, tokens, tuple(chain(context)), context - 1)
        rank.step(Draft(slot, (SequenceStart(slot, context, 0, sampling),), (), Steps.of([prompt])))
    rows: list[Row] = []
    for name, is_early in (("one after the other", False), ("planned early", True)):
        # Of each tree the root is kept, and of the prompt the first time its last row too: they are there already.
        drafts = _rounds(num_rounds, num_rows, kept=range(context) if not rows else (0,))
        answers: list[float] = []

        def receive(drafts: Iterator[Draft] = drafts) -> Draft:
            return next(drafts, STOP)

        def answer(scores: Scores, answers: list[float] = answers) -> None:
            answers.append(time.perf_counter())

        serve_rounds(rank, receive, receive if is_early else None, answer)
        seconds = [later - earlier for earlier, later in itertools.pairwise(answers)]
        what = f"a round, two lanes {name}: {num_rows} rows, context {context}"
        rows.append(milliseconds(what, median(seconds)))
    return rows


def _rounds(count: int, num_rows: int, kept: range | tuple[int, ...]) -> Iterator[Draft]:
    """Trees of the lanes in turn; of the tree before, its root is kept, of what was before the first one `kept`."""
    tokens, parents = tuple(range(5, 5 + num_rows)), tuple(chain(num_rows))
    for number in range(count):
        path = kept if number < NUM_LANES else (0,)
        step = SequenceStep(number % NUM_LANES, path, (), tokens, parents, 0)
        yield Draft(NUM_LANES + number, (), (), Steps.of([step]))
