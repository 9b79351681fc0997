"""The application: routes, and what stands before them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tarsia.core.errors import ServeError, TarsiaError
from tarsia.serve import wire
from tarsia.serve.http import chat, loading, models, schema
from tarsia.serve.http.answers import ChatAnswer, ErrorAnswer, Health, ModelFacts, ModelList
from tarsia.serve.http.document import document, page
from tarsia.serve.http.errors import Refusal, shown
from tarsia.serve.http.gate import Gate, ticket
from tarsia.serve.http.limits import Admission
from tarsia.serve.http.logs import Journal, user_digest
from tarsia.serve.http.metrics import Metrics
from tarsia.serve.http.remote import Fetcher
from tarsia.serve.http.running import Gone, Run, unless_gone, unready
from tarsia.serve.http.service import Service
from tarsia.serve.http.settings import Settings
from tarsia.serve.http.strict import read

_Responses = dict[int | str, dict[str, Any]]

_TEXTS: Final = {
    400: "The request makes no sense; the message says what was given, what is allowed and what to do.",
    401: "No key, or none that is known.",
    403: "The key may not do this.",
    404: "There is no such model for this key.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is no JSON by its media type.",
    421: "The server is not called what the Host header says.",
    429: "Too often, too much or too many at once: Retry-After says when to come again.",
    500: "The server's own fault.",
    503: "The worker starts, starts again or stops, or connections are too many: Retry-After says when to come again.",
    504: "The answer took too long.",
}


def _errors(*statuses: int) -> _Responses:
    return {status: {"model": ErrorAnswer, "description": _TEXTS[status]} for status in (400, 421, 500, 503, *statuses)}


_ANSWERS: Final = (
    "The answers, or a stream of them: `ChatChunk` events and `[DONE]`; an error object and no `[DONE]` where they "
    "were lost."
)
_TEXT: Final = {"type": "string"}
_KEYED: Final = (401, 404, 429)
_BODY: Final = (408, 413, 415)


@dataclass(eq=False)
class Server:
    """All that the routes use."""

    service: Service
    settings: Settings
    journal: Journal
    admission: Admission = field(init=False)
    metrics: Metrics = field(init=False)
    fetcher: Fetcher = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.limits)
        self.metrics = Metrics(self.settings.counted, lambda: self.service.stats, lambda: self.service.restarts)
        self.fetcher = Fetcher(self.settings.remote, self.settings.limits)
        self._base: str | None = None
        self._hidden: set[str] = set()

    @property
    def base(self) -> str | None:
        """What the base is asked for by; kept while a worker starts again."""
        self._base = models.base_name(self.settings.name, self.service.ready) or self._base
        return self._base

    async def models(self) -> Sequence[wire.Model]:
        """What may be asked for; the log tells of adapters that have come, and that their names do not lead to.

        Raises Refusal.
        """
        if (refusal := unready(self.service)) is not None:
            raise refusal
        try:
            found = await self.service.models()
        except ServeError as error:
            raise unready(self.service) or Refusal.of(error) from None
        hidden = set(models.hidden(found, self.base))
        for name in hidden - self._hidden:
            do = models.unreached(name, self.base)
            self.journal.write("hidden", {"level": "warning", "adapter": name, "do": do})
        self._hidden = hidden
        return found


def app(service: Service, settings: Settings, journal: Journal | None = None) -> ASGIApp:
    """The application that answers for ``service``; one line a request goes to ``journal`` (standard error)."""
    server = Server(service, settings, journal or Journal())
    inner = FastAPI(
        title="Tarsia", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="One base that serves adapters of any kind; OpenAI's chat completions.",
    )  # fmt: skip
    inner.state.server = server
    inner.include_router(_ROUTES)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        ticket(request.scope).facts.setdefault("code", error.code)
        return error.response

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code if error.status_code in (404, 405) else 400
        what = "There is nothing here." if status != 405 else "This is not done here."
        do = "GET /docs says what there is" if settings.docs else "see docs/serving.md"
        told = TarsiaError(what, given=f"{request.method} {shown(request.url.path)}", do=do)
        refusal = Refusal(status, told, code="not_found" if status == 404 else "method_not_allowed")
        response = refusal.response
        response.headers.update(error.headers or {})
        return response

    inner.add_exception_handler(Refusal, refused)
    inner.add_exception_handler(HTTPException, unrouted)
    if settings.docs:
        told = document(inner)
        shown_page = page(told)

        async def openapi() -> Response:
            return JSONResponse(told)

        async def docs() -> Response:
            return HTMLResponse(shown_page)

        inner.add_api_route("/openapi.json", openapi, include_in_schema=False)
        inner.add_api_route("/docs", docs, include_in_schema=False)
    return Gate(inner, settings, server.admission, server.metrics, server.journal)


_ROUTES = APIRouter()


def _server(request: Request) -> Server:
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


def _body(model: str) -> dict[str, Any]:
    ref = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref}}}}


@_ROUTES.post(
    "/v1/chat/completions",
    summary="Answer a chat",
    response_model=None,
    openapi_extra=_body("ChatRequest"),
    responses={
        200: {"model": ChatAnswer, "description": _ANSWERS, "content": {"text/event-stream": {"schema": _TEXT}}},
        **_errors(*_KEYED, *_BODY, 403, 504),
    },
)  # fmt: skip
async def completions(request: Request) -> Response:
    """OpenAI's chat completions; ``model`` is the base, an adapter, an alias, or ``auto``."""
    server, held = _server(request), ticket(request.scope)
    limits = server.settings.limits
    body = await read(request, schema.ChatRequest, limits)
    chat.check(body, limits)
    held.facts.update(stream=bool(body.stream), user=user_digest(body.user))
    if (waiting := unready(server.service)) is not None:
        raise waiting
    ready = server.service.ready
    routed = ready is not None and ready.router
    wanted = models.asked(body.model, server.base, held.key, routed=routed)
    choices = body.n or 1
    sampling = chat.sampling(body, server.admission.most(held.key, choices))
    seat = server.admission.seat(held.key, (sampling.max_tokens or sampling.at_most or 0) * choices)
    run = Run(held, wanted, seat, server.metrics, limits.seconds, choices)
    command = wire.Generate(
        id=held.id, messages=chat.messages(body), adapter=wanted.adapter, sampling=sampling,
        tenant=held.key.tenant, weight=held.key.weight, seconds=limits.seconds,
        may=None if held.key.unbounded else tuple(held.key.adapters), base=held.key.base,
    )  # fmt: skip
    streamed = False
    try:
        started = await unless_gone(request.receive, _begin(server, run, body, command))
        body = body.model_copy(update={"messages": []})  # pictures are not kept until the answer
        held.share.leave()
        if body.stream:
            streamed = True
            return Events(chat.Chunks(run, started, body), chat.headers(started), limits.write_seconds)
        answer = await unless_gone(request.receive, chat.whole(run, started, body))
        return JSONResponse(answer.model_dump(), headers=chat.headers(started))
    except Gone:
        held.facts["status"] = 499
        return Response(status_code=400)  # that nobody reads
    except Refusal as refusal:
        run.failed(refusal)
        raise
    finally:
        if not streamed:
            run.close()


async def _begin(server: Server, run: Run, body: schema.ChatRequest, command: wire.Generate) -> wire.Started:
    pictures = await chat.pictures(body, server.settings.limits, server.fetcher, run.ticket.share)
    if pictures and server.service.ready is not None and not server.service.ready.pictures:
        raise Refusal.invalid("This base does not see: it takes no pictures.", "messages", given=len(pictures))
    return await run.begin(server.service, command, pictures)


class Events(Response):
    """A stream of server-sent events that ends with its client, or with a client that does not read."""

    media_type = "text/event-stream"

    def __init__(self, chunks: chat.Chunks, headers: dict[str, str], write_seconds: float) -> None:
        super().__init__(headers={**headers, "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._seconds = chunks, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, stream())
        except Gone:
            ticket(scope).facts["status"] = 499
        finally:
            self._chunks.run.close()


@_ROUTES.get("/v1/models", summary="What this key may ask for", responses=_errors(*_KEYED))
async def list_models(request: Request) -> ModelList:
    """The base and the adapters of the library that this key may use, each as its current version, and aliases."""
    server = _server(request)
    return models.listed(await server.models(), server.base, server.service.ready, ticket(request.scope).key)


@_ROUTES.get("/v1/models/{model:path}", summary="One of them", responses=_errors(*_KEYED))
async def one_model(request: Request, model: str) -> ModelFacts:
    """By its name, or by name@version or name#hash where that is what the name means now."""
    return models.find(await list_models(request), model)


@_ROUTES.post(
    "/v1/load_lora_adapter",
    summary="Serve an adapter under a name",
    response_class=PlainTextResponse,
    openapi_extra=_body("LoadRequest"),
    responses=_errors(*_KEYED, *_BODY, 403, 504),
)
async def load(request: Request) -> PlainTextResponse:
    """vLLM's; off unless the server's owner allows it, and then for keys of administrators."""
    server, key = _server(request), ticket(request.scope).key
    loading.permitted(server.settings, key)
    body = await read(request, schema.LoadRequest, server.settings.limits)
    name = loading.alias(body.lora_name, server.base)
    source = loading.source(body.lora_path, server.settings.sources, key)
    loading.free(name, await server.models(), replace=body.load_inplace)
    try:
        await server.service.load(name, source)
    except ServeError as error:
        if error.kind == "unknown_adapter":
            raise Refusal.no_source(body.lora_path) from None
        raise unready(server.service) or Refusal.of(error) from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@_ROUTES.post(
    "/v1/unload_lora_adapter",
    summary="Serve a name no more",
    response_class=PlainTextResponse,
    openapi_extra=_body("UnloadRequest"),
    responses=_errors(*_KEYED, *_BODY, 403, 504),
)
async def unload(request: Request) -> PlainTextResponse:
    """vLLM's; adapters of the library are withdrawn with ``tarsia library``, not here."""
    server, key = _server(request), ticket(request.scope).key
    loading.permitted(server.settings, key)
    body = await read(request, schema.UnloadRequest, server.settings.limits)
    held = {model.name: model.source is not None for model in await server.models() if key.may(model.name)}
    if not held.get(body.lora_name):
        what = "The lora adapter cannot be found: it is the library's, and was not loaded by request."
        what = what if body.lora_name in held else "The lora adapter cannot be found."
        error = TarsiaError(what, given=shown(body.lora_name), allowed="names that were loaded")
        raise Refusal(404, error, code="model_not_found", param="lora_name")
    try:
        await server.service.unload(body.lora_name)
    except ServeError as error:
        raise unready(server.service) or Refusal.of(error) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@_ROUTES.get("/health", summary="Whether the server is alive", responses=_errors())
async def health() -> Health:
    """It answers, so it is."""
    return Health(status="ok")


@_ROUTES.get("/ready", summary="Whether requests are taken", responses=_errors())
async def ready(request: Request) -> Health:
    """The worker has its base and takes requests."""
    if (refusal := unready(_server(request).service)) is not None:
        raise refusal
    return Health(status="ready")


@_ROUTES.get("/metrics", summary="Prometheus", response_class=PlainTextResponse, responses=_errors(401, 403, 429))
async def metrics(request: Request) -> Response:
    """Names of adapters are in here: where there are keys, it is for those of administrators."""
    if not ticket(request.scope).key.admin:
        raise Refusal(403, "This key may not see metrics.", code="permission_denied")
    return Response(_server(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)
