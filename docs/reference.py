"""The generated parts of the documentation: the configuration's keys, the HTTP API, the policies and the commands, from
the types that the server itself reads them with. A page says `[reference: NAME](SOURCE)` where one belongs.

Types, limits and defaults come from the types' JSON schemas; what a field means is the docstring under it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from server.api.app import create_app
from server.api.protocol import GenerationRequest
from server.cli import main
from server.config import Config, load_config
from server.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
_INT64 = 2**63 - 1
_NOT_KEYS = {"Config": {"directory"}}
"""Fields of the configuration's structs that are not keys of the file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key or parameter, as a definition list shows it."""

    anchor: str
    """Where a link to it leads: `limits.sequences`."""
    name: str
    """As it is written."""
    kind: str
    """Its type and limits, in words."""
    description: str
    """What it means."""

    def markdown(self) -> str:
        body = textwrap.indent(self.description, "    ").strip()
        return f"`{self.name}`{{ #{self.anchor} }} <small>{self.kind}</small>\n:   {body}\n"


def field_docs(kind: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line. Of `kind` itself, not of its bases."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_docstring(below):
            docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs


def _is_docstring(statement: ast.stmt) -> typing.TypeGuard[ast.Expr]:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one struct."""

    key: str
    """Where it stands in the file: `limits`, `experts[]`, or "" for the top level."""
    kind: type
    entries: list[Entry]


def configuration() -> list[Section]:
    """Every key of a configuration file."""
    schemas = msgspec.json.schema(Config)["$defs"]
    structs = {kind.__name__: kind for kind in _structs(Config)}
    found = [("", "Config"), *_sections(schemas["Config"], structs)]
    return [Section(key, structs[name], _keys(key, structs[name], schemas[name])) for key, name in found]


def _keys(section: str, kind: type, schema: dict[str, Any]) -> list[Entry]:
    docs, prefix = field_docs(kind), f"{section}." if section else ""
    return [
        Entry(
            f"{prefix}{key}".replace("[]", ""),
            f"{prefix}{key}",
            _unnamed(described(value, required=key in schema.get("required", []))),
            docs.get(key, ""),
        )
        for key, value in schema["properties"].items()
        if key not in _NOT_KEYS.get(kind.__name__, ())
    ]


def _unnamed(kind: str) -> str:
    """The file's sections have their keys for names, not the structs'."""
    return re.sub(r"(list of )?\[`\w+`\]", lambda link: "list of [objects]" if link[1] else "[object]", kind)


def _structs(kind: Any) -> Iterator[type]:
    """The structs that `kind` is made of, but the policies."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from _structs(field.type)
    elif kind is not Policy:
        for part in typing.get_args(kind):
            yield from _structs(part)


def _sections(schema: dict[str, Any], structs: dict[str, type]) -> Iterator[tuple[str, str]]:
    """(key, struct) of the keys that hold structs; `[]` after the key where they are a list."""
    for key, value in schema["properties"].items():
        for part in _alternatives(value):
            if (name := _target(part)) in structs:
                yield key, name
            elif (name := _target(part.get("items", {}))) in structs:
                yield f"{key}[]", name


# --- HTTP API ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    description: str
    bodies: list[str]
    """Names of the objects that its body may be."""


def openapi() -> dict[str, Any]:
    """What a server of the demo answers at /openapi.json."""
    app = create_app(load_config(ROOT / "deploy" / "demo" / "polylogit.yaml"), typing.cast(Any, None))
    return app.openapi()


def endpoints(api: dict[str, Any]) -> list[Endpoint]:
    """Every endpoint, in the order of the routes."""
    return [
        Endpoint(method.upper(), path, " ".join(operation.get("description", "").split()), list(_bodies(operation)))
        for path, methods in api["paths"].items()
        for method, operation in methods.items()
    ]


def _bodies(operation: dict[str, Any]) -> Iterator[str]:
    content = operation.get("requestBody", {}).get("content", {})
    for part in _alternatives(content.get("application/json", {}).get("schema", {})):
        if name := _target(part):
            yield name


def parameters(api: dict[str, Any]) -> dict[str, list[Entry]]:
    """Object -> its fields, of all that the endpoints' bodies are and are made of, outermost first."""
    schemas = api["components"]["schemas"]
    names = dict.fromkeys(name for endpoint in endpoints(api) for name in endpoint.bodies)
    found: dict[str, list[Entry]] = {}
    while names:
        name = next(iter(names))
        del names[name]
        schema = schemas[name]
        required = schema.get("required", [])
        found[name] = [
            Entry(f"{name}.{key}", key, described(value, required=key in required), value.get("description", ""))
            for key, value in schema["properties"].items()
        ]
        names |= dict.fromkeys(inner for inner in _references(schema["properties"]) if inner not in found)
    return _shared_once(found)


def _shared_once(found: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The fields that both kinds of completion have stand once, after those that only one has."""
    shared = GenerationRequest.model_fields
    split: dict[str, list[Entry]] = {}
    for name, entries in found.items():
        if name not in ("ChatRequest", "CompletionRequest"):
            split[name] = entries
            continue
        split[name] = [entry for entry in entries if entry.name not in shared]
        if name == "CompletionRequest":
            both = "GenerationRequest"
            common = [entry for entry in entries if entry.name in shared]
            split[both] = [replace(entry, anchor=f"{both}.{entry.name}") for entry in common]
    return split


def _references(schema: Any) -> Iterator[str]:
    """Names of the objects that a schema refers to."""
    if isinstance(schema, dict):
        if name := _target(schema):
            yield name
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


# --- policies ---------------------------------------------------------------------------------------------------------


def policies() -> dict[str, tuple[str, list[Entry]]]:
    """Rule -> what it does, and its parameters."""
    found: dict[str, tuple[str, list[Entry]]] = {}
    for kind in typing.get_args(Policy):
        schema, docs = msgspec.json.schema(kind)["$defs"][kind.__name__], field_docs(kind)
        [rule] = schema["properties"]["rule"]["enum"]
        found[rule] = (
            " ".join(inspect.cleandoc(kind.__doc__ or "").split()),
            [
                Entry(f"{rule}.{key}", key, described(value, required=key in schema["required"]), docs.get(key, ""))
                for key, value in schema["properties"].items()
                if key != "rule"
            ],
        )
    return found


# --- types in words ---------------------------------------------------------------------------------------------------


def described(schema: dict[str, Any], *, required: bool) -> str:
    """Type, limits, and default: "integer, at least 1 · default `64`"."""
    words = _words(schema)
    if required:
        return f"{words} · required"
    default = schema.get("default")
    if default is None or isinstance(default, dict) or default == []:  # said by the description, or nothing to say
        return words
    return f"{words} · default `{json.dumps(default)}`"


def _words(schema: dict[str, Any]) -> str:
    """A JSON schema as a reader would say it."""
    parts = _alternatives(schema)
    if len(parts) > 1:
        return _either(list(dict.fromkeys(_words(part) for part in parts)))
    [part] = parts or [{}]
    if name := _target(part):
        return f"[`{name}`](#of-{name.lower()})"
    if "enum" in part or "const" in part:
        return _either([f"`{json.dumps(value)}`" for value in part.get("enum", [part.get("const")])])
    kind = part.get("type", "null")
    if kind == "array":
        plural = {"string": "strings", "integer": "integers", "object": "objects"}
        items, comma, limits = _words(part.get("items") or {"type": "anything"}).partition(",")
        return f"list of {plural.get(items, items)}{comma}{limits}"
    if kind == "object" and isinstance(part.get("additionalProperties"), dict):
        return "object"
    return ", ".join([kind, *_limits(part)])


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    sayings = {"minimum": "at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below", "maximum": "at most"}
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and abs(low) < _INT64 and high < _INT64:
        yield f"{low:,} to {high:,}" if abs(high) < 10_000 else f"{_short(low)} to {_short(high)}"
        return
    for key, saying in sayings.items():
        if (value := schema.get(key)) is not None and abs(value) < _INT64:
            yield f"{saying} {_short(value)}"


def _short(number: float) -> str:
    """Powers of two as such."""
    whole = int(number)
    for value, text in ((abs(whole), ""), (abs(whole) + 1, " - 1")):
        if whole == number and value >= 1 << 20 and value & (value - 1) == 0:
            return f"{'-' if whole < 0 else ''}2^{value.bit_length() - 1}{text}"
    return f"{number:g}" if isinstance(number, float) else str(number)


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What `schema` allows, but null."""
    parts = schema.get("anyOf") or schema.get("allOf") or [schema]
    return [part for part in parts if part.get("type") != "null" or len(parts) == 1]


def _target(schema: dict[str, Any]) -> str:
    """The name that a reference leads to, or ""."""
    return str(schema.get("$ref", "")).rpartition("/")[2]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def configuration_markdown() -> str:
    return "\n".join(
        (f"### `{section.key}` {{ #of-{section.kind.__name__.lower()} }}" if section.key else "### Top level")
        + f"\n\n{inspect.cleandoc(section.kind.__doc__ or '')}\n\n"
        + "\n".join(entry.markdown() for entry in section.entries)
        for section in configuration()
    )


def endpoints_markdown() -> str:
    rows = [
        f"| `{endpoint.method} {endpoint.path}` | {endpoint.description} | "
        + " or ".join(f"[`{name}`](#of-{name.lower()})" for name in endpoint.bodies)
        + " |"
        for endpoint in endpoints(openapi())
    ]
    return "\n".join(["| endpoint | what it does | body |", "| --- | --- | --- |", *rows])


def parameters_markdown() -> str:
    api = openapi()
    schemas = api["components"]["schemas"]
    titles = {
        "ChatRequest": "Chat completions",
        "CompletionRequest": "Text completions",
        "GenerationRequest": "Both kinds of completion",
    }
    parts: list[str] = []
    for name, entries in parameters(api).items():
        about = " ".join((schemas.get(name) or {}).get("description", "").split())
        parts += [f"### {titles.get(name, f'`{name}`')} {{ #of-{name.lower()} }}", about]
        if name in ("ChatRequest", "CompletionRequest"):
            parts.append("And what [both kinds of completion](#of-generationrequest) have.")
        parts += [entry.markdown() for entry in entries]
    return "\n\n".join(parts)


def policy_markdown(rule: str) -> str:
    _, entries = policies()[rule]
    return "\n".join(entry.markdown() for entry in entries) or "No parameters."


def command_markdown(command: str) -> str:
    """What `polylogit COMMAND --help` prints."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="88", NO_COLOR="1"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([command, "--help"])
    return f"```text\n{printed.getvalue().strip()}\n```"


_PARTS: dict[str, Callable[..., str]] = {
    "configuration": configuration_markdown,
    "endpoints": endpoints_markdown,
    "parameters": parameters_markdown,
    "policy": policy_markdown,
    "command": command_markdown,
}
_MARK = re.compile(r"^\[reference: (\w+) ?(\w*)[^]]*\]\([^)]*\)$", re.MULTILINE)
"""Where a part belongs. Read as it is, it is a link to the types."""


def filled(page: str) -> str:
    """A page with its generated parts. Raises KeyError where it asks for one that does not exist."""
    return _MARK.sub(lambda mark: _PARTS[mark[1]](*filter(None, [mark[2]])), page)
