"""Errors as OpenAI's error object: for a response, for an event in a stream, and for whatever a handler raises."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.summary import summary_of
from server.errors import GenerationFailed, Overloaded, RateLimited, RequestError

_MAX_CHARACTERS = 16_000
_log = logging.getLogger("polylogit.api")


class UnsupportedMedia(RequestError):
    """The body is compressed or not JSON."""

    status = 415
    type = "invalid_request_error"


class ClientGone(Exception):
    """The client left or no longer reads: nothing can be sent, nothing is wrong."""


def internal_error() -> GenerationFailed:
    """Log the exception that is being handled; what the client may know of it."""
    _log.exception("failed")
    return GenerationFailed("an internal error; look for the request id in the server's log")


def error_object(error: RequestError) -> bytes:
    return _encode(error.message, error.type, error.param, error.code)


def error_event(error: RequestError) -> bytes:
    """The error as a server-sent event."""
    return b"data: " + error_object(error) + b"\n\n"


def error_response(error: RequestError) -> Response:
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, Overloaded | RateLimited) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_object(error), error.status, headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Every error that a route raises leaves as an error object."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_request_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    summary_of(request.scope).note_error(error)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body = _encode(_sentence(request, error), kind, None, None)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _sentence(request: Request, error: HTTPException) -> str:
    path = request.url.path[:200]
    match error.status_code:
        case 404:
            return f"{path} does not exist"
        case 405:
            return f"{request.method[:16]} is not allowed on {path}"
    return str(error.detail) or HTTPStatus(error.status_code).phrase


def _encode(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    message = message[:_MAX_CHARACTERS].encode("utf-8", errors="replace").decode()
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
