"""`outrider generate`: answers to prompts, streamed, or as JSON lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from outrider.cluster.cli.options import (
    Choice,
    ConfigName,
    Delta,
    DraftDepth,
    DraftMethods,
    DraftNodes,
    Epsilon,
    FrequencyPenalty,
    GrammarFile,
    JsonSchema,
    JudgeName,
    MaxTokens,
    MinP,
    MinTokens,
    Overrides,
    Plain,
    PresencePenalty,
    Regex,
    RepetitionPenalty,
    Rule,
    Seed,
    Stop,
    Temperature,
    TemplateArguments,
    Threshold,
    TopK,
    TopP,
    acceptance_options,
    draft_options,
    given,
    structured_outputs,
    template_arguments,
)
from outrider.cluster.cli.show import completion_json, show_stream, summary
from outrider.cluster.cli.start import running_engine, save_trace, with_trace
from outrider.cluster.cli.terminal import say_error
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.cluster.api import GenerationRequest
    from outrider.cluster.engine import Engine

_SOME_REFUSED = 1


def generate(
    config: ConfigName,
    overrides: Overrides = [],
    prompt: Annotated[str, typer.Option(help="The prompt.", show_default=False)] = "",
    prompts: Annotated[
        str,
        typer.Option(metavar="FILE", help="Prompts: .txt, one a line, or .jsonl.", show_default=False),
    ] = "",
    limit: Annotated[int, typer.Option(help="Use only this many of the file, spread over it; 0: all.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per answer.")] = False,
    trace: Annotated[
        str, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.", show_default=False)
    ] = "",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    stop: Stop = [],
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = [],
    grammar: GrammarFile = None,
    top_logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probs, also of this many.", show_default=False),
    ] = None,
    plain: Plain = False,
    draft_methods: DraftMethods = [],
    draft_nodes: DraftNodes = None,
    draft_depth: DraftDepth = None,
    rule: Rule = None,
    judge: JudgeName = None,
    threshold: Threshold = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    template: TemplateArguments = [],
) -> None:
    """Answer prompts. On a terminal accepted draft tokens are green, and yellow where a rule kept them against the
    target."""
    loaded = with_trace(load_config(config, overrides), bool(trace))
    texts = _read_prompts(prompt, prompts, limit)
    if top_logprobs is not None and not as_json:
        raise ValueError("--top-logprobs must come with --json: text has no place for log-probabilities")
    sampling = given(
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
            "max_tokens": max_tokens,
            "min_tokens": min_tokens,
            "stop": stop,
            "structured_outputs": structured_outputs(json_schema, regex, choice, grammar),
            "top_logprobs": top_logprobs,
            "logprobs": None if top_logprobs is None else True,
        }
    )
    draft = draft_options(plain, draft_methods, draft_nodes, draft_depth)
    acceptance = acceptance_options(rule, judge, threshold, epsilon, delta)
    arguments = template_arguments(template)
    if raw and arguments:
        raise ValueError("--template must stand without --raw: a text goes through no chat template")

    from outrider.cluster.api import GenerationRequest
    from outrider.cluster.request_options import check_options

    check_options(loaded, sampling, draft, acceptance)
    requests = [
        GenerationRequest(
            text if raw else [{"role": "user", "content": text}], sampling, draft, acceptance, arguments
        )
        for _, text in texts
    ]
    with running_engine(loaded) as engine:
        print_answers = _print_json if as_json else _print_text
        all_answered = print_answers(engine, texts, requests)
        if trace:
            save_trace(engine, Path(trace))
    if not all_answered:
        raise typer.Exit(_SOME_REFUSED)


def _read_prompts(prompt: str, path: str, limit: int) -> list[tuple[str, str]]:
    """(id, text) of each prompt."""
    if bool(prompt) == bool(path):
        raise ValueError("generate must get one of --prompt and --prompts")
    if prompt:
        return [("prompt", prompt)]
    from outrider.cluster.bench.prompts import load_prompts, select

    if not Path(path).is_file():
        raise ValueError(f"--prompts must be a .txt or .jsonl file, got {path!r}")
    return [(item.id, item.text) for item in select(load_prompts(path), limit)]


def _print_json(
    engine: "Engine", texts: Sequence[tuple[str, str]], requests: "Sequence[GenerationRequest]"
) -> bool:
    """All prompts at once, answers in their order. Returns whether none failed."""
    all_answered = True
    for (prompt_id, text), completion in zip(texts, engine.completions(requests), strict=True):
        typer.echo(completion_json(completion, text, prompt_id))
        all_answered &= not completion.error
    return all_answered


def _print_text(
    engine: "Engine", texts: Sequence[tuple[str, str]], requests: "Sequence[GenerationRequest]"
) -> bool:
    """One after the other, streamed. Returns whether none failed."""
    console, notes = Console(), Console(stderr=True)
    several = len(texts) > 1
    all_answered = True
    for (prompt_id, _), request in zip(texts, requests, strict=True):
        if several and console.is_terminal:
            console.rule(Text(prompt_id))
        elif several:
            console.file.write(f"## {prompt_id}\n")
        try:
            pieces = engine.stream(
                request.prompt, request.sampling, request.draft, request.acceptance, request.template
            )
            answer = show_stream(console, pieces)
        except ValueError as error:
            if not several:
                raise
            say_error(f"{prompt_id}: {error}")
            all_answered = False
            continue
        if answer.error:
            say_error(f"{prompt_id}: {answer.error}")
            all_answered = False
        if notes.is_terminal:
            notes.print(summary(answer), style="dim", highlight=False)
    return all_answered
