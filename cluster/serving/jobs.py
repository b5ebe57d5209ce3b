"""Bodies of requests as jobs for the engine: one GenerationRequest for each choice, in the order of their indices."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from outrider.cluster.api import CallForm, GenerationRequest, Prompt, ServedModel
from outrider.cluster.serving.calls import forced_calls
from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.formats import asked_format
from outrider.cluster.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Generation,
    Message,
    Speculative,
    StreamOptions,
    Tool,
    ToolCall,
)
from outrider.configs.schema import Config

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
_ACCEPTANCE = ("rule", "epsilon", "delta", "judge", "threshold")
_NUM_SEEDS = 2**64


@dataclass(frozen=True)
class Job:
    """What a request comes to."""

    requests: tuple[GenerationRequest, ...]
    """One a choice; all choices of a prompt stand together."""

    num_per_prompt: int
    """Choices of each prompt."""

    prompt_field: str
    """What the client calls its prompt."""

    format_field: str
    """By which the client said what an answer must be; empty: it did not."""

    stream: bool
    stream_options: StreamOptions
    origins: bool
    """Whether the answer says who chose its tokens."""

    echo: tuple[str, ...] = ()
    """A text before each choice, or none."""

    user: str = ""

    thoughts: Literal["tags", "open", "none"] = "none"
    """As `server.thoughts`."""

    calls: CallForm = "none"
    """How calls of tools look; none: the model may call none."""


def check_model(asked: str | None, served: str) -> None:
    """Raises ApiError for a model that is not the one."""
    if asked not in (None, served):
        raise ApiError(404, f"model must be {served!r}, got {asked[:200]!r}", "model", "model_not_found")


def chat_job(body: ChatRequest, config: Config, model: ServedModel) -> Job:
    """Raises ApiError for what is wrong with the body alone."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_completion_tokens must be max_tokens where both are given: they mean the same"
        raise ApiError(400, message, "max_completion_tokens", "invalid_value")
    reported: dict[str, object] = {"logprobs": True} if body.logprobs else {}
    if body.top_logprobs is not None:
        reported["top_logprobs"] = body.top_logprobs
    if body.max_completion_tokens is not None:
        reported["max_tokens"] = body.max_completion_tokens
    calls = bool(body.tools) and body.tool_choice != "none"
    form: CallForm = model.calls if config.server.calls == "auto" else config.server.calls
    must_call = forced_calls(body, form)
    template = template_arguments(body.chat_template_kwargs, body.tools if calls else None)
    job = _job(body, [messages_prompt(body.messages)], "messages", reported, config)
    if must_call and job.format_field:
        message = f"{job.format_field} must be left out where tool_choice makes the model call"
        raise ApiError(400, message, job.format_field, "invalid_value")
    requests = tuple(
        replace(request, template=template, sampling={**request.sampling, **must_call})
        for request in job.requests
    )
    return replace(
        job,
        requests=requests,
        format_field="tools" if must_call else job.format_field,
        thoughts=config.server.thoughts,
        calls=form if calls else "none",
    )


def completion_job(body: CompletionRequest, config: Config, decode: Callable[[Sequence[int]], str]) -> Job:
    """decode: tokens as text, for `echo`. Raises ApiError for what is wrong with the body alone."""
    prompts = _prompts(body.prompt)
    reported = {} if body.logprobs is None else {"logprobs": True, "top_logprobs": body.logprobs}
    job = _job(body, prompts, "prompt", reported, config)
    if not body.echo:
        return job
    if body.logprobs is not None:
        message = "echo must come without logprobs: the prompt's tokens have none here"
        raise ApiError(400, message, "echo", "unsupported_parameter")
    texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts]
    return replace(job, echo=tuple(text for text in texts for _ in range(job.num_per_prompt)))


def template_arguments(asked: Mapping[str, Any] | None, tools: Sequence[Tool] | None) -> dict[str, object]:
    """The `template` part of a GenerationRequest. Raises ApiError for tools in the wrong place."""
    arguments = dict(asked or {})
    if "tools" in arguments:
        message = "chat_template_kwargs must be without tools: they have a field of their own"
        raise ApiError(400, message, "chat_template_kwargs", "invalid_value")
    if tools:
        arguments["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return arguments


def messages_prompt(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the engine takes them, and chat templates read them.

    Texts in parts are joined by line feeds, arguments of calls are objects, as vLLM does it. Raises ApiError for
    arguments that are none.
    """
    prompt = []
    for number, message in enumerate(messages):
        fields = message.model_dump(exclude_none=True, include={"role", "content", "name", "tool_call_id"})
        if not isinstance(message.content, str | None):
            fields["content"] = "\n".join(part.text for part in message.content)
        thoughts = message.reasoning_content or message.reasoning
        if thoughts:
            fields["reasoning_content"] = thoughts
        if message.tool_calls:
            # Templates print a content that is not there, or stumble over it.
            fields.setdefault("content", "")
            calls = enumerate(message.tool_calls)
            fields["tool_calls"] = [
                _call(call, f"messages.{number}.tool_calls.{index}") for index, call in calls
            ]
        prompt.append(fields)
    return prompt


def _call(call: ToolCall, field: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{field}.function.arguments"
        raise ApiError(400, f"{field} must be an object in JSON", field, "invalid_value")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) or not prompt:
        return [prompt]
    return list(prompt)


def _job(
    body: Generation,
    prompts: Sequence[Prompt],
    prompt_field: str,
    reported: Mapping[str, object],
    config: Config,
) -> Job:
    num_per_prompt = body.n or 1
    num_choices = num_per_prompt * len(prompts)
    if num_choices > config.server.max_choices:
        raise ApiError(
            400,
            f"n times the number of prompts must be at most {config.server.max_choices} (server.max_choices), "
            f"got {num_choices}",
            "n" if num_per_prompt > 1 else prompt_field,
            "invalid_value",
        )
    stream_options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options must come with stream: true", "stream_options", "invalid_value")
    format_field, wanted = asked_format(body)
    sampling = {**_sampling(body), **reported, **({"structured_outputs": wanted} if wanted else {})}
    asked = Speculative(budget=0) if body.speculative == "off" else body.speculative or Speculative()
    draft, acceptance = _draft(asked), _acceptance(asked)
    requests = [
        GenerationRequest(prompt, _with_seed_of(choice, sampling, config), draft=draft, acceptance=acceptance)
        for prompt in prompts
        for choice in range(num_per_prompt)
    ]
    return Job(
        tuple(requests),
        num_per_prompt,
        prompt_field,
        format_field,
        bool(body.stream),
        stream_options,
        bool(asked.origins),
        user=body.user or "",
    )


def _sampling(body: Generation) -> dict[str, object]:
    sampling = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    if body.logit_bias:
        sampling["logit_bias"] = [(_token_id(key), value) for key, value in body.logit_bias.items()]
    return sampling


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 20):
        raise ApiError(
            400, f"logit_bias must have token ids as keys, got {key[:40]!r}", "logit_bias", "invalid_value"
        )
    return int(key)


def _with_seed_of(choice: int, sampling: Mapping[str, object], config: Config) -> dict[str, object]:
    """The choices of a prompt differ by their seeds, the first has the request's own: as vLLM does it."""
    seed = sampling.get("seed", config.sampling.seed)
    if choice == 0 or not isinstance(seed, int):
        return dict(sampling)
    return {**sampling, "seed": (seed + choice) % _NUM_SEEDS}


def _draft(asked: Speculative) -> dict[str, object]:
    """The `draft` part of a GenerationRequest."""
    methods = [asked.method] if isinstance(asked.method, str) else asked.method
    draft = {"methods": methods, "max_nodes": asked.budget, "max_depth": asked.depth, "tree": asked.tree}
    return {name: value for name, value in draft.items() if value is not None}


def _acceptance(asked: Speculative) -> dict[str, object]:
    """The `acceptance` part of a GenerationRequest."""
    return {name: value for name in _ACCEPTANCE if (value := getattr(asked, name)) is not None}
