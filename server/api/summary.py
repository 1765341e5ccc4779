"""What is known of one request when it has ended, for its log line and its span: counts and names, no text, no key."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.types import Scope

from server.api.protocol import GenerationRequest
from server.errors import RequestError


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of one request, as OpenAI counts them."""

    prompt_tokens: int
    """Of all its prompts. A prompt counts once, however many choices it has."""
    completion_tokens: int
    """Of all its choices."""
    cached_tokens: int | None = None
    """Prompt tokens that were found in the prefix cache; None where that is not said."""


@dataclass(slots=True)
class RequestSummary:
    """Filled in while the request goes its way."""

    request: GenerationRequest | None = None
    """The request, for its parameters; there once it was accepted for generation."""
    model: str | None = None
    """The model name; there once the request was accepted for generation."""
    usage: Usage | None = None
    """There once generation has ended."""
    finish_reasons: list[str] = field(default_factory=list)
    """Of the choices that have ended."""
    error: str | None = None
    """Why there is no complete answer."""
    error_type: str | None = None
    """The error's code, or its type."""
    failed: bool = False
    """Whether the server is to blame for `error`."""

    def note_error(self, error: RequestError) -> None:
        """Messages of refusals may quote the request: of these only the code is kept."""
        self.failed = error.status >= 500
        self.error_type = error.code or error.type
        self.error = error.message if self.failed else self.error_type


def summary_of(scope: Scope) -> RequestSummary:
    """The summary of the request that `scope` belongs to."""
    summary = scope["state"]["summary"]
    assert isinstance(summary, RequestSummary)
    return summary
