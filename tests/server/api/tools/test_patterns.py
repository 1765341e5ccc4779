"""Which regular expressions of a schema are refused before anyone runs them."""

from __future__ import annotations

import time

import pytest

from server.api.tools.patterns import problem

FINE = [
    "",
    "^[a-z0-9]+(?:-[a-z0-9]+)*$",
    r"^\d{3}-\d{4}$",
    r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$",
    "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
    r"(a|b)*c",
    "^(foo|ba+r)+$",
    r"[\]+*()]+",
    r"\(a+\)+",
    "(?P<year>[0-9]{4})+",
    "a{2,}b*",
    "{not a count}",
    "a)b",
    "(((",
]
REFUSED = [
    "(a+)+",
    "^(a+)+$",
    "(a*)*b",
    "([a-z]+)*",
    "(x+x+)+y",
    "(a|b+)*",
    "((a+))+",
    "(?:(?:a+)?)+",
    "(a+){2,}",
    "(.*)*",
    "(a{1,1000}){1,1000}",
    "a{1000000000}",
    "x" * 2000,
]


@pytest.mark.parametrize("pattern", FINE)
def test_fine(pattern: str) -> None:
    assert problem(pattern) is None


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:20])
def test_refused(pattern: str) -> None:
    assert problem(pattern)


@pytest.mark.parametrize("pattern", ["(" * 1024, "[" * 1024, "(a" * 512, "\\" * 1023, "a{1}" * 256, "|" * 1024])
def test_reads_once(pattern: str) -> None:
    started = time.thread_time()
    problem(pattern)
    assert time.thread_time() - started < 0.1
