"""The generated reference: whatever a deployment or a client may write down is in it, with a description."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml
from pydantic import BaseModel

from docs import reference
from server.api import protocol
from server.cli import main
from server.config import Config, parse_config
from server.policy import Policy
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
POLICIES = {kind.__struct_config__.tag: kind for kind in typing.get_args(Policy)}
EXAMPLE = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return reference.filled((DOCS / name).read_text(encoding="utf-8"))


def described(text: str) -> dict[str, str]:
    """Anchor -> description, of the definitions in a page."""
    return dict(re.findall(r"^`[^`]+`\{ #(\S+) \} <small>.*</small>\n:   (.*)$", text, re.MULTILINE))


def keys(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """The anchors of every key of a configuration file."""
    for field in msgspec.structs.fields(kind):
        if (kind, field.name) == (Config, "directory"):
            continue
        yield prefix + field.name
        inner = [part for part in (field.type, *typing.get_args(field.type)) if isinstance(part, type)]
        nested = [part for part in inner if issubclass(part, msgspec.Struct)]
        listed = [part for listed in typing.get_args(field.type) for part in typing.get_args(listed)]
        nested += [part for part in listed if isinstance(part, type) and issubclass(part, msgspec.Struct)]
        if field.name != "policies":
            for struct in nested:
                yield from keys(struct, f"{prefix}{field.name}.")


def test_every_key_of_the_configuration_is_described() -> None:
    found = described(page("configuration.md"))
    assert {*keys(Config)} == {*found}
    assert {"limits.queue", "experts.dtype", "gate.sha256", "http.port", "tracing.endpoint"} <= {*found}
    assert all(text.endswith((".", "`")) or len(text) > 20 for text in found.values())


def test_types_limits_and_defaults_are_those_of_the_schema() -> None:
    kinds = {entry.name: entry.kind for section in reference.configuration() for entry in section.entries}
    assert kinds["limits.kv_watermark"] == "number, at least 0, below 1 · default `0.05`"
    assert kinds["http.port"] == "integer, 0 to 65535 · default `8000`"
    assert kinds["experts"] == "list of [objects](#of-expertconfig) · required"
    assert kinds["experts[].dtype"] == '`"auto"`, `"bfloat16"`, `"float16"` or `"float32"` · default `"auto"`'
    kinds = {
        entry.anchor: entry.kind for entries in reference.parameters(reference.openapi()).values() for entry in entries
    }
    assert kinds["GenerationRequest.top_p"] == "number, above 0, at most 1 · default `1.0`"
    assert kinds["GenerationRequest.priority"] == "integer, -2^20 to 2^20 · default `0`"
    assert kinds["CompletionRequest.prompt"].endswith("· required")


def test_every_parameter_of_a_request_is_described() -> None:
    found = described(page("http-api.md"))
    bodies = [
        value for value in vars(protocol).values() if isinstance(value, type) and issubclass(value, protocol.Body)
    ]
    names = {anchor.rpartition(".")[2] for anchor in found}
    for body in bodies:
        for name, field in body.model_fields.items():
            assert (field.alias or name) in names, (body, name)
    assert all(found.values())
    assert len({anchor for anchor in found if anchor.startswith("GenerationRequest.")}) == len(
        protocol.GenerationRequest.model_fields
    )


def test_openapi_says_what_the_pages_say() -> None:
    schemas = reference.openapi()["components"]["schemas"]
    for name, schema in schemas.items():
        kind = getattr(protocol, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert all(value.get("description") for value in schema["properties"].values()), name


def test_every_endpoint_is_described() -> None:
    found = reference.endpoints(reference.openapi())
    assert len(found) == 11 and all(endpoint.description for endpoint in found)
    text = page("http-api.md")
    assert all(f"`{endpoint.method} {endpoint.path}`" in text for endpoint in found)


@pytest.mark.parametrize("rule", POLICIES)
def test_every_policy_has_its_section_its_parameters_and_an_example_that_is_valid(rule: str) -> None:
    text = page("policies.md")
    section = re.search(rf"^## {rule}\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    assert section and f"[`{rule}`](#{rule})" in text
    fields = {field.name for field in msgspec.structs.fields(POLICIES[rule])}
    found = described(section[1])
    assert {*found} == {f"{rule}.{name}" for name in fields} and all(found.values())
    data = yaml.safe_load("".join(EXAMPLE.findall(section[1])))
    names = ("math", "text", "code", "general", "large", "small", "small-tuned", "router")
    experts = [{"name": name, "model": name} for name in names]
    first = next(iter(data["policies"]))
    config = parse_config({"name": "n", "experts": experts, "default_policy": first, **data}, directory=Path())
    assert isinstance(config.policies[first], POLICIES[rule])


def test_every_command_has_its_section_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    names = re.findall(r"^    ([a-z]+)\b", capsys.readouterr().out, re.MULTILINE)
    text = page("commands.md")
    assert len(names) >= 10
    assert names and all(f"## {name}\n" in text and f"usage: polylogit {name} " in text for name in names)


def test_a_page_cannot_ask_for_what_does_not_exist() -> None:
    with pytest.raises(KeyError):
        reference.filled("[reference: nothing](nowhere)")
