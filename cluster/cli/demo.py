"""`outrider demo`: the main job in a few minutes. Shipped prompts, streamed; then the same without drafting."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskProgressColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from outrider.cluster.bench.prompts import Prompt, load_prompts
from outrider.cluster.cli.options import (
    Delta,
    Epsilon,
    JudgeName,
    MaxTokens,
    Overrides,
    Rule,
    Threshold,
    acceptance_options,
    given,
)
from outrider.cluster.cli.show import legend, show_stream
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import progress_bars
from outrider.cluster.request_options import check_options
from outrider.configs import loader
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine
    from outrider.workers.answer import Completion

DEMO_PROMPTS = Path(loader.__file__).parent / "prompts" / "demo.jsonl"
_PLAIN = {"max_nodes": 0}
_WIDTH = 100


@dataclass(frozen=True)
class Comparison:
    """One prompt, answered with and without drafting."""

    name: str
    speculative: "Completion"
    plain: "Completion"


def demo(
    config: Annotated[str, typer.Argument(help="YAML file or preset name.")] = "quickstart",
    overrides: Overrides = [],
    max_tokens: MaxTokens = None,
    rule: Rule = None,
    judge: JudgeName = None,
    threshold: Threshold = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
) -> None:
    """Answer the shipped prompts, with drafting and without, and compare. Without drafting no rule has a say."""
    console = Console()
    loaded = load_config(config, overrides)
    prompts = load_prompts(DEMO_PROMPTS)
    ranks = loaded.target.tp_size
    console.print(
        f"Starting {loaded.target.model} on {ranks} target ranks, and a DraftWorker.", highlight=False
    )
    sampling = given({"max_tokens": max_tokens})
    acceptance = acceptance_options(rule, judge, threshold, epsilon, delta)
    check_options(loaded, sampling, {}, acceptance)
    with running_engine(loaded) as engine:
        console.print(legend(acceptance))
        _ask(engine, prompts[0], given({"max_tokens": 4}), {})  # the first request of a process is slow
        before, start_s = engine.stats(), time.perf_counter()
        speculative = [_show(console, engine, prompt, sampling, acceptance) for prompt in prompts]
        busy = busy_shares(before, engine.stats(), time.perf_counter() - start_s)
        console.print()
        with progress_bars(console, TaskProgressColumn(), TimeRemainingColumn()) as bars:
            waiting = bars.track(prompts, description="The same without drafting")
            plain = [_ask(engine, prompt, sampling, _PLAIN) for prompt in waiting]
    names = [prompt.id for prompt in prompts]
    pairs = [Comparison(*row) for row in zip(names, speculative, plain, strict=True)]
    console.print(speed_table(pairs))
    console.print(busy_table(busy))


def busy_shares(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], wall_s: float
) -> dict[str, dict[str, float]]:
    """Share of the wall time that each worker spent with each kind of work, waiting left out."""
    shares = {}
    for worker, counters in after.items():
        if "busy_s" in counters:
            earlier = before[worker]["busy_s"]
            kinds = {kind: seconds - earlier[kind] for kind, seconds in counters["busy_s"].items()}
            shares[worker] = {kind: s / wall_s for kind, s in kinds.items() if kind != "wait" and s > 0}
    return shares


def speed_table(pairs: Sequence[Comparison]) -> Table:
    """Tokens per second with and without drafting, prompt by prompt and over all."""
    table = Table(title="Decoding speed (time to the first token not counted)")
    table.add_column("prompt")
    for heading in ("tokens", "plain\ntok/s", "speculative\ntok/s", "speed-up", "acceptance\nlength"):
        table.add_column(heading, justify="right")
    table.add_column("kept", justify="right")
    table.add_column("same\ntext")
    for pair in pairs:
        same = "yes" if pair.speculative.text == pair.plain.text else "NO"
        table.add_row(pair.name, *_speed_cells([pair]), same)
    table.add_section()
    table.add_row("all", *_speed_cells(pairs), "")
    return table


def busy_table(busy: Mapping[str, Mapping[str, float]]) -> Table:
    """What share of the time each worker was busy while the answers were drafted and verified."""
    table = Table(title="Busy share while speculating")
    table.add_column("worker")
    table.add_column("busy", justify="right")
    table.add_column("with")
    for worker, kinds in busy.items():
        by_size = sorted(kinds.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in by_size if share >= 0.005)
        table.add_row(worker, f"{sum(kinds.values()):.0%}", parts)
    return table


def _ask(
    engine: "Engine", prompt: Prompt, sampling: Mapping[str, object], draft: Mapping[str, object]
) -> "Completion":
    messages = [{"role": "user", "content": prompt.text}]
    return show_stream(Console(quiet=True), engine.stream(messages, sampling, draft), visible=False)


def _show(
    console: Console,
    engine: "Engine",
    prompt: Prompt,
    sampling: Mapping[str, object],
    acceptance: Mapping[str, object],
) -> "Completion":
    console.rule(Text(prompt.id), style="dim")
    shortened = prompt.text if len(prompt.text) <= 400 else f"{prompt.text[:400]} ..."
    console.print(Text(shortened, "dim"), width=_WIDTH)
    console.print()
    messages = [{"role": "user", "content": prompt.text}]
    return show_stream(console, engine.stream(messages, sampling, acceptance=acceptance))


def _speed_cells(pairs: Sequence[Comparison]) -> tuple[str, ...]:
    plain = _tokens_per_s([pair.plain for pair in pairs])
    speculative = _tokens_per_s([pair.speculative for pair in pairs])
    num_tokens = sum(len(pair.speculative.tokens) for pair in pairs)
    num_rounds = sum(pair.speculative.stats.num_rounds for pair in pairs)
    return (
        str(num_tokens),
        f"{plain:.1f}",
        f"{speculative:.1f}",
        f"{speculative / plain:.2f}x" if plain else "",
        f"{num_tokens / num_rounds:.2f}" if num_rounds else "",
        str(sum(pair.speculative.stats.num_kept for pair in pairs)),
    )


def _tokens_per_s(answers: "Sequence[Completion]") -> float:
    seconds = sum(answer.decode_s for answer in answers)
    return sum(answer.num_decoded for answer in answers) / seconds if seconds > 0 else 0.0
