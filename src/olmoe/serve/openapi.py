"""/openapi.json: the routes, with schemas from the models that check the bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

import olmoe
from olmoe.serve.endpoint import Endpoint

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_READS = {
    "/v1/models": "The model that is served, with the length of its context.",
    "/models": "The same, for clients that leave out the version.",
    "/tokenizer_info": "Special tokens and the chat template.",
    "/health": "Whether the engine runs.",
    "/ready": "Whether new requests should be sent here.",
    "/version": "The version of the package.",
    "/metrics": "Metrics for Prometheus.",
}


def describe(
    endpoints: Sequence[Endpoint],
    *,
    guarded: bool,
    stored: Mapping[tuple[str, str], tuple[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The OpenAPI description of a server. `guarded` says whether keys are needed.

    `stored` maps method and path of the actions on something with an `{id}` to a summary and schemas of the query.
    """
    models = list(dict.fromkeys(endpoint.model for endpoint in endpoints))
    names, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = {**definitions.get("$defs", {}), "Error": _ERROR}
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ref("Error")}}}
        for status, text in (
            (400, "A mistake in the request."),
            (401, "The key is missing or wrong."),
            (404, "There is no such model."),
            (408, "The body did not arrive in time."),
            (413, "The body is too large."),
            (415, "The body is not JSON."),
            (503, "Too many requests are waiting already, or the server is shutting down."),
        )
    }
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        schema = names[(endpoint.model, "validation")]
        content = {"application/json": {"schema": {"type": "object"}}}
        if endpoint.generates:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[endpoint.path] = {
            "post": {
                "summary": endpoint.summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer.", "content": content}, **errors},
            }
        }
    for path, summary in _READS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        ok = {"description": "The answer.", "content": {kind: {}}}
        answers: dict[str, Any] = {
            "200": ok,
            "401": errors["401"],
            "503": {"description": "Not now.", "content": {kind: {}}},
        }
        paths[path] = {"get": {"summary": summary, "responses": answers}}
    for (method, path), (summary, query) in (stored or {}).items():
        parameters: list[dict[str, Any]] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
            *({"name": name, "in": "query", "schema": schema} for name, schema in query.items()),
        ]
        answers = {"200": {"description": "The answer.", "content": {"application/json": {}}}}
        answers |= {status: errors[status] for status in ("400", "401", "404")}
        paths.setdefault(path, {})[method.lower()] = {
            "summary": summary,
            "parameters": parameters,
            "responses": answers,
        }
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "olmoe serve", "version": olmoe.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if guarded:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
