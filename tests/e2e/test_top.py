"""`polylogit top --once` on a running server."""

from __future__ import annotations

import subprocess

from tests.support import demo
from tests.support.server_process import POLYLOGIT, Served


def test_a_frame_of_a_real_server(demo_server: Served) -> None:
    messages = [{"role": "user", "content": "Add 27 and 58, then reverse stone."}]
    demo_server.openai.chat.completions.create(model="polylogit-demo", messages=messages, temperature=0)
    done = subprocess.run([POLYLOGIT, "top", demo_server.url, "--once"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("polylogit-demo", "ready", "engine", "look_up", *demo.EXPERTS):
        assert part in done.stdout, part
