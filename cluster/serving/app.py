"""The HTTP application: OpenAI's routes over an Engine, and those for probes, metrics and tokens."""

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from outrider import __version__
from outrider.cluster.api import EngineError, ServedModel
from outrider.cluster.serving.errors import ApiError, of_engine, of_validation
from outrider.cluster.serving.gate import App, Gate, extra_headers
from outrider.cluster.serving.jobs import (
    Job,
    chat_job,
    check_model,
    completion_job,
    messages_prompt,
    template_arguments,
)
from outrider.cluster.serving.limits import ApiKeys, choice_places
from outrider.cluster.serving.metrics import ServerMetrics, Stats
from outrider.cluster.serving.page import playground
from outrider.cluster.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from outrider.cluster.serving.response import AnswerResponse
from outrider.cluster.serving.responses import ResponsesWriter
from outrider.cluster.serving.responses_request import ResponsesRequest, responses_job
from outrider.cluster.serving.writers import ChatWriter, CompletionWriter, TokenNames, Writer
from outrider.configs.schema import Config

if TYPE_CHECKING:
    from outrider.cluster.engine import Engine

_CODES = {404: "not_found", 405: "method_not_allowed"}


class ErrorBody(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}, "text/event-stream": {}},
        "description": "One object, or events.",
    }
}


def create_app(engine: "Engine", config: Config) -> App:
    """The server of a deployment that stands.

    Raises ValueError for a file of API keys that cannot be used.
    """
    name = config.server.model_name or config.target.model
    metrics = ServerMetrics(name)
    keys = ApiKeys(config.server.api_keys_file)
    service = _Service(engine, config, engine.describe(), name, metrics)
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="Outrider", docs_url=None, redoc_url=None)
    _add_generation(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    _add_page(app)
    _add_error_handlers(app, config.server.retry_after_s)
    return Gate(app, config.server, keys, metrics)


class _Service:
    """What the routes have in common."""

    def __init__(
        self, engine: "Engine", config: Config, model: ServedModel, name: str, metrics: ServerMetrics
    ) -> None:
        self.engine = engine
        self.config = config
        self.model = model
        self.name = name
        self.metrics = metrics
        self.names = TokenNames(model)
        self.started = int(time.time())
        self._places = choice_places(config.server)

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError for a model that is not the one."""
        check_model(asked, self.name)

    def answer(self, job: Job, writer: Writer) -> Response:
        """The response that runs a job."""
        return AnswerResponse(
            job, writer, self.engine, self._places, self.metrics, self.config.server.max_request_s
        )

    async def tokens(self, body: TokenizeRequest) -> tuple[int, ...]:
        """Raises ApiError for what cannot be tokenized."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "one of prompt and messages must be given", "prompt", "invalid_value")
        field = "prompt" if body.messages is None else "messages"
        template = template_arguments(body.chat_template_kwargs, body.tools)
        prompt: Any = body.prompt if body.messages is None else messages_prompt(body.messages)
        try:
            return await asyncio.to_thread(self.engine.tokenize, prompt, template)
        except (ValueError, EngineError) as error:
            raise of_engine(error, field) from error

    async def stats(self) -> Stats:
        """Of the engine; nothing where it does not answer."""
        try:
            return await asyncio.to_thread(self.engine.stats)
        except EngineError:
            return {}


def _add_generation(app: FastAPI, service: _Service) -> None:
    responses = {**_STREAMED, **_ERRORS}

    @app.post("/v1/chat/completions", responses=responses, response_class=JSONResponse)
    async def chat_completions(body: ChatRequest) -> Response:
        """Continues a conversation."""
        service.check_model(body.model)
        job = chat_job(body, service.config, service.model)
        return service.answer(job, ChatWriter(job, service.name, service.names))

    @app.post("/v1/completions", responses=responses, response_class=JSONResponse)
    async def completions(body: CompletionRequest) -> Response:
        """Continues texts."""
        service.check_model(body.model)
        job = completion_job(body, service.config, service.names.decode)
        return service.answer(job, CompletionWriter(job, service.name, service.names))

    @app.post("/v1/responses", responses=responses, response_class=JSONResponse)
    async def create_response(body: ResponsesRequest) -> Response:
        """Answers items; nothing is stored."""
        service.check_model(body.model)
        job = responses_job(body, service.config, service.model)
        return service.answer(job, ResponsesWriter(body, job, service.name))


def _add_models(app: FastAPI, service: _Service) -> None:
    described = {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "outrider",
        "max_model_len": service.model.max_context,
        "speculative": _speculation(service.config),
    }

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        service.check_model(model)
        return described

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens that a prompt comes to."""
        service.check_model(body.model)
        tokens = await service.tokens(body)
        names = [service.names.name(token) for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": service.model.max_context,
            "tokens": tokens,
            "token_strs": names,
        }

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text that tokens come to; special tokens are written out."""
        service.check_model(body.model)
        num_tokens = len(service.model.vocabulary)
        if body.tokens and max(body.tokens) >= num_tokens:
            raise ApiError(
                400, f"tokens must be below {num_tokens}, got {max(body.tokens)}", "tokens", "invalid_value"
            )
        return {"prompt": service.names.decode(body.tokens)}


def _add_probes(app: FastAPI, service: _Service) -> None:
    @app.get("/health", response_class=PlainTextResponse, responses=_ERRORS)
    async def health() -> str:
        """Whether this process answers. It is well as long as it can serve, also where lost workers are being started
        again: ending it would lose more. A deployment that broke for good stays broken."""
        _require_whole(service)
        return "restarting" if service.engine.restarting else "ok"

    @app.get("/ready", response_class=PlainTextResponse, responses=_ERRORS)
    async def ready() -> str:
        """Whether requests would be run now. While lost workers are started again they are taken, and wait."""
        _require_whole(service)
        if service.engine.restarting:
            raise ApiError(503, f"restarting: {service.engine.restarting}", code="engine_restarting")
        return "ok"

    @app.get("/version", responses=_ERRORS)
    async def version() -> dict[str, str]:
        """Of Outrider."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        content = service.metrics.render(await service.stats())
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI) -> None:
    page = playground()

    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """A page to try the model on."""
        return HTMLResponse(page.content, headers=page.headers)


def _speculation(config: Config) -> dict[str, Any]:
    """What requests may say in `speculative`: the methods and rules that there are, and the bounds of numbers."""
    bounds = config.acceptance
    return {
        "methods": config.draft.methods,
        "max_budget": config.tree.max_nodes,
        "max_depth": config.tree.max_depth,
        "rules": bounds.rules,
        "judges": [judge.name for judge in bounds.judges],
        "min_epsilon": bounds.min_epsilon,
        "min_delta": bounds.min_delta,
        "min_threshold": bounds.min_threshold,
    }


def _require_whole(service: _Service) -> None:
    if service.engine.failure:
        raise ApiError(503, f"the engine cannot be used: {service.engine.failure}", code="engine_unavailable")


def _add_error_handlers(app: FastAPI, retry_after_s: int) -> None:
    def answer(error: ApiError) -> Response:
        # The message may quote half of a surrogate pair, which UTF-8 does not have: escapes do.
        return Response(
            json.dumps(error.body()), error.status, extra_headers(error, retry_after_s), "application/json"
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def bad_request(request: Request, error: RequestValidationError) -> Response:
        return answer(of_validation(error.errors()))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        # A fault of ours at this request; its traceback goes to the log, the next request is another.
        return answer(ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = answer(ApiError(error.status_code, message, code=_CODES.get(error.status_code, "")))
        response.headers.update(error.headers or {})
        return response
