"""What clients send: OpenAI's fields, vLLM's where OpenAI has none, and `speculative`, which is ours.

A field that is not here is refused by its name, and so is a value of a field that this server does not follow; ranges
are the engine's business. None means the same as leaving a field out.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Wire(BaseModel):
    """An object in a request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Only:
    """Marks a field of which nothing but what changes nothing is taken."""

    def __init__(self, *allowed: object) -> None:
        self._allowed = allowed

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._allowed]}

    def _check(self, value: object) -> object:
        if value is None or any(value == known and type(value) is type(known) for known in self._allowed):
            return value
        shown = "".join(f", or send {json.dumps(known)}" for known in self._allowed)
        raise PydanticCustomError(
            "unsupported", "not supported by this server: leave it out{shown}", {"shown": shown}
        )


class TextPart(Wire):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Wire):
    """What a model called."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(Wire):
    """A call in a message of the model's."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Function(Wire):
    """What a model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Where the model must call, arguments are as the schema says, strict or not."""


class Tool(Wire):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    """The name of a function."""

    name: str


class NamedTool(Wire):
    """The one that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Message(Wire):
    """One message of a conversation. The engine says which fields the model's chat template can take."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
    # As an answer of OpenAI's comes back in the next request.
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None


class StreamOptions(Wire):
    """What a stream says besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


class Speculative(Wire):
    """How an answer is drafted, and by which rule drafted tokens are accepted. The text depends on the rule alone."""

    method: str | list[str] | None = None
    """Draft methods, some of the deployment's."""

    budget: int | None = None
    """Most drafted tokens per round; 0: plain decoding."""

    depth: int | None = None
    """Longest drafted path, in tokens."""

    rule: Literal["exact", "typical", "judge"] | None = None
    """By which drafted tokens are accepted; the deployment says which of them it allows."""

    epsilon: float | None = None
    delta: float | None = None
    """Of rule `typical`."""

    judge: str | None = None
    threshold: float | None = None
    """Of rule `judge`."""

    origins: bool | None = None
    """Whether the answer says of each token who chose it, and of each text who completed it."""

    tree: bool | None = None
    """Whether the answer says which tree its last round verified, and a stream that of every round."""


class TextFormat(Wire):
    """Any answer."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """An object in JSON."""

    type: Literal["json_object"]


class NamedSchema(Wire):
    """A JSON schema. It is followed to the letter, strict or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Wire):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Wire):
    """What an answer must be: exactly one of the first five, as vLLM has it."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    """A JSON schema."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """Lark, or EBNF as llama.cpp has it (GBNF)."""
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    """Of JSON: none between its parts, or what this matches."""
    disable_additional_properties: Annotated[Any, Only(False)] = None
    structural_tag: Annotated[Any, Only()] = None


class Generation(Wire):
    """What all requests for text have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = None
    speculative: Literal["off"] | Speculative | None = None
    user: str | None = None
    """Goes into the server's log."""

    min_tokens: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    """The last four as vLLM had them: parts of `structured_outputs`."""

    skip_special_tokens: Annotated[Any, Only(True)] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    length_penalty: Annotated[Any, Only(1.0, 1)] = None
    prompt_logprobs: Annotated[Any, Only()] = None
    priority: Annotated[Any, Only(0)] = None


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the model's chat template, such as enable_thinking."""

    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none")] = None
    chat_template: Annotated[Any, Only()] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    echo: Annotated[Any, Only(False)] = None
    reasoning_effort: Annotated[Any, Only()] = None
    verbosity: Annotated[Any, Only()] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    metadata: Annotated[Any, Only({})] = None


class CompletionRequest(Generation):
    """Body of /v1/completions."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1)] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: Annotated[Any, Only(1)] = None
    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: Annotated[Any, Only(True)] = None


class DetokenizeRequest(Wire):
    """Body of /detokenize: token ids."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class TokenizeRequest(Wire):
    """Body of /tokenize: a text, or messages that go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    add_special_tokens: Annotated[Any, Only(True)] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
