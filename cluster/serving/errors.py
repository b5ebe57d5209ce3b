"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the field that is to blame."""

import re
from collections.abc import Sequence
from typing import Any

from outrider.cluster.api import EngineError, OverloadedError

# Where clients name what the engine calls otherwise.
_FIELDS = {
    "draft.methods": "speculative.method",
    "draft.max_nodes": "speculative.budget",
    "draft.max_depth": "speculative.depth",
    "template.tools": "tools",
    "template": "chat_template_kwargs",
}
_SECTIONS = {"sampling": "", "acceptance": "speculative.", "template": "chat_template_kwargs."}
# Fields of requests, not those of the configuration that messages name beside them.
_ENGINE_FIELD = re.compile(
    r"\b(?:sampling\.[a-z_]+|draft\.(?:methods|max_nodes|max_depth)|template\.[a-z_]+"
    r"|acceptance\.(?:rule|epsilon|delta|judge|threshold))\b|^template\b"
)
_FORMAT = "sampling.structured_outputs"
_FORMAT_PART = re.compile(r"sampling\.structured_outputs(?:\.\w+)?")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_NAME = re.compile(r"[a-z_][a-z0-9_]*|\d+")
_TYPE_TAGS = {"str", "int", "float", "bool", "dict", "list", "none", "tuple", "constrained", "lax", "strict"}


class ApiError(Exception):
    """A request that ends with this answer.

    status: of HTTP. param: the field that is to blame, empty where none is. code: for programs.
    """

    def __init__(self, status: int, message: str, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """As clients read it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param or None,
                "code": self.code or None,
            }
        }


def of_engine(error: Exception, prompt_field: str, format_field: str = "") -> ApiError:
    """What the engine says about a request, in the client's words.

    prompt_field: what the client calls its prompt, `messages` or `prompt`. format_field: by which it said what an
    answer must be.
    """
    if isinstance(error, OverloadedError):
        return overloaded(str(error))
    if isinstance(error, EngineError):
        return ApiError(503, f"the engine cannot be used: {error}", code="engine_unavailable")
    assert isinstance(error, ValueError), error
    message = _ENGINE_FIELD.sub(lambda match: _client_field(match[0]), str(error))
    found = _ENGINE_FIELD.search(str(error))
    if format_field and found and found[0] == _FORMAT:
        message = _FORMAT_PART.sub(format_field, str(error), count=1)
        return ApiError(400, message, format_field, "invalid_value")
    too_long = re.match(r"prompt (and|must be at most)", message)
    if too_long:
        return ApiError(400, message, prompt_field, "context_length_exceeded")
    return ApiError(400, message, _client_field(found[0]) if found else prompt_field, "invalid_value")


def overloaded(message: str) -> ApiError:
    """Too much is under way; the client may come again."""
    return ApiError(429, message, code="rate_limit_exceeded")


def of_validation(errors: Sequence[Any]) -> ApiError:
    """What pydantic found in a body: the deepest of its complaints, since those of other branches of a union are
    about something else. `errors`: as its `errors()` gives them."""
    deepest = max(errors, key=lambda error: len(_path(error["loc"])))
    param = ".".join(_path(deepest["loc"]))
    if deepest["type"] == "json_invalid":
        return ApiError(400, "the body must be JSON", code="invalid_json")
    if deepest["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown field {param}: this server would ignore it", param, "unknown_parameter"
        )
    if deepest["type"] == "missing":
        return ApiError(400, f"{param or 'body'} is required", param, "missing_required_parameter")
    same = [error for error in errors if ".".join(_path(error["loc"])) == param]
    reasons = dict.fromkeys(_lower(error["msg"]) for error in same)
    message = f"{param or 'the body'}: {', or '.join(reasons)}"
    code = "unsupported_parameter" if deepest["type"] == "unsupported" else "invalid_value"
    return ApiError(400, message, param, code)


def _path(location: Sequence[str | int]) -> list[str]:
    """Names and indices of the body's fields; pydantic's names of branches of unions are left out."""
    names = [str(part) for part in location if part != "body"]
    return [name for name in names if name.isdecimal() or (_NAME.fullmatch(name) and name not in _TYPE_TAGS)]


def _client_field(field: str) -> str:
    if field in _FIELDS:
        return _FIELDS[field]
    section, _, name = field.partition(".")
    return _SECTIONS[section] + name


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
