"""`outrider bench`: this engine against its own plain decoding and against transformers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from rich.table import Column

from outrider.cluster.cli.inputs import Style, open_model, read_prompts
from outrider.cluster.cli.options import (
    ConfigName,
    Delta,
    Epsilon,
    JudgeName,
    MaxTokens,
    Overrides,
    Rule,
    Seed,
    Temperature,
    Threshold,
    TopP,
    acceptance_options,
    given,
)
from outrider.cluster.cli.start import running_engine, save_trace, with_trace
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.configs.loader import load_config
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.bench.runner import Decoder, EncodedPrompt, Plan, Turn
    from outrider.cluster.engine import Engine
    from outrider.workers.baselines import BaselineProcess
    from outrider.workers.sequences.params import SamplingParams

_NUM_WARM_UP_TOKENS = 12
_CHART_FORMATS = (".png", ".svg", ".pdf")


def bench(
    config: ConfigName,
    overrides: Overrides = [],
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts: .jsonl or .txt; default: those of the demo.")
    ] = "",
    against: Annotated[
        str,
        typer.Option(
            help="Comma-separated: plain, transformers, transformers-assisted, transformers-lookup."
        ),
    ] = "plain",
    methods: Annotated[
        str,
        typer.Option(
            help="Compare draft methods: comma-separated mixes such as ngram,ngram+model; default: all of "
            "draft.methods together."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(help="Most prompts, spread over categories; 0: all.")] = 8,
    category: Annotated[list[str], typer.Option(help="Only this category; may be repeated.")] = [],
    style: Annotated[Style, typer.Option(help="chat: through the chat template; raw: continue.")] = "chat",
    repeats: Annotated[int, typer.Option(help="How often everything is run.", min=1)] = 1,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, comma-separated.")] = "1",
    threads: Annotated[
        int, typer.Option(help="CPU threads of transformers; 0: the CPUs this process may use.", min=0)
    ] = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    rule: Rule = None,
    judge: JudgeName = None,
    threshold: Threshold = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    json: Annotated[str, typer.Option(metavar="FILE", help="Write every figure as JSON.")] = "",
    chart: Annotated[str, typer.Option(metavar="FILE", help="Draw a chart (.png, .svg, .pdf).")] = "",
    trace: Annotated[str, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.")] = "",
    host: Annotated[
        bool,
        typer.Option("--host", help="Instead: the host's CPU time per round, over models that cost nothing."),
    ] = False,
) -> None:
    """Measure speed and acceptance. Modes take turns prompt by prompt, on the same prompts and cores.

    A lossy rule is asked for where drafting is: against plain it shows what it gains and how many texts it changes.
    """
    if host:
        _check_writable(json)
        _measure_host(load_config(config, overrides), json)
        return
    loaded = _for_bench(with_trace(load_config(config, overrides), bool(trace)))
    mixes = _mixes(methods, loaded)
    modes = _modes(against, loaded)
    _check_writable(json, chart, trace)
    if chart and Path(chart).suffix not in _CHART_FORMATS:
        raise ValueError(f"--chart must end with one of {', '.join(_CHART_FORMATS)}, got {chart!r}")

    from outrider.cluster.bench.machine import num_cpus
    from outrider.cluster.bench.report import wide_console
    from outrider.cluster.bench.runner import Plan
    from outrider.cluster.request_options import check_options

    plan = Plan(_concurrencies(concurrency), repeats)
    asked = given({"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens})
    acceptance = acceptance_options(rule, judge, threshold, epsilon, delta)
    sampling = check_options(loaded, asked, {}, acceptance)
    model = open_model(loaded)
    sampling.validate(model.vocab_size)
    console = wide_console()
    prompts = read_prompts(model, data, limit, category, style, sampling.max_tokens, console)
    threads = threads or num_cpus()
    with ExitStack() as stack:
        engine = stack.enter_context(running_engine(loaded))
        baseline = stack.enter_context(_baseline(loaded, modes, threads, model.stop_token_ids))
        decoders = _decoders(mixes, acceptance, modes, engine, baseline)
        turns = _measure(decoders, prompts, sampling, plan)
        peaks = {
            name: s["peak_memory_bytes"] for name, s in engine.stats().items() if "peak_memory_bytes" in s
        }
        if baseline is not None:
            peaks["transformers"] = baseline.peak_memory_bytes()
        if trace:
            save_trace(engine, Path(trace))
    settings = {
        "title": _title(loaded, acceptance, data, len(prompts), threads),
        "config": asdict(loaded),
        "data": data or "demo.jsonl",
        "style": style,
        "num_prompts": len(prompts),
        "sampling": asdict(sampling),
        "acceptance": acceptance,
        "repeats": repeats,
        "transformers_threads": threads,
    }
    _report(turns, settings, peaks, model.stop_token_ids, json, chart, console)


def _measure_host(config: Config, json: str) -> None:
    from outrider.cluster.bench import host
    from outrider.cluster.bench.report import wide_console

    report = host.measure(config)
    host.show(report, wide_console())
    if json:
        host.write_json(report, config, Path(json))


def _for_bench(config: Config) -> Config:
    """Prompts come several times: pages kept from another mode's turn would be an unfair help."""
    return replace(config, rounds=replace(config.rounds, prefix_sharing=False))


def _modes(against: str, config: Config) -> list[str]:
    from outrider.cluster.bench.decoders import MODES

    wanted = [name.strip() for name in against.split(",") if name.strip()]
    for name in wanted:
        if name not in MODES:
            raise ValueError(f"--against must be among {', '.join(MODES)}; got {name!r}")
    if "transformers-assisted" in wanted and not config.draft.model:
        raise ValueError("draft.model must be set for --against transformers-assisted")
    return list(dict.fromkeys(wanted))


def _mixes(methods: str, config: Config) -> dict[str, dict[str, object]]:
    """By the name of a speculative mode, what its requests say of drafting."""
    mixes: dict[str, dict[str, object]] = {}
    for name in (part.strip() for part in methods.split(",") if part.strip()):
        mix = name.split("+")
        unknown = [method for method in mix if method not in config.draft.methods]
        if unknown or len(set(mix)) < len(mix):
            allowed = ", ".join(config.draft.methods)
            raise ValueError(f"--methods must be mixes of draft.methods ({allowed}), got {name!r}")
        mixes[name] = {"methods": mix}
    return mixes or {"outrider": {}}


def _concurrencies(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--concurrency must be whole numbers from 1, such as 1,8; got {text!r}")
    return tuple(int(part) for part in parts)


def _check_writable(*paths: str) -> None:
    """Before minutes of measuring, not after."""
    for path in paths:
        if path and not Path(path).expanduser().resolve().parent.is_dir():
            raise ValueError(f"output files must be in a folder that exists, got {path!r}")


@contextmanager
def _baseline(
    config: Config, modes: Sequence[str], threads: int, stop_token_ids: tuple[int, ...]
) -> "Iterator[BaselineProcess | None]":
    """The transformers process, if a mode wants it."""
    if not any(mode.startswith("transformers") for mode in modes):
        yield None
        return
    from outrider.workers.baselines import BaselineProcess, BaselineSpec

    penalties = (config.sampling.presence_penalty, config.sampling.frequency_penalty)
    if any(penalties):
        raise ValueError(
            "sampling.presence_penalty and frequency_penalty must be 0: transformers has neither"
        )
    spec = BaselineSpec(
        target=config.target.model,
        draft=config.draft.model if "transformers-assisted" in modes else "",
        dtype=config.target.dtype,
        num_threads=threads,
        cache_dir=config.cluster.model_cache_dir,
        stop_token_ids=stop_token_ids,
    )
    with BaselineProcess(spec) as process:
        yield process


def _decoders(
    mixes: dict[str, dict[str, object]],
    acceptance: dict[str, object],
    modes: Sequence[str],
    engine: "Engine",
    baseline: "BaselineProcess | None",
) -> "list[Decoder]":
    from outrider.cluster.bench.decoders import PLAIN, BaselineDecoder, EngineDecoder
    from outrider.workers.baselines import BASELINE_MODES

    others: dict[str, Decoder] = {"plain": EngineDecoder("plain", engine, PLAIN)}
    if baseline is not None:
        others |= {mode: BaselineDecoder(mode, baseline) for mode in BASELINE_MODES}
    speculative = [EngineDecoder(name, engine, draft, acceptance) for name, draft in mixes.items()]
    return [*speculative, *(others[mode] for mode in modes)]


def _measure(
    decoders: "Sequence[Decoder]",
    prompts: "Sequence[EncodedPrompt]",
    sampling: "SamplingParams",
    plan: "Plan",
) -> "list[Turn]":
    from outrider.cluster.bench.runner import count_turns, run_turns, warm_up

    notes = Console(stderr=True)
    count = MofNCompleteColumn(table_column=Column(no_wrap=True))
    with progress_bars(notes, count, TimeRemainingColumn()) as bars:
        num_turns = count_turns(decoders, prompts, plan)
        task = bars.add_task("turns", total=num_turns)
        with signs_of_life(notes, lambda: f"bench: {bars.tasks[task].completed:g} of {num_turns} turns"):
            warm_up(decoders, prompts, sampling, _NUM_WARM_UP_TOKENS)
            return run_turns(decoders, prompts, sampling, plan, on_turn=lambda turn: bars.advance(task))


def _title(config: Config, acceptance: dict[str, object], data: str, num_prompts: int, threads: int) -> str:
    drafter = Path(config.draft.model).name if "model" in config.draft.methods else ""
    parts = [
        Path(config.target.model).name,
        "drafts: " + "+".join(config.draft.methods) + (f" ({drafter})" if drafter else ""),
        config.target.dtype,
        *([" ".join(map(str, acceptance.values()))] if acceptance else []),
        f"{num_prompts} {'prompt' if num_prompts == 1 else 'prompts'} of {Path(data).name or 'the demo'}",
        f"{threads} threads",
    ]
    return ", ".join(parts)


def _report(
    turns: "Sequence[Turn]",
    settings: dict[str, Any],
    peaks: dict[str, int],
    stop_token_ids: tuple[int, ...],
    json: str,
    chart: str,
    console: Console,
) -> None:
    from outrider.cluster.bench.machine import describe_machine
    from outrider.cluster.bench.metrics import agreements, summarise
    from outrider.cluster.bench.report import BenchReport, show, write_json

    # Sampled, engines draw other noise than transformers does: only our own modes can agree.
    comparable = [
        turn
        for turn in turns
        if settings["sampling"]["temperature"] == 0 or not turn.mode.startswith("transformers")
    ]
    report = BenchReport(
        machine=describe_machine(),
        settings=settings,
        summaries=summarise(turns),
        agreements=agreements(comparable, stop_token_ids),
        peak_memory_bytes=peaks,
        turns=turns,
    )
    show(report, console)
    if json:
        write_json(report, Path(json))
    if chart:
        from outrider.cluster.bench.chart import write_chart

        write_chart(report, Path(chart))
