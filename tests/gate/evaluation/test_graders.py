"""Each grader on right and wrong responses, and on code that tries to get away."""

import socket
import time
from pathlib import Path

import pytest

from gate.evaluation import sandbox as sandbox_module
from gate.evaluation.graders import GraderError, load_grader
from gate.evaluation.sandbox import Sandbox, SandboxLimits

DOUBLE = "def double(x):\n    return 2 * x"
TESTS = ["assert double(3) == 6", "assert double(0) == 0"]


@pytest.mark.parametrize(
    ("spec", "row", "text", "reward"),
    [
        ("exact", {"answer": "85, enots"}, " 85, enots\n", 1.0),
        ("exact", {"answer": "85, enots"}, "85, Enots", 0.0),
        ("numeric", {"answer": "#### 1,234"}, "So 1000 + 234 = 1234.0 apples.", 1.0),
        ("numeric", {"answer": "72"}, "first 72, then 73", 0.0),
        ("numeric", {"answer": "72"}, "no idea", 0.0),
        ("numeric", {"answer": "-0.5"}, "x = -.5", 1.0),
        ("numeric:0.01", {"answer": "3.14159"}, "3.14", 1.0),
        ("numeric:0.0001", {"answer": "3.14159"}, "3.14", 0.0),
        ("numeric", {"answer": "5"}, "9" * 400, 0.0),
        ("numeric", {"answer": "(3,4)"}, "34", 0.0),
        ("numeric", {"answer": "(3,4)"}, "(2, 3,4)", 1.0),
        ("numeric", {"answer": "1,234,567.5"}, "1234567.5", 1.0),
        ("numeric", {"answer": "2345"}, "1,2345", 1.0),
        ("regex", {"pattern": r"^yes\b"}, "yes, it is", 1.0),
        ("regex", {"pattern": r"^yes\b"}, "oh yes", 0.0),
        (r"regex:\d{3}", {}, "call 112", 1.0),
        ("json", {}, '{"a": [1]}', 1.0),
        ("json", {}, "```json\n[1]\n```", 1.0),
        ("json", {}, '{"a": 1', 0.0),
        ("json", {}, "[" * 100_000, 0.0),
        ("json", {}, "NaN", 0.0),
        ("json", {}, '{"a": -Infinity}', 0.0),
        ("json", {"schema": {"required": ["a"]}}, '{"b": 1}', 0.0),
        ("json", {"schema": {"required": ["a"]}}, '{"a": 1}', 1.0),
        ("tests.gate.evaluation.test_graders:half", {"id": "x"}, "anything", 0.5),
    ],
)
def test_rewards(spec, row, text, reward):
    grader = load_grader(spec)
    assert grader.problem(row) is None
    assert grader(row, text) == reward


def half(row, text):
    return 0.5 if row["id"] == "x" and text else 0.0


def seven(row, text):
    return 7


def broken(row, text):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("exakt", "not exact, numeric"),
        ("exact:1", "--grader exact:1"),
        ("numeric:much", "not a number above 0"),
        ("numeric:-1", "not a number above 0"),
        ("regex:(", "pattern '\\('"),
        ("no_such_module:f", "no_such_module"),
        ("tests.gate.evaluation.test_graders:absent", "absent"),
        ("tests.gate.evaluation.test_graders:TESTS", "not a function"),
    ],
)
def test_graders_that_cannot_be(spec, words):
    with pytest.raises(GraderError, match=words):
        load_grader(spec)


@pytest.mark.parametrize(("name", "words"), [("seven", "returned 7"), ("broken", "KeyError")])
def test_a_function_that_misbehaves_is_named(name, words):
    with pytest.raises(GraderError, match=f"{name}: {words}"):
        load_grader(f"tests.gate.evaluation.test_graders:{name}")({}, "text")


@pytest.mark.parametrize(
    ("spec", "row"),
    [
        ("exact", {}),
        ("numeric", {"answer": "none"}),
        ("regex", {}),
        ("regex", {"pattern": "("}),
        ("json", {"schema": {"type": "nonsense"}}),
        ("python", {"tests": []}),
        ("python", {"tests": 7}),
        ("python", {"tests": "assert double(3) =="}),
        ("python", {"tests": "import math\ndef check(candidate):\n    assert candidate(3) == 6"}),
        ("python", {"tests": "def test_double(value):\n    assert double(value) == 6"}),
        ("python", {"tests": "class TestDouble:\n    def test(self):\n        assert double(3) == 6"}),
        ("python", {"tests": "async def test_double():\n    assert double(3) == 6"}),
    ],
)
def test_rows_that_cannot_be_graded(spec, row):
    assert load_grader(spec).problem(row)


def test_a_pattern_that_never_comes_to_an_end_has_found_nothing():
    assert load_grader("regex")({"pattern": r"(x+x+)+y"}, "x" * 60) == 0.0


@pytest.fixture(scope="module")
def python():
    return load_grader("python:20")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (DOUBLE, 1.0),
        (f"Here it is:\n```python\n{DOUBLE}\n```\nIt doubles. ```python\nassert False\n```", 1.0),
        ("def double(x):\n    return x * x", 0.0),
        ("```python\ndef double(x:\n```", 0.0),
        ("no code at all", 0.0),
        (f"{DOUBLE}\nprint('x' * 1_000_000)", 1.0),
        (f"{DOUBLE}\nimport threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", 1.0),
    ],
)
def test_code(python, text, reward):
    assert python({"tests": TESTS}, text) == reward
    assert python({"tests": "\n".join(TESTS)}, text) == reward


CASE = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(double(3), 6)\n"


@pytest.mark.parametrize(
    "tests",
    [
        CASE,
        f"{CASE}unittest.main()",
        f"{CASE}unittest.main(exit=False)",
        f"{CASE}if __name__ == '__main__':\n    unittest.main()",
        "from unittest import TestCase, main\nclass T(TestCase):\n    def test(self): assert double(3) == 6\nmain()",
        f"{CASE}wanted = None\ndef setUpModule():\n    global wanted\n    wanted = 6\n"
        "class U(unittest.TestCase):\n    def test(self): self.assertEqual(double(3), wanted)",
        "def test_double():\n    assert double(3) == 6",
        "def test_double():\n    return double(3) == 6",
        "def test_double(value, wanted):\n    assert double(value) == wanted\ntest_double(3, 6)",
        "from unittest.mock import patch\n@patch('os.getcwd')\ndef test_double(mocked):\n    assert double(3) == 6",
        "if __name__ == '__main__':\n    assert double(3) == 6",
        "from solution import double as found\nassert found(3) == 6",
    ],
)
def test_what_the_tests_define_is_run(python, tests):
    assert python.problem({"tests": tests}) is None
    assert python({"tests": tests}, DOUBLE) == 1.0
    for wrong in ("return x * x * x", "raise SystemExit(0)", "import unittest; raise unittest.SkipTest"):
        assert python({"tests": tests}, f"def double(x):\n    {wrong}") == 0.0


@pytest.mark.parametrize(
    "code",
    [
        f"{DOUBLE}\nif __name__ == '__main__':\n    print(double(int(input())))",
        f"{DOUBLE}\ndef test_of_its_own():\n    assert False",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def double(x): return A(2 * x).x",
    ],
)
def test_what_the_code_keeps_to_itself_is_not_run(python, code):
    assert python({"tests": TESTS}, code) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.close(3); os.close(4); os.close(5); os.close(6)",
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "def double(x):\n    raise SystemExit(0)",
    ],
)
def test_leaving_early_is_not_passing(python, code):
    assert python({"tests": TESTS}, code) == 0.0


@pytest.fixture(scope="module", params=["as permitted", "limits only"])
def sandbox(request):
    made = Sandbox(SandboxLimits(seconds=3.0, memory=256 << 20))
    if request.param == "limits only":
        made.isolation = sandbox_module._STRONGEST_FIRST[-1]
    return made


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
        "open('big', 'wb').write(b'x' * (17 << 20))",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_hogs_are_stopped(sandbox, code):
    assert not sandbox.passes(code, "")


def test_environment_and_directory_are_its_own(sandbox, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    assert sandbox.passes("import os\nassert 'SECRET' not in os.environ\nassert os.listdir() == []\nopen('a', 'w')", "")
    assert list(tmp_path.iterdir()) == []


def test_a_fork_bomb_leaves_nothing_behind():
    """Only where processes can be counted and killed apart from this user's; elsewhere it is a documented limit."""
    sandbox = Sandbox(SandboxLimits(seconds=2.0))
    if not (sandbox.isolation.user or sandbox.isolation.namespaces):
        pytest.skip("this system permits neither namespaces nor another user")
    mark = "polylogit_bomb"
    bomb = f"import ctypes, os\nctypes.CDLL(None).prctl(15, b'{mark[:15]}', 0, 0, 0)\nwhile True: os.fork()"
    assert not sandbox.passes(bomb, "")
    assert not _stay(mark[:15])


def test_a_daemon_does_not_outlive_its_run():
    sandbox = Sandbox(SandboxLimits(seconds=20.0))
    if not (sandbox.isolation.user or sandbox.isolation.namespaces):
        pytest.skip("this system permits neither namespaces nor another user")
    daemon = (
        "import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        ctypes.CDLL(None).prctl(15, b'polylogit_away', 0, 0, 0)\n        time.sleep(60)\n    os._exit(0)"
    )
    assert sandbox.passes(daemon, "")
    assert not _stay("polylogit_away")


def test_code_that_turns_its_back_is_killed():
    """It leaves its session and asks not to die with its parent."""
    sandbox = Sandbox(SandboxLimits(seconds=1.0))
    if not (sandbox.isolation.user or sandbox.isolation.namespaces):
        pytest.skip("this system permits neither namespaces nor another user")
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'polylogit_back', 0, 0, 0)\nlibc.prctl(1, 0)\n"
        "os.setsid()\nwhile True: pass"
    )
    assert not sandbox.passes(code, "")
    assert not _stay("polylogit_back")


def test_no_network():
    sandbox = Sandbox(SandboxLimits(seconds=20.0))
    if not sandbox.isolation.namespaces:
        pytest.skip("this system permits no namespaces; the grader says so when it starts")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not sandbox.passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)", "")


def test_no_sight_of_other_processes():
    sandbox = Sandbox(SandboxLimits(seconds=20.0))
    if not sandbox.isolation.hides:
        assert "sees which other processes run" in sandbox.isolation.name
        pytest.skip("this system permits no /proc of its own; the grader says so when it starts")
    count = "import os\nassert sum(name.isdigit() for name in os.listdir('/proc')) <= 2"
    assert sandbox.passes(count, "")


def _stay(name):
    """Whether processes of this name still run after all time that a busy machine needs to end them."""
    deadline = time.monotonic() + 10
    while _named(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    return _named(name)


def _named(name):
    """Processes of this name that run now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:
            continue
        if f"({name})" in text and text.rpartition(")")[2].split()[0] != "Z":
            found.append(entry)
    return found
