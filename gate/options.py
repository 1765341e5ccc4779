"""Command lines from dataclasses: an option for each field, its help the docstring below the field.

`max_tokens: int = 256` is `--max-tokens N`, `once: bool = False` the flag `--once`, `models: tuple[str, ...]` takes one
value or more; a field without a default is required. A field that is itself such a dataclass is a group of options.
What a type does not say stands in `Annotated`: `Positional`, `Metavar`, `Output`, `Each`, or a function that parses the
text and raises ArgumentTypeError.
"""

import argparse
import ast
import inspect
import itertools
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from gate.errors import GateError


class Options(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Options)
Parsed = TypeVar("Parsed")


class OptionsError(ValueError):
    """Options that do not go together; raised by the dataclass itself, after its fields are set, or by the command."""


class OutputError(GateError):
    """What a command is to write cannot be written."""


@dataclass(frozen=True, slots=True)
class Positional:
    """The argument is given by its place."""

    metavar: str
    """What help calls it."""


@dataclass(frozen=True, slots=True)
class Metavar:
    """The option's value has a name of its own in help."""

    metavar: str
    """That name."""


@dataclass(frozen=True, slots=True)
class Each:
    """What parses each of a tuple's values."""

    parse: Callable[[str], Any]
    """Raises ArgumentTypeError."""


@dataclass(frozen=True, slots=True)
class Output:
    """The command writes this: `check_outputs` refuses it before the work if that cannot be."""

    folder: bool = False
    """It is a folder, not a file."""


@dataclass(frozen=True, slots=True)
class _Field:
    """One field as the command line sees it."""

    name: str
    """Of the field."""
    type: Any
    """Without Annotated and None."""
    marks: tuple[Any, ...]
    """What stands beside the type in Annotated."""
    default: Any
    """MISSING if the argument is required."""
    help: str
    """The docstring below the field, on one line and without a full stop."""

    def mark(self, kind: type[Parsed]) -> Parsed | None:
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def parse(self) -> Callable[[str], Any] | None:
        """The function that reads the whole text, if one is given."""
        return next((mark for mark in self.marks if isinstance(mark, types.FunctionType)), None)


def fill(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Add an argument for each field of `options`. Every one needs a docstring."""
    for field in _fields(options):
        if is_dataclass(field.type):
            fill(parser.add_argument_group(field.help), field.type)  # type: ignore[arg-type]
        else:
            names, settings = _argument(field)
            parser.add_argument(*names, **settings)


def made(options: type[T], values: Mapping[str, Any]) -> T:
    """`options` from what `fill`'s parser found; fields that were not given keep their defaults. May raise what the
    dataclass raises."""
    given: dict[str, Any] = {}
    for field in _fields(options):
        if is_dataclass(field.type):
            given[field.name] = made(field.type, values)  # type: ignore[arg-type]
        elif field.name in values:
            value = values[field.name]
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return options(**given)


def check_outputs(options: Options) -> None:
    """Raises OutputError if a file or folder that `options` name to be written cannot be."""
    for field in _fields(type(options)):
        path, output = getattr(options, field.name), field.mark(Output)
        if output is None or path is None:
            continue
        try:
            problem = _unwritable(path, output)
        except OSError as error:  # a folder above it may not be entered, a name is too long
            problem = error.strerror
        if problem:
            raise OutputError(f"{_option(field)}: {path} cannot be written: {problem}")


def run_module(
    program: str, description: str | None, options: type[T], run: Callable[[T], None], arguments: list[str] | None
) -> None:
    """The whole of a module's command line, `python -m PROGRAM`. A GateError ends it with code 1 and its message."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fill(parser, options)
    values = vars(parser.parse_args(arguments))
    try:
        chosen = made(options, values)
        check_outputs(chosen)
        run(chosen)
    except OptionsError as error:
        parser.error(str(error))
    except GateError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def whole(least: int | None = None) -> Callable[[str], int]:
    """Parses a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return parse


def number(least: float = float("-inf"), most: float = float("inf")) -> Callable[[str], float]:
    """Parses a number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}")
        return value

    return parse


def port(text: str) -> int:
    """Parses a TCP port; 0 stands for a free one."""
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to 65535")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Parses names with commas between them; perhaps none."""
    return tuple(name for name in text.split(",") if name)


def commas(parse: Callable[[str], Parsed]) -> Callable[[str], tuple[Parsed, ...]]:
    """Parses values with commas between them, at least one."""

    def parse_all(text: str) -> tuple[Parsed, ...]:
        return tuple(parse(part) for part in text.split(","))

    return parse_all


def _fields(options: type[Options]) -> Iterator[_Field]:
    hints, helps = get_type_hints(options, include_extras=True), _docstrings(options)
    for field in fields(options):
        hint, marks = hints[field.name], list[Any]()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        if get_origin(hint) in (Union, types.UnionType):
            [hint] = [part for part in get_args(hint) if part is not types.NoneType]
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield _Field(field.name, hint, tuple(marks), default, helps[field.name])


def _docstrings(options: type[Options]) -> dict[str, str]:
    """Field -> the string below it, on one line and without a full stop; of base classes too."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        [definition] = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = " ".join(words.split()).removesuffix(".")
    return found


def _option(field: _Field) -> str:
    """As it is typed."""
    place = field.mark(Positional)
    return place.metavar if place else f"--{field.name.replace('_', '-')}"


def _argument(field: _Field) -> tuple[list[str], dict[str, Any]]:
    """What `add_argument` takes. Nothing is stored for an option that is not given: the dataclass knows the default."""
    shown = field.help.replace("%", "%%")
    settings: dict[str, Any] = {"help": shown, "default": argparse.SUPPRESS}
    if field.type is bool:
        return [_option(field)], settings | {"action": "store_true"}
    settings |= _value(field)
    if place := field.mark(Positional):
        if field.default is not MISSING:
            settings |= {"nargs": "*" if "nargs" in settings else "?", "default": field.default}
        settings["help"] += _default(field)
        return [field.name], settings | {"metavar": place.metavar}
    required = field.default is MISSING
    settings["help"] += " (required)" if required else _default(field)
    return [_option(field)], settings | {"required": required, "dest": field.name}


def _value(field: _Field) -> dict[str, Any]:
    """How the text becomes a value: `type`, `nargs`, `choices`, `metavar`."""
    kind, settings = field.type, {}
    if get_origin(kind) is tuple and field.parse is None:
        kind, settings = get_args(kind)[0], {"nargs": "+"}
    if get_origin(kind) is Literal:
        return settings | {"choices": get_args(kind)}
    parsers: dict[Any, tuple[Callable[[str], Any], str | None]] = {
        int: (whole(), "N"),
        float: (number(), "X"),
        Path: (Path, "PATH"),
        str: (str, None),
    }
    parse, metavar = parsers.get(kind, (str, None))
    named, each = field.mark(Metavar), field.mark(Each)
    return settings | {
        "type": each.parse if each else field.parse or parse,
        "metavar": named.metavar if named else metavar,
    }


def _default(field: _Field) -> str:
    """The default in words; what None or nothing means, the docstring says."""
    if field.default in (MISSING, None, ()):
        return ""
    default = field.default
    if isinstance(default, tuple):
        default = ("," if field.parse else " ").join(map(str, default))
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})".replace("%", "%%")


def _unwritable(path: Path, output: Output) -> str | None:
    """Why `path` cannot be written, folders above it that are not there yet included; None if it can."""
    if path.exists() and path.is_dir() != output.folder:
        return "it is not a directory" if output.folder else "it is a directory"
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if there != path and not there.is_dir():
        return f"{there} is not a directory"
    return None if os.access(there, os.W_OK) else f"no permission to write to {there}"
