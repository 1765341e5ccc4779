"""Log lines: for people (text), or one JSON object a line. Every process of a deployment writes the same form, with its
name; what libraries write past `logging` (C++, progress bars) is wrapped by the supervisor, so that JSON stays JSON.

A line written while a request is served carries its id. Nothing here or elsewhere logs prompts, answers or keys.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import msgspec

from server.config import LoggingConfig

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this task serves."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What the command line says of log lines, before the command."""

    log_level: Literal["debug", "info", "warning", "error"] | None = None
    """Log lines of at least this level (default: logging.level of the configuration)."""
    log_format: Literal["text", "json"] | None = None
    """Form of log lines and errors (default: logging.format of the configuration)."""

    def over(self, configured: LoggingConfig) -> LoggingConfig:
        """As `configured`, or as the command line says."""
        return LoggingConfig(self.log_format or configured.format, self.log_level or configured.level)


def configure(logging_config: LoggingConfig, process: str) -> None:
    """Have this process log to stderr, in this way instead of an earlier one. What it calls itself is `process`."""
    handler = _ToStderr()
    handler.setFormatter(JsonLines(process) if logging_config.format == "json" else TextLines(process))
    root = logging.getLogger()
    for earlier in [each for each in root.handlers if isinstance(each, _ToStderr)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # libraries: what goes wrong
    logging.getLogger("polylogit").setLevel(logging_config.level.upper())


def in_json() -> bool:
    """Whether this process logs JSON lines."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def fields(**values: Any) -> dict[str, Any]:
    """`log.info(message, extra=fields(name=value))`: values beside the message. None is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, request_id, the line's own fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextLines(logging.Formatter):
    """Time, level, process, message, and the fields as name=value."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        values = "".join(f" {name}={value}" for name, value in _fields(record).items())
        text = f"{when}.{record.msecs:03.0f} {record.levelname} {self._process}: {record.getMessage()}{values}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    request_id = REQUEST_ID.get()
    return ({"request_id": request_id} if request_id else {}) | getattr(record, "fields", {})


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def write_into(output: Connection) -> None:
    """Send all that this process writes, in whatever language, into `output`."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output.fileno(), stream.fileno())
    output.close()


def relay(source: Connection, process: str) -> threading.Thread:
    """Write the lines of `source` to stderr until it is closed: JSON as it is, anything else wrapped."""
    thread = threading.Thread(target=_relay, args=(source, process), name=f"output of {process}", daemon=True)
    thread.start()
    return thread


def _relay(source: Connection, process: str) -> None:
    with source, os.fdopen(os.dup(source.fileno()), "rb") as lines:
        for line in lines:
            if text := line.strip():
                with contextlib.suppress(OSError):  # nobody reads: the process must not wait for it
                    os.write(sys.stderr.fileno(), (text if _is_json(text) else _wrapped(text, process)) + b"\n")


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def _wrapped(line: bytes, process: str) -> bytes:
    text = line.decode(errors="replace")
    return msgspec.json.encode(
        {"time": _utc(time.time()), "level": "warning", "process": process, "logger": "output", "message": text}
    )
