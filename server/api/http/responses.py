"""Responses with a JSON body, encoded by msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response


def json_response(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
