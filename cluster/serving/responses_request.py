"""What clients send to OpenAI's /v1/responses, and the job that it comes to.

Source of the form: https://platform.openai.com/docs/api-reference/responses
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from outrider.cluster.api import ServedModel
from outrider.cluster.serving.jobs import Job, chat_job
from outrider.cluster.serving.protocol import (
    ChatRequest,
    Function,
    FunctionCall,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedFunction,
    NamedSchema,
    NamedTool,
    Only,
    Speculative,
    TextFormat,
    TextPart,
    Tool,
    ToolCall,
    Wire,
)
from outrider.configs.schema import Config


class InputText(Wire):
    """A part of a message."""

    type: Literal["input_text", "output_text"]
    text: str
    # As an answer comes back.
    annotations: Annotated[Any, Only([])] = None
    logprobs: Annotated[Any, Only([])] = None


class InputMessage(Wire):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    # As an answer comes back.
    id: str | None = None
    status: str | None = None


class CallItem(Wire):
    """A call of a tool that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    # As an answer comes back.
    id: str | None = None
    status: str | None = None


class CallOutput(Wire):
    """What a tool said."""

    type: Literal["function_call_output"]
    call_id: str
    output: str
    id: str | None = None
    status: str | None = None


class ThoughtText(Wire):
    """A part of thoughts."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtsItem(Wire):
    """Thoughts of the model."""

    type: Literal["reasoning"]
    content: list[ThoughtText]
    summary: Annotated[Any, Only([])] = None
    encrypted_content: Annotated[Any, Only()] = None
    id: str | None = None
    status: str | None = None


class FunctionTool(Wire):
    """What a model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Wire):
    """The one that must be called."""

    type: Literal["function"]
    name: str


class SchemaFormat(Wire):
    """JSON that a schema describes; followed to the letter, strict or not."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextOptions(Wire):
    """What the text of an answer must be."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Any, Only()] = None


InputItem = InputMessage | CallItem | CallOutput | ThoughtsItem


class ResponsesSpeculative(Speculative):
    """As elsewhere, but that OpenAI's answer has no place for what `origins` and `tree` tell."""

    origins: Annotated[Any, Only(False)] = None
    tree: Annotated[Any, Only(False)] = None


class ResponsesRequest(Wire):
    """Body of /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    """Comes back in the answer."""
    seed: int | None = None
    speculative: Literal["off"] | ResponsesSpeculative | None = None

    store: Annotated[Any, Only(False)] = None
    previous_response_id: Annotated[Any, Only()] = None
    conversation: Annotated[Any, Only()] = None
    background: Annotated[Any, Only(False)] = None
    include: Annotated[Any, Only([])] = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[Any, Only()] = None
    text: TextOptions | None = None
    reasoning: Annotated[Any, Only({})] = None
    truncation: Annotated[Any, Only("disabled")] = None
    top_logprobs: Annotated[Any, Only(0)] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    stream_options: Annotated[Any, Only({}, {"include_obfuscation": False})] = None


def responses_job(body: ResponsesRequest, config: Config, model: ServedModel) -> Job:
    """Raises ApiError for what is wrong with the body alone."""
    items: Sequence[InputItem] = (
        [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    )
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages += _messages(items)
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)))
        for tool in body.tools or ()
    ]
    response_format = _chat_format(body.text.format if body.text else None)
    chat = ChatRequest(
        messages=messages,
        stream=body.stream,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        user=body.user,
        speculative=body.speculative,
        tools=tools,
        tool_choice=(
            NamedTool(type="function", function=NamedFunction(name=body.tool_choice.name))
            if isinstance(body.tool_choice, NamedFunctionTool)
            else body.tool_choice
        ),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=response_format,
    )
    job = chat_job(chat, config, model)
    fields = {"response_format": "text.format", "tools": "tools", "": ""}
    return replace(job, prompt_field="input", format_field=fields[job.format_field])


def _chat_format(
    wanted: TextFormat | JsonObjectFormat | SchemaFormat | None,
) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    """As /v1/chat/completions has it."""
    if not isinstance(wanted, SchemaFormat):
        return wanted
    schema = NamedSchema.model_validate({"name": wanted.name, "schema": wanted.schema_})
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """Thoughts, text and calls of the model that follow each other are one message, as chat templates have it."""
    messages: list[Message] = []
    for item in items:
        match item:
            case CallOutput():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case InputMessage() if item.role != "assistant":
                messages.append(Message(role=item.role, content=_content(item.content)))
            case _:
                said = (
                    messages[-1]
                    if messages and messages[-1].role == "assistant"
                    else Message(role="assistant")
                )
                if not messages or said is not messages[-1]:
                    messages.append(said)
                _add_to(said, item)
    return messages


def _add_to(said: Message, item: InputItem) -> None:
    if isinstance(item, CallItem):
        function = FunctionCall(name=item.name, arguments=item.arguments)
        said.tool_calls = [*(said.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
    elif isinstance(item, ThoughtsItem):
        thoughts = "".join(part.text for part in item.content)
        said.reasoning_content = (said.reasoning_content or "") + thoughts
    elif isinstance(item, InputMessage):
        added = _content(item.content)
        texts = [part.text for part in added] if isinstance(added, list) else [added]
        before = [said.content] if isinstance(said.content, str) else []
        said.content = "\n".join([*before, *texts])


def _content(content: str | list[InputText]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=part.text) for part in content]
