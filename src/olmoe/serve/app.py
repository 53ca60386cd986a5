"""The ASGI application: routes, keys, cross-origin rules, errors in one shape, and the OpenAPI description."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import olmoe
from olmoe.serve import chat, completions, messages, responses, tokenization
from olmoe.serve.auth import Auth
from olmoe.serve.endpoint import Endpoint, Receive
from olmoe.serve.errors import ApiError
from olmoe.serve.hosts import Hosts
from olmoe.serve.metrics import CONTENT_TYPE
from olmoe.serve.openapi import describe
from olmoe.serve.protocol import ChatRequest, CompletionRequest
from olmoe.serve.router_policy import described
from olmoe.serve.sse import Send
from olmoe.serve.state import ServerState
from olmoe.serve.static_page import page_routes
from olmoe.serve.tokenization import DetokenizeRequest, TokenizeRequest

ENDPOINTS = (
    Endpoint("/v1/completions", CompletionRequest, completions.create, "Continue texts or token ids."),
    Endpoint("/v1/chat/completions", ChatRequest, chat.create, "Answer a conversation."),
    *responses.ENDPOINTS,
    *messages.ENDPOINTS,
    Endpoint("/tokenize", TokenizeRequest, tokenization.tokenize, "Token ids of a text or a chat.", generates=False),
    Endpoint("/detokenize", DetokenizeRequest, tokenization.detokenize, "The text of token ids.", generates=False),
)

_OPEN = frozenset(("/", "/health", "/ready", "/favicon.ico"))


def is_open(path: str) -> bool:
    """Whether a path needs no key: probes, and the page, which asks the user for one."""
    return path in _OPEN or path.startswith("/page/")


def make_app(state: ServerState) -> Starlette:
    """The application that serves a state."""
    settings = state.settings
    routes: list[BaseRoute] = [
        Route(endpoint.path, _Bound(endpoint, state), methods=["POST"]) for endpoint in ENDPOINTS
    ]
    for path, handler in _READS.items():
        routes.append(Route(path, _reading(handler, state), methods=["GET"]))
    routes.extend(page_routes())
    for (method, path), (action, _, _) in responses.STORED.items():
        routes.append(Route(path, _reading(_on_stored(action), state), methods=[method]))
    middleware = [Middleware(Auth, keys=settings.api_keys, open_paths=is_open, share_prefixes=settings.share_prefixes)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)  # outermost: a browser's preflight request carries no key
    if settings.allowed_hosts:
        middleware.insert(0, Middleware(Hosts, names=settings.allowed_hosts))
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _failure}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Bound:
    """An endpoint bound to a state, as an ASGI application."""

    def __init__(self, endpoint: Endpoint, state: ServerState) -> None:
        self._endpoint, self._state = endpoint, state

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._endpoint.serve(self._state, scope, receive, send)


def _reading(
    handler: Callable[[ServerState, Request], Response], state: ServerState
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return handler(state, request)
        except ApiError as error:
            return JSONResponse(error.body(), error.status, error.headers)

    return answer


def _on_stored(action: responses.StoredAction) -> Callable[[ServerState, Request], Response]:
    """A handler that applies an action to a stored response."""

    def answer(state: ServerState, request: Request) -> Response:
        owner = request.scope.get("olmoe.owner", "")
        return JSONResponse(action(state, request.path_params["id"], request.query_params, owner))

    return answer


# ---- what can be read ----


def _models(state: ServerState, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in (state.model_name, *state.aliases)]})


def _model(state: ServerState, request: Request) -> Response:
    name = request.path_params["name"]
    if not name:
        return _models(state, request)
    state.check_model(name)
    return JSONResponse(_card(state, name))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    config, policy = state.config, state.engine.router_policy
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "olmoe",
        "root": state.model_name,
        "parent": None,
        "max_model_len": state.context_length,
        "olmoe": {
            "layers": config.num_hidden_layers,
            "experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            **({} if policy is None else {"router_policy": described(policy, config)}),
        },
    }


def _health(state: ServerState, request: Request) -> Response:
    """Whether the process still works at all; it does while draining."""
    if state.thread.failed is not None:
        return JSONResponse({"status": "failed", "reason": "The engine has stopped after an error."}, 503)
    return JSONResponse({"status": "ok"})


def _ready(state: ServerState, request: Request) -> Response:
    """Whether new requests should be sent here."""
    if state.thread.failed is not None or state.draining:
        return JSONResponse({"status": "draining" if state.draining else "failed"}, 503, {"Retry-After": "5"})
    return JSONResponse({"status": "ready"})


def _metrics(state: ServerState, request: Request) -> Response:
    return Response(state.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _version(state: ServerState, request: Request) -> Response:
    return JSONResponse({"version": olmoe.__version__})


def _tokenizer_info(state: ServerState, request: Request) -> Response:
    return JSONResponse(tokenization.tokenizer_info(state))


def _description(state: ServerState, request: Request) -> Response:
    stored = {place: (summary, query) for place, (_, summary, query) in responses.STORED.items()}
    description = describe(ENDPOINTS, guarded=bool(state.settings.api_keys), stored=stored)
    return Response(json.dumps(description), media_type="application/json")


_READS: dict[str, Callable[[ServerState, Request], Response]] = {
    "/v1/models": _models,
    "/models": _models,
    "/v1/models/{name:path}": _model,
    "/tokenizer_info": _tokenizer_info,
    "/health": _health,
    "/ready": _ready,
    "/version": _version,
    "/metrics": _metrics,
    "/openapi.json": _description,
}


# ---- errors that are not an endpoint's ----


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        found = ApiError(404, f"There is no {path!r}.")
    elif error.status_code == 405:
        found = ApiError(405, f"{request.method} is not allowed for {path!r}.")
    else:
        found = ApiError(error.status_code, str(error.detail))
    return JSONResponse(_body_of(found, path), found.status, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(_body_of(ApiError(500, "The server failed; its log says why."), request.url.path), 500)


def _body_of(error: ApiError, path: str) -> dict[str, Any]:
    return error.anthropic_body() if path.startswith("/v1/messages") else error.body()
