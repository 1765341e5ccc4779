"""The api as the supervisor starts it: a process of its own, over one expert."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

CONFIG = """
name: solo
experts: [{name: math, model: model}]
"""
CODE = """
import socket, sys
from pathlib import Path
from server.api.process import run
from server.config import load_config
from server.errors import StartError
try:
    run(load_config(Path(sys.argv[1])), sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
except StartError as error:
    sys.exit(f"one line: {error}")
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
"""


def start(folder: Path, listener: socket.socket, more: str = "") -> subprocess.Popen[str]:
    """On `listener`, over a coordinator at `folder`/api; `more`: lines of the configuration."""
    (folder / "solo.yaml").write_text(CONFIG + more)
    arguments = [str(folder / "solo.yaml"), f"{folder}/api", str(listener.fileno())]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
    )
