"""Was a whole response right? Graders for `polylogit record`, `train` and `evaluate`, named by `--grader`:

- exact: the response is the row's "answer", but for spaces around it
- numeric[:TOLERANCE]: its last number is the answer's last number (default 1e-6; absolute, or relative above 1)
- regex[:PATTERN]: the pattern, else the row's "pattern", is found in it
- json: it is one JSON text (a code fence around it may be there) that satisfies the row's "schema"
- python[:SECONDS]: its code, the row's "tests" and what these define run to the end in a sandbox (default 10 seconds)
- package.module:function: called with (row, text), returns a number from 0 to 1

Knows nothing of models, files or how responses were made.
"""

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gate.errors import GateError
from gate.evaluation import unit_tests
from gate.evaluation.sandbox import Sandbox, SandboxLimits

Row = Mapping[str, Any]
"""One line of a prompts file."""

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # commas only between groups of three: (3,4) holds two numbers
_NUMBER = re.compile(rf"[-+]?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\r?\n(.*?)(?:\r?\n)?```", re.DOTALL)
_REGEX_SECONDS = 2.0


class GraderError(GateError):
    """A grader cannot be used as asked. The message is one line."""


class Grader(Protocol):
    """Says how right a response is."""

    workers: int
    """How many threads may call it at once."""

    def problem(self, row: Row) -> str | None:
        """Why responses to this row cannot be graded, or None."""

    def __call__(self, row: Row, text: str) -> float:
        """The reward of `text`, 0 to 1."""


def load_grader(spec: str) -> Grader:
    """The grader called `spec`. Raises GraderError."""
    name, _, argument = spec.partition(":")
    match name:
        case "exact" | "json" if not argument:
            return Exact() if name == "exact" else Json()
        case "numeric":
            return Numeric(_positive(spec, argument) if argument else 1e-6)
        case "regex":
            return Regex(argument or None)
        case "python":
            return Python(_positive(spec, argument) if argument else 10.0)
    if not argument:
        raise GraderError(f"--grader {spec}: not exact, numeric, regex, json, python or package.module:function")
    return Imported(spec, name, argument)


class _Answered:
    """Base of graders that compare with the row's answer."""

    workers = 1

    def problem(self, row: Row) -> str | None:
        return None if isinstance(row.get("answer"), str) else 'has no "answer" (a string)'


class Exact(_Answered):
    def __call__(self, row: Row, text: str) -> float:
        return float(text.strip() == row["answer"].strip())


class Numeric(_Answered):
    """`tolerance` is absolute for answers up to 1, relative above."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def problem(self, row: Row) -> str | None:
        return super().problem(row) or (None if _last_number(row["answer"]) is not None else "its answer has no number")

    def __call__(self, row: Row, text: str) -> float:
        found, wanted = _last_number(text), _last_number(row["answer"])
        if found is None or wanted is None:
            return 0.0
        return float(abs(found - wanted) <= self._tolerance * max(1.0, abs(wanted)))


class Regex:
    """`pattern` None: each row has its own. A search that takes longer than two seconds has found nothing."""

    workers = 1

    def __init__(self, pattern: str | None) -> None:
        self._pattern = pattern
        if pattern is not None and (problem := self.problem({})):
            raise GraderError(f"--grader regex: {problem}")

    def problem(self, row: Row) -> str | None:
        import regex

        pattern = self._pattern if self._pattern is not None else row.get("pattern")
        if not isinstance(pattern, str):
            return 'has no "pattern" (a string), and --grader regex:PATTERN gives none'
        try:
            regex.compile(pattern)
        except regex.error as error:
            return f"pattern {pattern[:80]!r}: {error}"
        return None

    def __call__(self, row: Row, text: str) -> float:
        import regex

        pattern = self._pattern if self._pattern is not None else row["pattern"]
        try:
            return float(regex.search(pattern, text, timeout=_REGEX_SECONDS) is not None)
        except TimeoutError:
            return 0.0


class Json:
    workers = 1

    def problem(self, row: Row) -> str | None:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for

        if (schema := row.get("schema")) is None:
            return None
        try:
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            return f"its schema is not a JSON schema: {error.message[:80]}"
        return None

    def __call__(self, row: Row, text: str) -> float:
        from jsonschema.validators import validator_for

        fenced = _FENCE.fullmatch(text.strip())
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_no_json)
        except (ValueError, RecursionError):
            return 0.0
        if (schema := row.get("schema")) is None:
            return 1.0
        return float(validator_for(schema)(schema).is_valid(value))


class Python:
    """The first fenced block of a response is its code; without one, all of it."""

    workers = os.cpu_count() or 1

    def __init__(self, seconds: float) -> None:
        self._sandbox = Sandbox(SandboxLimits(seconds=seconds))
        self.isolation = self._sandbox.isolation.name

    def problem(self, row: Row) -> str | None:
        tests = row.get("tests")
        lines: list[Any] = tests if isinstance(tests, list) else [tests]
        if not all(isinstance(line, str) for line in lines) or not "".join(lines).strip():
            return 'has no "tests" (Python code, or a list of it)'
        return unit_tests.problem("\n".join(lines))

    def __call__(self, row: Row, text: str) -> float:
        fenced = _FENCE.search(text)
        tests = row["tests"] if isinstance(row["tests"], str) else "\n".join(row["tests"])
        return float(self._sandbox.passes(fenced[1] if fenced else text, tests))


class Imported:
    """A function of the user's own, found from the current directory or among what is installed."""

    workers = 1

    def __init__(self, spec: str, module: str, name: str) -> None:
        self._spec = spec
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        try:
            self._function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise GraderError(f"--grader {spec}: {error}") from None
        if not callable(self._function):
            raise GraderError(f"--grader {spec}: not a function")

    def problem(self, row: Row) -> str | None:
        return None

    def __call__(self, row: Row, text: str) -> float:
        """Raises GraderError if the function fails or returns anything but a number from 0 to 1."""
        try:
            reward = float(self._function(row, text))
        except Exception as error:
            raise GraderError(f"--grader {self._spec}: {type(error).__name__}: {error}") from error
        if not 0.0 <= reward <= 1.0:
            raise GraderError(f"--grader {self._spec}: returned {reward}, not a number from 0 to 1")
        return reward


def _no_json(constant: str) -> None:
    """Python's parser takes NaN and Infinity; JSON has neither."""
    raise ValueError(constant)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    value = float(found[-1].replace(",", "")) if found else None
    return value if value is not None and math.isfinite(value) else None


def _positive(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise GraderError(f"--grader {spec}: {text!r} is not a number above 0")
    return value
