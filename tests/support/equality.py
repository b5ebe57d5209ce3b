"""Token for token the same text, or a numerical tie that is shown.

The judge of every comparison is transformers' float32 model of the same checkpoint: its greedy `generate`, the
same with its own logits processors and the shared noise at T > 0, and, where two texts part, the scores of
both candidates after the common prefix. Two candidates closer than the tolerance may swap, because a matrix
product rounds differently for one row and for eight; anything wider fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from outrider.cluster.bench.identity import TOLERANCE_OF_DTYPE, Mismatch
from outrider.cluster.bench.metrics import first_difference
from outrider.kernels.noise import gumbel
from outrider.kernels.shard_ids import ShardIds
from outrider.workers.answer import Completion
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.law import edit_rows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, RequestStats, TokenEvent
from outrider.workers.weights.reference import load_transformers
from outrider.workers.weights.resolver import ResolvedModel
from support.confined import forbidden
from support.local_engine import LocalEngine, output_tokens

TOLERANCE = TOLERANCE_OF_DTYPE["float32"]
PLAIN = DraftOptions((), 0, 0)
_ROWS_BATCH = 16  # texts
_MAX_PADDING = 32  # tokens that one prompt of a batch may be shorter than another


@dataclass(frozen=True)
class Case:
    """One text to decode."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Text:
    """What came out."""

    tokens: tuple[int, ...]
    finish_reason: str
    stats: RequestStats


def decode(
    engine: LocalEngine,
    cases: Sequence[Case],
    draft: DraftOptions | Sequence[DraftOptions],
    on_event: Callable[[TokenEvent], None] | None = None,
) -> dict[str, Text]:
    """All cases at once; `draft` is one for all, or one for each."""
    drafts = [draft] * len(cases) if isinstance(draft, DraftOptions) else draft
    asked = [Request(c.id, c.prompt, c.sampling, d) for c, d in zip(cases, drafts, strict=True)]
    return {
        request_id: Text(tuple(output_tokens(events)), events[-1].finish_reason, events[-1].stats)
        for request_id, events in engine.generate(asked, on_event).items()
    }


def decode_singly(engine: LocalEngine, cases: Sequence[Case], draft: DraftOptions) -> dict[str, Text]:
    """One case after the other."""
    return {case.id: decode(engine, [case], draft)[case.id] for case in cases}


def num_accepted(texts: dict[str, Text]) -> int:
    """Draft tokens that made it into these texts."""
    return sum(text.stats.num_accepted for text in texts.values())


class Reference:
    """transformers' float32 model of a checkpoint. Texts are remembered: several tests ask for the same.

    On one thread (see conftest.py): two of a busy machine's processors would spend their time waiting.
    """

    def __init__(self, model: ResolvedModel | PreTrainedModel) -> None:
        """`model`: a checkpoint, or what transformers makes of it without us."""
        self._model = load_transformers(model, torch.float32) if isinstance(model, ResolvedModel) else model
        self._texts: dict[Case, tuple[int, ...]] = {}

    def text(self, case: Case) -> tuple[int, ...]:
        """What `generate` gives; at T > 0 through transformers' processors, the noise added last."""
        if case not in self._texts:
            (self._texts[case],) = self._generate([case])
        return self._texts[case]

    def prepare(self, cases: Sequence[Case], batch_size: int) -> None:
        """Decode greedy cases of one kind in batches of like length, which is several times faster."""
        left = sorted((case for case in cases if case not in self._texts), key=lambda c: len(c.prompt))
        while left:
            longest = len(left[-1].prompt)
            batch = [case for case in left[-batch_size:] if len(case.prompt) > longest - _MAX_PADDING]
            del left[-len(batch) :]
            assert len({replace(case.sampling, seed=0) for case in batch}) == 1
            self._texts.update(zip(batch, self._generate(batch), strict=True))

    @torch.inference_mode()
    def logits(self, context: Sequence[int]) -> torch.Tensor:
        """float32 [vocab_size] after `context`, computed in one pass."""
        logits: torch.Tensor = self._model(torch.tensor([context]), logits_to_keep=1).logits
        return logits[0, -1]

    @torch.inference_mode()
    def rows(
        self, texts: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every text the hidden rows [n, len(layers), hidden] that enter these layers, and the logits [n, vocab]
        after each of its tokens. The number of layers stands for what leaves the last one, before the final norm.
        """
        last: list[torch.Tensor] = []
        hook = self._model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for begin in range(0, len(order), _ROWS_BATCH):
            batch = order[begin : begin + _ROWS_BATCH]
            longest = len(texts[batch[-1]])
            # Padding on the right: nothing looks at what comes later.
            tokens = torch.tensor([[*texts[i], *[0] * (longest - len(texts[i]))] for i in batch])
            out = self._model(tokens, output_hidden_states=True)
            inputs = [*out.hidden_states[:-1], last.pop()]
            hidden = torch.stack([inputs[layer] for layer in layers], dim=2)
            for row, i in enumerate(batch):
                found[i] = hidden[row, : len(texts[i])], out.logits[row, : len(texts[i])]
        hook.remove()
        return [found[i] for i in range(len(texts))]

    @torch.inference_mode()
    def _generate(self, cases: Sequence[Case]) -> list[tuple[int, ...]]:
        """Of cases with the same sampling; more than one only where it is greedy and without penalties."""
        sampling, processors = cases[0].sampling, _processors(cases[0])
        assert len(cases) == 1 or not processors
        # Set on the model: generate() fills what an argument leaves out from there.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=0,
        )
        length = max(len(case.prompt) for case in cases)
        prompts = torch.tensor([[0] * (length - len(case.prompt)) + list(case.prompt) for case in cases])
        mask = torch.tensor([[i >= length - len(case.prompt) for i in range(length)] for case in cases])
        whole = self._model.generate(
            prompts, attention_mask=mask.long(), logits_processor=LogitsProcessorList(processors)
        )
        return [_until_stop(row, sampling.stop_token_ids) for row in whole[:, length:].tolist()]


def assert_same_tokens(
    reference: Reference,
    case: Case,
    expected: Sequence[int],
    actual: Sequence[int],
    ties: list[Mismatch],
    what: str,
) -> None:
    """Fail unless the texts are equal or part at a tie, which is added to `ties`.

    What follows a tie is not compared: the texts have different contexts. A text that just ends early is
    never a tie.
    """
    if tuple(expected) == tuple(actual):
        return
    index = first_difference(tuple(expected), tuple(actual))
    where = f"{what}, {case.id}, seed {case.sampling.seed}, output token {index}"
    assert index < min(len(expected), len(actual)), f"{where}: one text ends: {expected} / {actual}"
    candidates = expected[index], actual[index]
    logits = reference.logits((*case.prompt, *expected[:index]))
    gaps = score_gaps(logits, case, expected[:index], candidates)
    assert max(gaps) <= TOLERANCE, (
        f"{where}: expected {candidates[0]} ({gaps[0]:.3g} below the best), got {candidates[1]} "
        f"({gaps[1]:.3g} below the best)"
    )
    ties.append(Mismatch(f"{what}, {case.id}", case.sampling.seed, index, *candidates, *gaps, is_tie=True))


def assert_same_texts(
    reference: Reference,
    cases: Sequence[Case],
    texts: Mapping[str, Text | Completion],
    ties: list[Mismatch],
    what: str,
) -> None:
    """`assert_same_tokens` of every case with what `reference` says."""
    for case in cases:
        assert_same_tokens(reference, case, reference.text(case), texts[case.id].tokens, ties, what)


def score_gaps(
    logits: torch.Tensor, case: Case, output: Sequence[int], candidates: Sequence[int]
) -> list[float]:
    """How far each candidate's perturbed score is below that of the best token; infinite if it is not in p̃.

    logits: float32 [vocab_size], the model's own after the prompt and `output`. A token at the very edge of
    top-k, top-p or min-p may be a candidate, but counts as an opponent only when it is surely inside.
    """
    sampling, position = case.sampling, len(case.prompt) + len(output)
    logits = logits.masked_fill(forbidden(sampling, output, len(logits)), -torch.inf)
    penalties = PenaltyState(case.prompt)
    for token in output:
        penalties.add(token)
    row = logits.clone()
    if sampling.edits_logits:
        edit_rows(
            row[None],
            [SampledRows(sampling, np.array([position]), penalties)],
            ShardIds.from_first(0, len(row)),
        )
    if sampling.is_greedy:
        return [(row.max() - row[token]).item() for token in candidates]
    x = row / sampling.temperature
    scores = x + gumbel(sampling.seed, position, torch.arange(len(row)))
    surely, possibly = (_kept(x.double(), sampling, slack) for slack in (-TOLERANCE, TOLERANCE))
    best = torch.where(surely, scores, -torch.inf).max()
    return [(best - scores[token]).item() if possibly[token] else float("inf") for token in candidates]


def _kept(x: torch.Tensor, sampling: SamplingParams, slack: float) -> torch.Tensor:
    """bool [vocab_size]: inside top-k, top-p and min-p when their edges give way by `slack`.

    x: float64 [vocab_size], logits / T. A negative slack asks for a margin instead.
    """
    sorted_x, order = x.sort(descending=True, stable=True)
    keep = torch.ones_like(sorted_x, dtype=torch.bool)
    if 0 < sampling.top_k < len(x):
        last_in, first_out = sorted_x[sampling.top_k - 1], sorted_x[sampling.top_k]
        keep &= sorted_x >= (last_in - slack if slack > 0 else first_out - slack)
        sorted_x = torch.where(sorted_x >= last_in, sorted_x, -torch.inf)
    if sampling.top_p < 1.0:
        mass = sorted_x.softmax(0)
        keep &= mass.cumsum(0) - mass < sampling.top_p + slack
    if sampling.min_p > 0.0:
        keep &= sorted_x - sorted_x[0] >= torch.log(torch.tensor(sampling.min_p)) - slack
    return torch.zeros_like(keep).scatter(0, order, keep)


def _until_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> tuple[int, ...]:
    """A batch goes on with padding where one of its texts has ended."""
    for i, token in enumerate(tokens):
        if token in stop_token_ids:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def _processors(case: Case) -> list[LogitsProcessor]:
    """transformers' own processors in the order of the law, then the noise."""
    sampling, processors = case.sampling, []
    if sampling.is_confined:
        processors.append(_Confined(case))
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(t,): v for t, v in sampling.logit_bias}))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_OutputPenalties(case))
    if sampling.is_greedy:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return [*processors, _SharedNoise(sampling.seed)]


@dataclass
class _Confined(LogitsProcessor):
    """What the text forbids."""

    case: Case

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (text,) = input_ids.tolist()
        return scores.masked_fill(
            forbidden(self.case.sampling, text[len(self.case.prompt) :], scores.shape[1]), -torch.inf
        )


@dataclass
class _OutputPenalties(LogitsProcessor):
    """Presence and frequency penalties, which transformers does not have."""

    case: Case

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[0, len(self.case.prompt) :]
        counts = torch.bincount(output, minlength=scores.shape[1])
        sampling = self.case.sampling
        return scores - sampling.presence_penalty * (counts > 0).float() - sampling.frequency_penalty * counts


@dataclass
class _SharedNoise(LogitsProcessor):
    """Turns greedy choice into the coupled sample."""

    seed: int

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + gumbel(self.seed, input_ids.shape[1], torch.arange(scores.shape[1]))
