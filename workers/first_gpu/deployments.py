"""Parts 5, 6 and 9: target and drafter as processes on the one GPU, what they say, and where their time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.profiler import profile

from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.kernels.selection import REFERENCES
from outrider.workers.first_gpu.processes import deployed
from outrider.workers.first_gpu.report import Row, passed_or_failed
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.first_gpu.small_model import ALL_KERNELS, build, compare_graphs, logits_of
from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.link.distributed import GroupCommunicator, open_store
from outrider.workers.link.messages import Draft, SequenceStep, Steps
from outrider.workers.link.starts import SequenceStart
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, TokenEvent
from outrider.workers.target_rank import TargetRank
from outrider.workers.trace import Tracer, write_chrome_trace

SPECULATIVE, PLAIN = DraftOptions(("ngram", "model"), 8, 8), DraftOptions((), 0, 1)
LIMIT_S = 200.0  # compiling, self-test, captures
GROUP_TIMEOUT_S = 60.0
NUM_ROUNDS = 5  # profiled
Texts = dict[str, list[int]]


def configuration(
    setting: Setting, dtype: str, attention: str, tp_size: int = 1, further: Sequence[str] = ()
) -> Config:
    """The small model and its noisy copy, both on the device; ranks sum by gloo. further: `key=value`."""
    device = setting.device.type
    given = (1.0 / tp_size if setting.on_gpu else 0.0, 1.0 if setting.on_gpu else 0.0)
    return load_config(
        "tiny-random",
        [
            f"target.model={setting.model_spec()}",
            f"draft.model={setting.model_spec(0.2)}",
            *(f"{role}.device={device}" for role in ("target", "draft")),
            *(f"{role}.dtype={dtype}" for role in ("target", "draft")),
            *(f"{role}.kv_cache_bytes=64MiB" for role in ("target", "draft")),
            f"target.attention={attention}",
            f"target.tp_size={tp_size}",
            "target.all_reduce=gloo",
            f"cluster.num_gpus_per_target={given[0]}",
            f"cluster.num_gpus_per_draft={given[1]}",
            "rounds.trace=true",
            f"cluster.group_timeout_s={LIMIT_S}",
            *further,
        ],
    )


def requests(draft: DraftOptions, num_tokens: int) -> list[Request]:
    """Four prompts, each greedy and with top-p."""
    prompts = (tuple(range(5, 60)), (7, 8, 9, 7, 8, 9, 7, 8), (100,), tuple(range(200, 120, -3)))
    samplings = (
        SamplingParams(temperature=0.0, max_tokens=num_tokens),
        SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=num_tokens),
    )
    return [
        Request(f"{i}, {'top-p' if sampling.temperature else 'greedy'}", prompt, sampling, draft)
        for i, prompt in enumerate(prompts)
        for sampling in samplings
    ]


def texts_of(events: dict[str, list[TokenEvent]]) -> Texts:
    return {name: [token for event in each for token in event.tokens] for name, each in events.items()}


def gpus_of(setting: Setting) -> Sequence[int]:
    return (setting.device.index or 0,) if setting.on_gpu else ()


def same_texts(what: str, texts: Texts, others: Texts, exact: bool) -> Row:
    """Whether all are equal; where rounding may decide, how many are."""
    different = [name for name in texts if texts[name] != others[name]]
    said = f"{len(texts) - len(different)} of {len(texts)} texts are the same"
    if not exact:
        return Row(what, said, "measured", "bfloat16 rounds otherwise for one row and for many")
    return passed_or_failed(what, [f"{said}, not {'; '.join(different)}"] if different else [], said)


def speculative_and_plain(setting: Setting) -> list[Row]:
    rows = []
    variants = [("float32, SDPA", "float32", "sdpa")]
    if setting.on_gpu:
        variants.append(("bfloat16, kernels", "bfloat16", "kernel"))
    for name, dtype, attention in variants:
        config = configuration(setting, dtype, attention)
        with deployed(config, gpus_of(setting), LIMIT_S) as running:
            events = running.generate(requests(SPECULATIVE, setting.sizes.new_tokens))
            plain = running.generate(requests(PLAIN, setting.sizes.new_tokens))
            running.stop()
        rows.append(
            same_texts(
                f"speculative and plain, {name}", texts_of(events), texts_of(plain), dtype == "float32"
            )
        )
        stats = [each[-1].stats for each in events.values()]
        accepted, drafted = sum(s.num_accepted for s in stats), sum(s.num_drafted for s in stats)
        problems = [] if accepted else ["nothing that was drafted was accepted"]
        rows.append(passed_or_failed(f"acceptance, {name}", problems, f"{accepted} of {drafted} drafted"))
    return rows


def ranks(setting: Setting) -> list[Row]:
    """Two ranks on one device over gloo say what one says; a group of one over NCCL, captured on a GPU."""
    texts = []
    for tp_size in (1, 2):
        config = configuration(setting, "float32", "sdpa", tp_size)
        with deployed(config, gpus_of(setting), LIMIT_S) as running:
            texts.append(texts_of(running.generate(requests(SPECULATIVE, setting.sizes.new_tokens))))
            running.stop()
    rows = [same_texts("one rank and two over gloo, float32", texts[0], texts[1], exact=True)]
    transport = "nccl" if setting.on_gpu else "gloo"
    kernels = ALL_KERNELS if setting.has_kernels else REFERENCES
    dtype = torch.bfloat16
    alone = logits_of(*build(setting, setting.device, dtype, kernels, SoloCommunicator()))
    store = open_store("127.0.0.1", GROUP_TIMEOUT_S)
    group = GroupCommunicator(store, store, 0, 1, transport, GROUP_TIMEOUT_S)
    try:
        summed = logits_of(*build(setting, setting.device, dtype, kernels, group))
        problems = [] if torch.equal(alone, summed) else ["other logits than without a group"]
        rows.append(passed_or_failed(f"one rank over {transport}", problems, "the same bits"))
        captured = compare_graphs(setting, group)
        rows += [Row(f"{row.what}, {transport}", row.measured, row.verdict, row.beside) for row in captured]
    finally:
        group.close()
    return rows


def end_to_end(setting: Setting) -> list[Row]:
    """A deployment with its trace, and torch's profile of rounds in this process."""
    dtype, attention = ("bfloat16", "kernel") if setting.on_gpu else ("float32", "sdpa")
    config = configuration(setting, dtype, attention)
    with deployed(config, gpus_of(setting), LIMIT_S) as running:
        running.generate(requests(SPECULATIVE, 4))  # warm
        begun = time.monotonic()
        events = running.generate(requests(SPECULATIVE, setting.sizes.new_tokens))
        seconds = time.monotonic() - begun
        workers = {"draft": running.draft, "target 0": running.targets[0]}
        traces = {name: worker.call("trace_events") for name, worker in workers.items()}
        busy = {name: worker.call("stats")["busy_s"] for name, worker in workers.items()}
        passes = running.draft.call("stats")["target_pass_s"]
        running.stop()
    write_chrome_trace(setting.folder / "trace.json", traces)
    num_tokens = sum(len(tokens) for tokens in texts_of(events).values())
    rows = [Row("tokens per second, 8 requests at once", f"{num_tokens / seconds:.1f}", beside="trace.json")]
    for name, kinds in busy.items():
        spent = ", ".join(f"{kind} {s * 1e3:.0f} ms" for kind, s in kinds.items() if s > 0)
        rows.append(Row(f"{name} was busy with", spent))
    rows += [
        Row(f"a round of {n} rows, measured by the drafter", f"{s * 1e3:.2f} ms") for n, s in passes.items()
    ]
    return rows + profiled_rounds(setting)


def profiled_rounds(setting: Setting) -> list[Row]:
    """What takes the host and the device most in one rank's rounds of one sequence."""
    kernels = ALL_KERNELS if setting.has_kernels else REFERENCES
    model, cache = build(setting, setting.device, torch.bfloat16, kernels, SoloCommunicator())
    rank = TargetRank(model, cache, 1, model.config.max_context, Tracer("target 0", False))
    start = SequenceStart(0, 2, 0, SamplingParams(temperature=0.8, top_p=0.9))
    rank.step(Draft(0, (start,), (), Steps.of([SequenceStep(0, (), range(16), (5, 6), (0, 0), 1)])))
    tree = Steps.of([SequenceStep(0, (0,), (), (7, 8, 9, 10, 11, 12, 13, 14), (0, 0, 0, 1, 1, 2, 2, 3), 0)])
    with profile(activities=setting.activities) as profiled:
        for number in range(1, NUM_ROUNDS + 1):
            rank.step(Draft(number, (), (), tree))
        setting.synchronize()
    profiled.export_chrome_trace(str(setting.folder / "profile.json"))
    host = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)[:5]
    took = [("host", event, event.self_cpu_time_total) for event in host]
    took += [("device", event, setting.time_us(event)) for event in setting.busiest(profiled)[:5]]
    return [
        Row(
            f"{where}: {event.key[:40]}",
            f"{total_us / NUM_ROUNDS:.0f} us a round, {event.count / NUM_ROUNDS:g} times",
        )
        for where, event, total_us in took
    ]
