"""Whether a model must call a tool, and which: `tool_choice` as sampling options."""

from typing import Any

from outrider.cluster.api import CallForm
from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.protocol import ChatRequest, NamedTool


def forced_calls(body: ChatRequest, form: CallForm) -> dict[str, Any]:
    """`structured_outputs` by which the model calls; empty where it may do without.

    Raises ApiError, naming the field, for what cannot be had.
    """
    tools, choice = body.tools or [], body.tool_choice
    if choice in ("none", "auto", None):
        _refuse_promises(body)
        return {}
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
    if not functions:
        message = "tool_choice must be none or auto, or name a tool, where it is not among tools"
        raise ApiError(400, message, "tool_choice", "invalid_value")
    parallel = choice == "required" and body.parallel_tool_calls is not False
    asked = [{"name": function.name, "parameters": function.parameters or {}} for function in functions]
    return {"structured_outputs": {"calls": {"form": form, "functions": asked, "parallel": parallel}}}


def _refuse_promises(body: ChatRequest) -> None:
    """What only masks can promise, where there are none."""
    if not body.tools or body.tool_choice == "none":
        return
    if body.parallel_tool_calls is False:
        message = (
            "parallel_tool_calls must be true unless tool_choice makes the model call: it may call several"
        )
        raise ApiError(400, message, "parallel_tool_calls", "unsupported_parameter")
    for number, tool in enumerate(body.tools):
        if tool.function.strict:
            field = f"tools.{number}.function.strict"
            message = f"{field} must be false unless tool_choice makes the model call"
            raise ApiError(400, message, field, "unsupported_parameter")
