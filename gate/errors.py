"""What goes wrong in training and around it because of what a person gave: the message is one line to act on."""

import argparse
import contextlib
from collections.abc import Iterator


class GateError(ValueError):
    """Base: checkpoints, records, graders and prompts that cannot be used as they are."""


@contextlib.contextmanager
def one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A GateError ends the command of `parser` with code 1 and its message."""
    try:
        yield
    except GateError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
