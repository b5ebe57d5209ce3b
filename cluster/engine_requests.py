"""What callers of `Engine` hand over, as requests that travel: mistakes of kind are one-line ValueErrors."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from outrider.cluster.api import GenerationRequest, Prompt
from outrider.cluster.request_options import NOTHING_ASKED
from outrider.configs.schema import Config
from outrider.workers.sequences.params import SamplingParams

Asked = Prompt | GenerationRequest
Sampling = Mapping[str, object] | SamplingParams
"""What differs from the config's `sampling` section; or all of it."""


def requests_of(
    prompts: Asked | Iterable[Asked],
    sampling: Sampling = NOTHING_ASKED,
    draft: Mapping[str, object] = NOTHING_ASKED,
    acceptance: Mapping[str, object] = NOTHING_ASKED,
    template: Mapping[str, object] = NOTHING_ASKED,
) -> list[GenerationRequest]:
    """One prompt, or several; the options are those of every prompt, a GenerationRequest keeps its own."""
    options = fields_of(sampling), draft, acceptance, template
    return [
        as_sent(asked if isinstance(asked, GenerationRequest) else GenerationRequest(asked, *options))
        for asked in _each(prompts)
    ]


def as_sent(asked: GenerationRequest) -> GenerationRequest:
    """As it travels: read-only views of mappings cannot be pickled. What is no mapping is refused at the door."""
    options = (fields_of(asked.sampling), asked.draft, asked.acceptance, asked.template)
    return GenerationRequest(
        asked.prompt, *(dict(value) if isinstance(value, Mapping) else value for value in options)
    )


def fields_of(sampling: Sampling) -> Mapping[str, object]:
    """As a request names them."""
    if not isinstance(sampling, SamplingParams):
        return sampling
    if sampling.grammar.text:
        raise ValueError("SamplingParams.grammar must be left out: a request says structured_outputs")
    return sampling.request_fields()


def require_config(config: Config) -> None:
    """Raises ValueError for what is none, such as the name of a preset."""
    if not isinstance(config, Config):
        raise ValueError(f"config must be a Config, as load_config gives it, got {config!r}")


def _each(prompts: Asked | Iterable[Asked]) -> list[Any]:
    """A text, token ids and messages are one prompt each; what is no prompt at all is refused at the door."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    several = list(prompts)
    return [several] if several and all(isinstance(part, Mapping | Integral) for part in several) else several
