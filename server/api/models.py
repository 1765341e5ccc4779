"""GET /v1/models: the deployment under its default policy, its other policies, and every expert alone."""

from __future__ import annotations

from typing import Any

from server.text.deployment import Deployment

_OWNER = "polylogit"


def model_list(deployment: Deployment, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_card(deployment, name, created) for name in deployment.models]}


def model_card(deployment: Deployment, name: str, created: int) -> dict[str, Any]:
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
