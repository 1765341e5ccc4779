"""Every error polylogit raises on purpose, as one tree.

    PolylogitError
    ├── StartError                    the deployment cannot start; printed as one line, exit code 1
    │   └── ConfigError               ... because the configuration file is wrong
    ├── EngineError                   an expert's engine broke a promise (worker side)
    ├── ServerAway                    a running server cannot be read (`polylogit top`)
    ├── UnreachableError              an expert on another host cannot be reached, or a coordinator was not let in
    └── RequestError                  a request cannot be answered; carries its HTTP status and OpenAI `type`
        ├── BadRequest            400 invalid_request_error
        ├── Unauthorized          401 authentication_error
        ├── NotFound              404 not_found_error
        ├── BodyTooLarge          413 invalid_request_error
        ├── RateLimited           429 rate_limit_error        (this key runs or starts too many)
        ├── Overloaded            503 overloaded_error        (queue full, draining, not ready)
        └── GenerationFailed      500 server_error            (an expert or the gate was lost on the way)

This module knows nothing of HTTP frameworks; `server.api` turns a `RequestError` into a response.
"""

from __future__ import annotations


class PolylogitError(Exception):
    """Base of the tree."""


class StartError(PolylogitError):
    """The deployment cannot start. The message is one line a person can act on."""


class ConfigError(StartError):
    """The configuration file is wrong. The message names the key."""


class EngineError(PolylogitError):
    """An engine broke a promise of the engine protocol."""


class ServerAway(PolylogitError):
    """A running server cannot be read. `lasting`: trying again will not help."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class UnreachableError(PolylogitError):
    """Two hosts did not come together. `final`: trying again is of no use until somebody mends a configuration."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class RequestError(PolylogitError):
    """A request cannot be answered.

    `param` is the request field at fault, `code` a short machine-readable word; both as in OpenAI's error object.
    """

    status: int = 500
    type: str = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class BadRequest(RequestError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(RequestError):
    status = 401
    type = "authentication_error"


class NotFound(RequestError):
    status = 404
    type = "not_found_error"


class BodyTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"


class RateLimited(RequestError):
    """`retry_after` is in seconds, for the Retry-After header."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class Overloaded(RequestError):
    """`retry_after` is in seconds, for the Retry-After header."""

    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after


class GenerationFailed(RequestError):
    status = 500
    type = "server_error"
