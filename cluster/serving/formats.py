"""What an answer must be, in the words of clients: OpenAI's `response_format`, vLLM's `structured_outputs`, and the
`guided_...` fields that vLLM had before."""

from collections.abc import Mapping
from typing import Any

from outrider.cluster.serving.errors import ApiError
from outrider.cluster.serving.protocol import Generation, JsonSchemaFormat, TextFormat

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def asked_format(body: Generation) -> tuple[str, dict[str, Any]]:
    """The field that says it, and `sampling.structured_outputs` as the engine takes it; two empty ones where any
    answer will do. Raises ApiError where several fields say it."""
    found: dict[str, dict[str, Any]] = {}
    if body.structured_outputs is not None:
        found["structured_outputs"] = body.structured_outputs.model_dump(exclude_none=True, by_alias=True)
    for field, kind in _GUIDED.items():
        value = getattr(body, field)
        if value is not None:
            found[field] = {kind: value}
    if body.response_format is not None and not isinstance(body.response_format, TextFormat):
        found["response_format"] = of_format(body.response_format)
    if len(found) > 1:
        first, second, *_ = found
        raise ApiError(400, f"{second} must be left out where there is {first}", second, "invalid_value")
    return next(iter(found.items()), ("", {}))


def of_format(asked: Any) -> dict[str, Any]:
    """Of `response_format`, other than text."""
    if isinstance(asked, JsonSchemaFormat):
        # A schema that is not there says what no schema says: anything in JSON.
        schema: Mapping[str, Any] = asked.json_schema.schema_ or {}
        return {"json": dict(schema)}
    return {"json_object": True}
