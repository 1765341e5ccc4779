"""An OpenAI endpoint without models, for what asks one over HTTP."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def cards(*names: str, owner: str = "polylogit") -> list[dict[str, Any]]:
    """As /v1/models tells them; the first is the deployment's own name, the parent of the others."""
    root, *others = names
    return [{"id": root, "owned_by": owner, "parent": None}] + [
        {"id": name, "owned_by": owner, "parent": root} for name in others
    ]


@contextmanager
def endpoint(models: list[dict[str, Any]], answer: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """Its URL, without /v1. `answer` takes a request's body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({"data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._reply({"choices": [{"message": {"content": answer(body)}, "finish_reason": "stop"}]})

        def log_message(self, *arguments: Any) -> None:
            pass

        def _reply(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
