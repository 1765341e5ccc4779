"""What /openapi.json says about bodies and errors; the handlers read bodies themselves (`server.api.http.body`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.text.conversation import Body


class ErrorInfo(BaseModel):
    """OpenAI's error object."""

    message: str
    """One line for a person."""
    type: str
    """The kind of error, as OpenAI names them."""
    param: str | None
    """The request's field that is wrong."""
    code: str | None
    """A short word for programs."""


class ErrorResponse(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorInfo


_WHY = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid key.",
    404: "No such model.",
    413: "The body is too long.",
    415: "The body is compressed or not JSON.",
    429: "This key runs or starts too many requests; see Retry-After.",
    500: "An expert or the gate was lost on the way.",
    503: "Not ready, draining or the queue is full; see Retry-After.",
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; as server-sent events with `stream`."}
}

ANYWHERE = (400, 413, 415)  # what the server says of a request before it looks at what it is for
READING = (*ANYWHERE, 401, 404)
POSTING = (*READING, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declared error responses: JSON, whatever a route else answers with."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorResponse.__name__}"}}}
    return {status: {"content": content, "description": _WHY[status]} for status in sorted(statuses)}


def body_of(*models: type[Body], examples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The declared body of a route whose handler parses it. `examples`: name -> body."""
    references = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": shown}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, *bodies: type[Body]) -> None:
    """Make `app.openapi` include the schemas of `bodies` and of errors."""
    models: tuple[type[BaseModel], ...] = (*bodies, ErrorResponse)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema(
                [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            _drop_validation_errors(schema)
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _drop_validation_errors(schema: dict[str, Any]) -> None:
    """FastAPI declares a 422 for every parameter; here a wrong one is a 400."""
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
