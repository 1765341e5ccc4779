"""What is known of one request when it has ended, for its log line and its span: counts and names, no text, no key."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from server.api.completions.shapes import Usage
from server.api.protocol import GenerationRequest
from server.errors import RequestError


@dataclass(slots=True)
class Account:
    """`request` (for its parameters) and `model` are there once it was accepted for generation, `usage` once that has
    ended. `error`: why there is no whole answer; `failed`: the server is to blame."""

    model: str | None = None
    usage: Usage | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    error_type: str | None = None
    request: GenerationRequest | None = None
    failed: bool = False

    def note_error(self, error: RequestError) -> None:
        """Messages of refusals may quote the request: of these only the code is kept."""
        self.failed = error.status >= 500
        self.error_type = error.code or error.type
        self.error = error.message if self.failed else self.error_type


def account_of(scope: Scope) -> Account:
    """The account of the request that `scope` belongs to."""
    account = scope["state"]["account"]
    assert isinstance(account, Account)
    return account
