"""Part 12: drafters that read the target's hidden rows, and sampling's edits where the logits are.

Untrained heads of every method draft for the small model, all in one deployment, and the text must be that of plain
decoding under each law; the sampler of the device is held against that of the host on the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from outrider.configs.schema import Config
from outrider.kernels.selection import REFERENCES
from outrider.workers.first_gpu.deployments import LIMIT_S, configuration, gpus_of
from outrider.workers.first_gpu.expected import TOKENS_PER_ROUND
from outrider.workers.first_gpu.grown_drafts import grown_drafts
from outrider.workers.first_gpu.processes import Deployment, deployed
from outrider.workers.first_gpu.random_heads import write_heads
from outrider.workers.first_gpu.report import Row, not_run, passed_or_failed
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.small_model import ALL_KERNELS
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.sampling.confinement import NO_WORDS
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.logprobs import LawQuestions
from outrider.workers.sampling.sampler import Sampler
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import (
    EXACTLY,
    AcceptanceOptions,
    DraftOptions,
    Request,
    TokenEvent,
    TokenLogprobs,
)
from outrider.workers.sequences.vocabulary import Vocabulary, VocabularyRange, VocabularyTable
from outrider.workers.weights.random_source import RandomSource

METHODS = ("medusa", "eagle3", "mtp", "parallel")
MAX_NODES, MAX_DEPTH = 8, 6
NUM_SAMPLED, NUM_PROPOSED = 13, 4  # rows of the samplers, and proposals of each
LEAST_OF_EXPECTED = 0.6  # of the tokens a round on a CPU, where other rounds go on at the same time
SAMPLER_LIMIT = 1e-4  # nats between the two samplers, which differ in the order of sums alone

# By what is edited. Ids are those of the smallest vocabulary, 259.
LAWS = {
    "greedy": SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3),
    "top-k, top-p, min-p": SamplingParams(
        temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, seed=3, logprobs=True, top_logprobs=2
    ),
    "penalties, bias": SamplingParams(
        temperature=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((7, 2.0), (40, -3.0), (200, 1.5)),
        seed=5,
    ),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4),
    "all, least length": SamplingParams(
        temperature=1.1,
        top_k=30,
        top_p=0.95,
        presence_penalty=-0.2,
        logit_bias=((9, 1.0), (11, -100.0)),
        min_tokens=4,
        seed=2**40 + 9,
        logprobs=True,
        top_logprobs=5,
    ),
}
PROMPTS = (tuple(range(5, 75)), (7, 8, 9, 7, 8, 9, 7, 8))
Said = dict[str, list[TokenEvent]]


@dataclass(frozen=True)
class Variant:
    """Number format and kernels of a deployment; `limit`: nats by which a token's log-probability may differ between
    a forward of one row and one of many."""

    name: str
    dtype: str
    attention: str
    limit: float


VARIANTS = (
    Variant("float32, SDPA", "float32", "sdpa", 2e-3),
    Variant("bfloat16, kernels", "bfloat16", "kernel", 0.3),
)


@dataclass(frozen=True)
class Case:
    """What drafts, and by which rule drafts are accepted."""

    name: str
    methods: tuple[str, ...]
    acceptance: AcceptanceOptions = EXACTLY


CASES = (
    *(Case(name, (name,)) for name in METHODS),
    Case("all of them and ngram", ("ngram", *METHODS)),
    Case("typical acceptance, all", METHODS, AcceptanceOptions("typical")),
)


def hidden_drafters(setting: Setting) -> list[Row]:
    """Rows of the deployments, then of the samplers."""
    folders = write_heads(RandomSource(setting.model_spec()), setting.folder)
    heads = [f"draft.{name}.model={folder}" for name, folder in folders.items()]
    rows = []
    for variant in VARIANTS if setting.on_gpu else VARIANTS[:1]:
        rows += drafted(setting, variant, heads, CASES)
    return rows + grown_drafts(setting, folders["eagle3"]) + samplers(setting)


def drafted(setting: Setting, variant: Variant, heads: Sequence[str], cases: Sequence[Case]) -> list[Row]:
    """A row for each case, all in one deployment. After a case that breaks it the others get another; where it does
    not start each is tried alone, which tells whose fault that is."""
    rows: list[Row] = []
    is_running = False
    try:
        with deployed(_configured(setting, variant, heads, cases), gpus_of(setting), LIMIT_S) as running:
            try:
                plain = running.generate(_requests(setting, DraftOptions((), 0, 1)))
                is_running = True
                for case in cases:
                    rows.append(_compared(setting, variant, case, running, plain))
                running.stop()
            except Exception as error:
                raise RuntimeError(_reason(running, error)) from error
    except Exception as error:
        broken, others = cases[len(rows)] if len(rows) < len(cases) else None, cases[len(rows) + 1 :]
        if broken is not None and not is_running and others:
            return [row for case in cases for row in drafted(setting, variant, heads, [case])]
        what = broken.name if broken else "end of the deployment"
        rows.append(Row(f"{what}, {variant.name}", f"{type(error).__name__}: {error}", "FAILED"))
        if others:
            rows += drafted(setting, variant, heads, others)
    return rows


def _configured(setting: Setting, variant: Variant, heads: Sequence[str], cases: Sequence[Case]) -> Config:
    methods = dict.fromkeys(method for case in cases for method in case.methods)
    return configuration(
        setting,
        variant.dtype,
        variant.attention,
        further=[*heads, f"draft.methods=[{', '.join(methods)}]", "acceptance.rules=[exact, typical]"],
    )


def _requests(
    setting: Setting, draft: DraftOptions, acceptance: AcceptanceOptions = EXACTLY
) -> list[Request]:
    """Every prompt under every law."""
    return [
        Request(
            f"{law}, prompt {i}",
            prompt,
            replace(sampling, max_tokens=setting.sizes.new_tokens, ignore_eos=True),
            draft,
            acceptance,
        )
        for law, sampling in LAWS.items()
        for i, prompt in enumerate(PROMPTS)
    ]


def _reason(running: Deployment, error: Exception) -> str:
    """What ended a worker's `run`, where one has ended; else what the caller met."""
    ends = [run.exception() for run in running.runs if run.done()]
    return (
        "; ".join(f"{type(end).__name__}: {end}" for end in ends if end) or f"{type(error).__name__}: {error}"
    )


def _compared(setting: Setting, variant: Variant, case: Case, running: Deployment, plain: Said) -> Row:
    """Texts and log-probabilities of a case beside those of plain decoding; how much of its drafts was accepted."""
    what = f"{case.name}, {variant.name}"
    said = running.generate(
        _requests(setting, DraftOptions(case.methods, MAX_NODES, MAX_DEPTH), case.acceptance)
    )
    problems = [f"{name}: {e[-1].error}" for name, e in said.items() if e[-1].finish_reason == "error"]
    stats = [events[-1].stats for events in said.values()]
    accepted, num_drafted = sum(s.num_accepted for s in stats), sum(s.num_drafted for s in stats)
    num_tokens = sum(len(tokens_of(events)) for events in said.values())
    length = num_tokens / max(1, sum(s.num_rounds for s in stats))
    if not accepted:
        problems.append(f"none of {num_drafted} drafted tokens was accepted")
    expected = TOKENS_PER_ROUND[case.name] if setting.on_gpu else 0.0
    if length < LEAST_OF_EXPECTED * expected:
        problems.append(f"{length:.2f} tokens a round: it drafts worse than on a CPU")
    beside = f"{expected:.2f} tokens a round on a CPU" if expected else ""
    values = [("tokens_per_round", length), ("accepted", float(accepted)), ("drafted", float(num_drafted))]
    told = f"{length:.2f} tokens a round, {accepted} of {num_drafted} drafted"
    if case.acceptance != EXACTLY:
        told += f"; {sum(s.num_kept for s in stats)} kept against the target's choice"
        return replace(passed_or_failed(what, problems, told, beside), values=tuple(values))
    different = [name for name in said if tokens_of(said[name]) != tokens_of(plain[name])]
    same = f"{len(said) - len(different)} of {len(said)} texts are the same"
    if different and (variant.dtype == "float32" or len(different) == len(said)):
        problems.append(f"{same}, not {'; '.join(different)}")
    off = max(_logprobs_off(said[name], plain[name]) for name in said)
    if not off <= variant.limit:
        problems.append(f"log-probabilities are {off:.2g} nats off, allowed {variant.limit:g}")
    row = passed_or_failed(what, problems, f"{same}, log-probabilities {off:.1e} nats off; {told}", beside)
    if different and not problems:
        rounding = "bfloat16 rounds otherwise for one row and for many"
        row = replace(row, verdict="measured", beside=f"{beside}; {rounding}" if beside else rounding)
    return replace(row, values=(*values, ("logprobs_off_nats", off)))


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def _logprobs_off(said: Sequence[TokenEvent], plain: Sequence[TokenEvent]) -> float:
    """Nats, the largest difference as far as the texts are the same; infinite where only one tells any."""
    ours, theirs = ([told for event in events for told in event.logprobs] for events in (said, plain))
    if bool(ours) != bool(theirs):
        return math.inf
    off = 0.0
    pairs = zip(ours, theirs, tokens_of(said), tokens_of(plain), strict=False)
    for own, other, token, others in pairs:
        if token != others:
            break
        off = max(off, *(abs(a - b) for a, b in zip(_nats(own), _nats(other), strict=True)))
    return off


def _nats(told: TokenLogprobs) -> list[float]:
    """Of the token and of the likeliest, whose order may change where two are equally likely."""
    return [told.logprob, *(logprob for _, logprob in told.top)]


def samplers(setting: Setting) -> list[Row]:
    """The sampler where the logits are beside that of the host, on the same float32 logits: tokens, proposals,
    log-probabilities and entropies, with all ids and with a table of some."""
    if not setting.has_kernels:
        return [not_run("samplers", "there is no GPU")]
    return [_samplers(setting, law, with_table) for law in LAWS for with_table in (False, True)]


def _samplers(setting: Setting, law: str, with_table: bool) -> Row:
    generator = torch.Generator().manual_seed(1)
    num_tokens = setting.sizes.sampled_tokens
    ids = torch.randperm(num_tokens, generator=generator)[: num_tokens // 2].sort().values
    num_ids = len(ids) if with_table else num_tokens
    logits = 3.0 * torch.randn(NUM_SAMPLED, num_ids, generator=generator)
    words = NO_WORDS
    if LAWS[law].is_confined:  # half of all tokens may follow
        words = np.random.default_rng(2).integers(
            -(2**31), 2**31, (NUM_SAMPLED, -(-num_tokens // 32)), dtype=np.int32
        )
    group = SampledRows(
        LAWS[law],
        np.arange(20, 20 + NUM_SAMPLED),
        PenaltyState(PROMPTS[1]),
        [[3, 7, 40][: row % 4] for row in range(NUM_SAMPLED)],
        words,
    )
    rows = np.arange(NUM_SAMPLED)
    asked = ids.numpy()[5 : 5 + NUM_SAMPLED] if with_table else np.arange(5, 5 + NUM_SAMPLED)
    questions = LawQuestions(rows, asked, rows[::2])
    found = []
    for device, kernels in ((setting.device, ALL_KERNELS), (torch.device("cpu"), REFERENCES)):
        vocabulary: Vocabulary = VocabularyRange(0, num_tokens)
        if with_table:
            vocabulary = VocabularyTable(ids.tolist(), device)
        sampler = Sampler(num_ids, vocabulary, SoloCommunicator(), kernels)
        there = logits.to(device)
        samples = sampler.sample(there, [group], questions)
        proposed = sampler.propose(there, [group], NUM_PROPOSED)
        found.append((samples, proposed, there.cpu()))
    (ours, (our_ids, our_laws), our_logits), (theirs, (their_ids, their_laws), _) = found
    problems = [
        f"other {name}"
        for name, own, other in (
            ("tokens", ours.tokens, theirs.tokens),
            ("likeliest tokens", ours.top_ids, theirs.top_ids),
            ("proposals", our_ids, their_ids),
            ("edits", ours.is_pushed_down, theirs.is_pushed_down),
            ("logits afterwards", our_logits, logits),
        )
        if not torch.equal(own, other)
    ]
    pairs = (
        (ours.logprobs, theirs.logprobs),
        (ours.top_logprobs, theirs.top_logprobs),
        (ours.token_logprobs, theirs.token_logprobs),
        (ours.token_laws, theirs.token_laws),
        (ours.entropies, theirs.entropies),
        (our_laws, their_laws),
    )
    off = max(_nats_apart(own, other) for own, other in pairs)
    if not off <= SAMPLER_LIMIT:
        problems.append(f"{off:.2g} nats off, allowed {SAMPLER_LIMIT:g}")
    where = f"{num_ids} of {num_tokens} ids"
    return passed_or_failed(f"samplers, {law}, {where}", problems, f"the same tokens, {off:.1e} nats off")


def _nats_apart(own: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where not the same are removed."""
    if not torch.equal(own.isfinite(), other.isfinite()):
        return math.inf
    return float((own - other)[own.isfinite()].abs().amax()) if own.isfinite().any() else 0.0
