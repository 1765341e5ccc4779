"""Runs Python code that a model wrote, in a process of its own with little to break: limits on time, memory, processes
and file sizes, an empty environment, a temporary directory, and, as far as the system permits, no network, no sight of
other processes and another user.

Passing means that the code, then the tests, then every unittest.TestCase and every test_ function without arguments
that the tests define ran to their end: a random word, which only the child's own last line sends, comes back.
Printing, `sys.exit(0)` and `os._exit(0)` do not make it come. This protects the machine and is not fooled by
accidents; code that searches its own process for the word can still cheat.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# The code is the module `solution`; to the tests it is `__main__`, so what stands under that guard runs in them only.
_CHILD = r"""
import json, os, resource, sys, types

def run(made):
    for name, value in made:
        if name.startswith("test_") and callable(value) and bare(value):
            assert value() in (None, True)
    if "unittest" in sys.modules:
        import unittest
        cases = [value for _, value in made if isinstance(value, type) and issubclass(value, unittest.TestCase)]
        suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
        outcome = suite.run(unittest.TestResult())
        assert outcome.wasSuccessful() and not outcome.skipped

def bare(function):
    import inspect
    try:
        inspect.signature(function, follow_wrapped=False).bind()
        return True
    except TypeError:
        return False

job = json.load(sys.stdin)
for name, limit in job.pop("limits").items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
verdict, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nothing, number)
sys.modules["solution"] = sys.modules["__main__"] = module = types.ModuleType("solution")
space = module.__dict__
try:
    exec(compile(job["code"], "solution.py", "exec"), space)
    before = dict(space)
    space["__name__"] = "__main__"
    if "unittest" in job["tests"]:
        import unittest
        unittest.main = lambda *arguments, **options: None  # its cases run below
    exec(compile(job["tests"], "tests.py", "exec"), space)
    run([(name, value) for name, value in space.items() if value is not before.get(name)])
except BaseException:
    os._exit(1)
os.write(verdict, job["word"].encode())
os._exit(0)
"""
_UNSHARE = ["unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
_PROBE = "import collections, json, math, random, re"


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Of one run."""

    seconds: float = 10.0
    """By the clock, and of each process's processor time."""
    memory: int = 1 << 30
    """Bytes of each process."""
    processes: int = 32
    """Processes and threads."""
    file_bytes: int = 16 << 20
    """Of each file."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a child is kept apart from its surroundings."""

    namespaces: bool = False
    """No network, its own process numbers."""
    hides: bool = False
    """A /proc of its own, too, where no other process stands."""
    user: bool = False
    """Runs as a user that nothing else belongs to."""
    reads: bool = False
    """And may read what this user may, where Python itself could not be read otherwise."""

    @property
    def name(self) -> str:
        """What a person is told."""
        facts = [
            "no network" if self.namespaces else "the network is NOT cut off",
            "no sight of other processes" if self.hides else "sees which other processes run",
            "own user" if self.user else "runs as this user",
        ]
        return ", ".join([*facts, "reads all files"] if self.reads else facts)

    def command(self, user: int) -> list[str]:
        """What to put before the child's command."""
        prefix = list(_UNSHARE) if self.namespaces else []
        if self.hides:
            prefix.append("--mount-proc")
        if self.namespaces and os.getuid():
            prefix.insert(1, "--user")
        if self.user:
            kept = "-all,+dac_read_search" if self.reads else "-all"
            prefix += ["setpriv", "--no-new-privs", "--clear-groups", f"--reuid={user}", f"--regid={user}"]
            prefix += [f"--inh-caps={kept}", f"--ambient-caps={kept}", f"--bounding-set={kept}"]
        return prefix


_STRONGEST_FIRST = (
    Isolation(namespaces=True, hides=True, user=True),
    Isolation(namespaces=True, hides=True, user=True, reads=True),
    Isolation(namespaces=True, user=True),
    Isolation(namespaces=True, user=True, reads=True),
    Isolation(user=True),
    Isolation(user=True, reads=True),
    Isolation(namespaces=True, hides=True),
    Isolation(namespaces=True),
    Isolation(),
)


class Sandbox:
    """Runs code under `limits`, kept apart as well as this system permits (`isolation`)."""

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self._limits = limits or SandboxLimits()
        self.isolation = _STRONGEST_FIRST[-1]
        for isolation in _STRONGEST_FIRST:
            if isolation.user and os.getuid():
                continue
            self.isolation = isolation
            if self.passes(_PROBE, ""):
                return

    def passes(self, code: str, tests: str) -> bool:
        """Whether `code` and then `tests`, in one namespace, run to the end."""
        word = secrets.token_hex(16)
        user = 1 << 30 | secrets.randbits(28)
        job = {"code": code, "tests": tests, "word": word, "limits": self._rlimits()}
        with _directory(shared=self.isolation.user) as directory:
            child = self._start(user, directory)
            try:
                return _verdict(child, json.dumps(job).encode(), self._limits.seconds) == word.encode()
            finally:
                self._end(child, user)

    def _start(self, user: int, directory: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*self.isolation.command(user), sys.executable, "-I", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )

    def _rlimits(self) -> dict[str, int]:
        limits = self._limits
        apart = self.isolation.user or self.isolation.namespaces
        return {
            "RLIMIT_CPU": max(1, round(limits.seconds)),
            "RLIMIT_AS": limits.memory,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NPROC": limits.processes + (0 if apart else _threads_of_this_user()),
            "RLIMIT_NOFILE": 128,
            "RLIMIT_CORE": 0,
        }

    def _end(self, child: subprocess.Popen[bytes], user: int) -> None:
        """Kill everything that the run started. With the first process of a namespace go all others in it."""
        for kill, number in [(os.kill, first) for first in _children(child.pid)] + [(os.killpg, child.pid)]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(number, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self.isolation.user and not self.isolation.namespaces:
            everyone = "import os; os.kill(-1, 9)"
            subprocess.run([*self.isolation.command(user), sys.executable, "-I", "-c", everyone], check=False)


def _verdict(child: subprocess.Popen[bytes], job: bytes, seconds: float) -> bytes:
    """What the child answers to `job`, up to the word's length; what came until then if time runs out."""
    deadline = time.monotonic() + seconds
    stdin, stdout = _pipe(child.stdin), _pipe(child.stdout)
    with contextlib.suppress(BrokenPipeError):
        stdin.write(job)
        stdin.close()
    found = b""
    while len(found) < 32 and (left := deadline - time.monotonic()) > 0:
        if not select.select([stdout], [], [], left)[0]:
            break
        if not (piece := os.read(stdout.fileno(), 64)):
            break
        found += piece
    return found


def _children(parent: int) -> list[int]:
    """The processes whose parent is `parent`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.parent.name))
    return found


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the child was started without this pipe")
    return pipe


@contextlib.contextmanager
def _directory(*, shared: bool) -> Iterator[str]:
    """A directory of the run's own, gone afterwards; `shared`: another user may write in it."""
    path = tempfile.mkdtemp(prefix="polylogit-run-")
    if shared:
        Path(path).chmod(0o777)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _threads_of_this_user() -> int:
    """How many processes and threads count against this user's limit already."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                total += len(list((entry / "task").iterdir())) if entry.stat().st_uid == os.getuid() else 0
    return total
