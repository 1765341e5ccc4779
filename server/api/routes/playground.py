"""GET /: a page to try the deployment and watch it think, as static files without a build step.

The files are open, as they say nothing of the deployment; what does (`/playground/deployment`) needs the key. The
content security policy lets the page run its own scripts and talk to this server, and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.http.responses import json_response
from server.config import Config

_FOLDER = Path(__file__).parent.parent / "static"
_INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "cache-control": "no-cache",  # ask whether it changed: a page of another version than its server would mislead
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file of the page, read once."""

    body: bytes
    """Its content."""
    media_type: str
    """Its content-type header."""
    tag: str
    """An ETag: it changes with the body."""

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        body = path.read_bytes()
        return cls(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """The file, or 304 if the client has it. The server leaves out the body of an answer to HEAD."""
        headers = {**_HEADERS, "etag": self.tag}
        known = request.headers.get("if-none-match", "")
        if self.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def playground_routes(config: Config) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = {path.name: StaticFile.read(path) for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return files[_INDEX].response(request)

    @router.get("/playground/deployment")
    async def deployment() -> Response:
        return json_response(about(config))

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        if name not in files or name == _INDEX:
            raise HTTPException(404)
        return files[name].response(request)

    return router


def needs_no_key(path: str, method: str) -> bool:
    """Whether a path is one of the page's own files, which need no key."""
    return method in ("GET", "HEAD") and (
        path == "/" or (path.startswith("/playground/") and Path(path).suffix in _TYPES)
    )


def about(config: Config) -> dict[str, object]:
    """What the page offers to choose from."""
    return {
        "name": config.name,
        "default_policy": config.default_policy,
        "policies": list(config.policies),
        "experts": config.expert_names,
        "examples": [config.example_prompt, *config.examples],
    }
