"""What commands read before an engine runs: facts about the target, prompts as tokens."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.bench.runner import EncodedPrompt
    from outrider.workers.training.lines import Description

Style = Literal["chat", "raw"]


@dataclass(frozen=True)
class ModelFacts:
    """What the driver needs to know of the target."""

    tokenizer: Any
    vocab_size: int
    max_tokens: int
    """Prompt and output together."""
    stop_token_ids: tuple[int, ...]


def open_model(config: Config) -> ModelFacts:
    """Tokenizer and limits of the target; fetches no weights."""
    from outrider.workers.capacity import max_sequence_tokens
    from outrider.workers.weights.progress import silent
    from outrider.workers.weights.resolver import read_config, resolve_description, resolve_tokenizer
    from outrider.workers.weights.tokenizer import end_token_ids, load_tokenizer

    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    resolved = resolve_description(config.target.model, cache_dir, silent, "target.model")
    model = read_config(resolved)
    if config.target.tokenizer:
        resolved = resolve_tokenizer(config.target.tokenizer, cache_dir, silent, "target.tokenizer")
    tokenizer = load_tokenizer(resolved)
    return ModelFacts(
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        max_tokens=max_sequence_tokens(config, model),
        stop_token_ids=end_token_ids(model, tokenizer, resolved),
    )


def read_prompts(
    model: ModelFacts,
    data: str,
    limit: int,
    categories: Sequence[str],
    style: Style,
    max_new_tokens: int,
    console: Console,
) -> "list[EncodedPrompt]":
    """The chosen prompts as tokens; those that do not fit the context are left out, and said so."""
    from outrider.cluster.bench.prompts import SHIPPED_PROMPTS, encode, load_prompts, select
    from outrider.cluster.bench.runner import EncodedPrompt

    chosen = select(load_prompts(data or SHIPPED_PROMPTS), limit, categories)
    encoded = [
        EncodedPrompt(prompt.id, prompt.category, encode(prompt, model.tokenizer, style)) for prompt in chosen
    ]
    fitting = [prompt for prompt in encoded if len(prompt.tokens) + max_new_tokens <= model.max_tokens]
    if not fitting:
        raise ValueError(
            f"target.max_context must hold a prompt and --max-tokens ({max_new_tokens}); "
            f"none of {len(encoded)} prompts fits into {model.max_tokens} tokens"
        )
    if len(fitting) < len(encoded):
        console.print(f"left out: {len(encoded) - len(fitting)} prompts longer than the context")
    return fitting


def describe_run(config: Config, model: ModelFacts, settings: Mapping[str, Any]) -> "Description":
    """What a directory of lines says of the run that fills it.

    settings: what decides what each line is.
    """
    from outrider.cluster.bench.machine import package_version
    from outrider.workers.training.lines import Description

    tokenizer = tokenizer_digest(model.tokenizer)
    return Description(
        config.target.model, model.vocab_size, tokenizer, settings, package_version("outrider")
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's JSON, hexadecimal."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def file_digest(path: str) -> str:
    """SHA-256 of a file, hexadecimal; empty for none."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() if path else ""
