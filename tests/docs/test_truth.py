"""What the documents name is there: files, modules, commands and their options; and the README stays short."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.cli import main
from server.config import parse_config
from tests.support.paths import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name / "README.md" for name in ("deploy", "deploy/demo", "deploy/smollm2", "gate")),
]
FOLDERS = "server|gate|deploy|docs|docker|tests"
MADE_BY_THE_READER = ("deploy/secrets", "deploy/.env")


def ids(value: object) -> str | None:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_files_and_modules_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*[\w/]", text))
    missing = {name for name in named if not (ROOT / name).exists() and not name.startswith(MADE_BY_THE_READER)}
    assert not missing
    commands = set(re.findall(rf"python -m ((?:{FOLDERS})[\w.]+\w)", text))
    assert not {name for name in commands if importlib.util.find_spec(name) is None}


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.parent.name != "docs"], ids=ids)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """Those within docs/ are held by `mkdocs build --strict`."""
    links = re.findall(
        r"\]\(([^)#:\s]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", document.read_text(encoding="utf-8")
    )
    assert not [link for pair in links for link in pair if link and not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_configurations_that_a_document_shows_are_valid(document: Path) -> None:
    for block in re.findall(
        r"^```yaml[^\n]*\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        data = None if block.startswith("--8<--") else yaml.safe_load(block)
        if data and "experts" in data:
            parse_config({"name": "n", **data}, directory=Path())


def test_modules_that_the_architecture_calls_by_their_last_name_exist() -> None:
    names = set(re.findall(r"`([a-z_]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")))
    assert names and not [name for name in names if not (ROOT / "server" / "coordinator" / name).exists()]


def commands() -> Iterator[tuple[str, str]]:
    """(command, option) of each `polylogit COMMAND ... --option` in a code block or in code."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for code in re.findall(r"^```[^\n]*\n(.*?)^```|`([^`]*)`", text, re.DOTALL | re.MULTILINE):
            for line in "\n".join(code).splitlines():
                for command, rest in re.findall(r"(?:^|[ `])polylogit ([a-z]+)((?: [^|&;#]*)?)", line):
                    yield from ((command, option) for option in re.findall(r"(?<=\s)(--[a-z-]+)", rest) or [""])


def test_commands_and_options_that_documents_show_exist(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, set[str]] = {}
    for command, option in commands():
        shown.setdefault(command, set()).add(option)
    assert {"serve", "check", "record", "train", "evaluate", "report", "explain", "bench", "top", "expert"} <= {*shown}
    for command, options in shown.items():
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0, command
        text = capsys.readouterr().out
        assert not [option for option in options if option not in text], command


def test_the_readme_and_the_architecture_stay_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_each_public_field_has_a_line_under_it() -> None:
    """As CONTRIBUTING states: of dataclasses, structs, messages, tuples and pydantic's models."""
    bare = []
    for path in (path for folder in ("server", "gate") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and _has_fields(node):
                bare += [f"{path.name}: {node.name}.{field}" for field in _fields_without_a_line(node)]
    assert not bare


def _has_fields(node: ast.ClassDef) -> bool:
    kinds = [ast.unparse(kind) for kind in (*node.decorator_list, *node.bases)]
    return any(word in kind for kind in kinds for word in ("dataclass", "Struct", "Message", "NamedTuple", "Body"))


def _fields_without_a_line(node: ast.ClassDef) -> Iterator[str]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            value = following.value if isinstance(following, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                yield ast.unparse(statement.target)


def test_code_keeps_to_the_lengths_that_contributing_states() -> None:
    for path in (path for folder in ("server", "gate", "deploy", "docs") for path in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)
