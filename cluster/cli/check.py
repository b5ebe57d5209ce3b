"""`outrider check`: does speculation leave the text as it is, on the user's own model and machine?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from outrider.cluster.cli.inputs import Style, open_model, read_prompts
from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.cluster.cli.start import running_engine
from outrider.cluster.cli.terminal import signs_of_life
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.bench.first_token import LawResult
    from outrider.cluster.bench.identity import IdentityResult

_FAILED = 1
_NUM_LAWS = 2
_NUM_MISMATCHES_SHOWN = 5


def check(
    config: ConfigName,
    overrides: Overrides = [],
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts: .jsonl or .txt; default: those of the demo.")
    ] = "",
    limit: Annotated[int, typer.Option(help="Most prompts, spread over categories; 0: all.")] = 8,
    category: Annotated[list[str], typer.Option(help="Only this category; may be repeated.")] = [],
    style: Annotated[Style, typer.Option(help="chat: through the chat template; raw: continue.")] = "chat",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampled comparison.")] = 0.8,
    seeds: Annotated[int, typer.Option(help="Sampled answers per prompt.", min=1)] = 2,
    draws: Annotated[int, typer.Option(help="First tokens drawn per prompt for the law.", min=50)] = 500,
    tolerance: Annotated[
        float, typer.Option(help="Largest score difference that counts as a tie; 0: by dtype.", min=0.0)
    ] = 0.0,
) -> None:
    """Compare speculative with plain decoding, token by token; exit code 1 if they differ."""
    loaded = load_config(config, overrides)

    from outrider.cluster.bench.decoders import EngineAnswerer
    from outrider.cluster.bench.first_token import check_first_tokens
    from outrider.cluster.bench.identity import TOLERANCE_OF_DTYPE, check_identity
    from outrider.cluster.bench.report import wide_console
    from outrider.cluster.request_options import check_options
    from outrider.workers.sequences.params import SamplingParams

    if temperature == 0:
        raise ValueError("--temperature must be above 0, got 0: greedy decoding is compared in any case")
    check_options(loaded, {"temperature": temperature, "max_tokens": max_tokens}, {})
    tolerance = tolerance or TOLERANCE_OF_DTYPE[loaded.target.dtype]
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    sampled = [replace(greedy, temperature=temperature, seed=seed) for seed in range(seeds)]
    model = open_model(loaded)
    console = wide_console()
    prompts = read_prompts(model, data, limit, category, style, max_tokens, console)
    with running_engine(loaded) as engine:
        answerer = EngineAnswerer(engine)
        identities = []
        for samplings in ([greedy], sampled):
            with _under_way(f"T = {samplings[0].temperature:g}: {len(prompts)} prompts, both ways"):
                identities.append(check_identity(answerer, prompts, samplings, tolerance))
            show_identity(identities[-1], console)
        with _under_way(f"T = 1: {draws} first tokens"):
            laws = check_first_tokens(answerer, prompts, _NUM_LAWS, draws)
    show_laws(laws, console)
    if not verdict(identities, laws, console):
        raise typer.Exit(_FAILED)


@contextmanager
def _under_way(what: str) -> Iterator[None]:
    notes = Console(stderr=True)
    with notes.status(what), signs_of_life(notes, lambda: f"check: {what}"):
        yield


def show_identity(result: "IdentityResult", console: Console) -> None:
    """What was compared at one temperature, and each difference."""
    failures = [mismatch for mismatch in result.mismatches if not mismatch.is_tie]
    num_ties = len(result.mismatches) - len(failures)
    accepted = result.num_accepted / result.num_drafted if result.num_drafted else 0.0
    console.print(
        f"T = {result.temperature:g}: {result.num_texts - len(result.mismatches)} of {result.num_texts} texts equal "
        f"({result.num_tokens} tokens, {result.num_drafted} drafted, {accepted:.0%} of them accepted), "
        f"{num_ties} parted at a tie (scores within {result.tolerance:g}), {len(failures)} differ",
        highlight=False,
    )
    for mismatch in failures[:_NUM_MISMATCHES_SHOWN]:
        console.print(
            f"  {mismatch.prompt_id}, seed {mismatch.seed}, token {mismatch.index}: plain {mismatch.plain_token} "
            f"({mismatch.plain_gap:.2g} below the best), speculative {mismatch.speculative_token} "
            f"({mismatch.speculative_gap:.2g} below the best)",
            style="red",
            markup=False,
            highlight=False,
        )


def show_laws(results: "Sequence[LawResult]", console: Console) -> None:
    for result in results:
        console.print(
            f"T = 1, first token of {result.prompt_id}: {result.num_draws} draws, {result.num_classes} classes, "
            f"chi-square p = {result.p_value:.3g}, total variation {result.total_variation:.3f}",
            markup=False,
            highlight=False,
        )


def verdict(identities: "Sequence[IdentityResult]", laws: "Sequence[LawResult]", console: Console) -> bool:
    """Says plainly whether everything holds."""
    same_text = all(result.holds for result in identities)
    same_law = all(result.holds for result in laws)
    if sum(result.num_accepted for result in identities) == 0:
        console.print("Nothing was accepted: the texts say nothing about speculation", style="yellow")
    if not same_text:
        console.print("FAIL: speculative decoding gives other text than plain decoding", style="bold red")
    if not same_law:
        console.print("FAIL: first tokens do not follow the model's law", style="bold red")
    if same_text and same_law:
        console.print(
            "PASS: speculation changes no token, and sampling follows the model's law", style="bold green"
        )
    return same_text and same_law
