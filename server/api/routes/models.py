"""GET /v1/models: the deployment under its default policy, its other policies, and every expert alone."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from server.api.http.openapi import READING, error_responses
from server.api.http.responses import json_response
from server.text.deployment import Deployment

_OWNER = "polylogit"


def model_routes(deployment: Deployment) -> APIRouter:
    router = APIRouter(tags=["models"], responses=error_responses(*READING))
    created = int(time.time())

    @router.get("/v1/models")
    async def list_models() -> Response:
        """All that may be asked for: the deployment, its policies, each expert alone."""
        cards = [_model_card(deployment, name, created) for name in deployment.models]
        return json_response({"object": "list", "data": cards})

    @router.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        return json_response(_model_card(deployment, model, created))

    return router


def _model_card(deployment: Deployment, name: str, created: int) -> dict[str, Any]:
    """Raises NotFound."""
    ensemble = deployment.ensemble(name)
    root = deployment.config.name
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": _OWNER,
        "root": root,
        "parent": None if name == root else root,
        "max_model_len": ensemble.max_model_len,
        "permission": [],
    }
