"""Cross-origin requests, for the origins of the configuration: SDKs in browsers send headers of their own, so that any
header is allowed."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.api.http.errors import error_object
from server.errors import BadRequest


class Cors(CORSMiddleware):
    """Stands before everything else: preflights carry no key."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """A refusal is an error object, as everywhere."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        fault = BadRequest(bytes(response.body).decode())
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return Response(error_object(fault), response.status_code, headers, media_type="application/json")
