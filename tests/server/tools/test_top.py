"""`polylogit top`: readings compared, frames drawn, servers that are away, refuse, or are something else."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from server.cli import main
from server.config import parse_config
from server.errors import ServerAway
from server.metrics.api import ApiMetrics, render
from server.tools.top import watch as top
from server.tools.top.frame import frame
from server.tools.top.scrape import Change, Sample, Scraper
from tests.support.api.fake_coordinator import stats

KEY = "the-key"
EMPTY = Sample(0.0)


def metrics() -> str:
    config = parse_config({"name": "duo", "experts": [{"name": "math", "model": "math"}]}, directory=Path())
    api = ApiMetrics(config)
    for _ in range(3):
        api.request("/v1/chat/completions", "ok", 0.2)
    return render(api, stats(), age=0.0, ready=True).decode()


@pytest.fixture
def answer() -> list[tuple[int, str]]:
    """What the server answers with: (status, text), changed by the test."""
    return [(200, metrics())]


@pytest.fixture
def server(answer: list[tuple[int, str]]) -> Iterator[str]:
    """The address of a server that wants KEY."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("authorization") == f"Bearer {KEY}" and self.path == "/metrics"
            status, text = answer[0] if known else (401, "")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def shown(change: Change, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(frame("http://here", change))
    return console.file.getvalue()  # type: ignore[attr-defined]


def series(values: dict[str, float], at: float = 0.0) -> Sample:
    """A reading of a histogram h with cumulative buckets: bound -> count."""
    return Sample(at, {"h_bucket": {(("le", bound),): count for bound, count in values.items()}})


# --- readings ---


def test_growth_and_rates():
    before = Sample(10.0, {"c": {(("expert", "a"),): 5.0, (("expert", "b"),): 1.0}})
    after = Sample(12.0, {"c": {(("expert", "a"),): 9.0, (("expert", "b"),): 2.0}})
    change = Change(before, after)
    assert (change.grown("c"), change.grown("c", expert="a"), change.rate("c", expert="a")) == (5.0, 4.0, 2.0)
    assert Change(after, before).grown("c", expert="a") == 5.0  # the counter began anew
    assert change.grown("none") == 0.0
    assert after.label("c", "expert") == ["a", "b"]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.1), (0.75, 0.6), (0.9, 0.9), (0.95, 1.0), (0.99, 1.0)])
def test_quantiles_are_linear_within_a_bucket(share, expected):
    sample = series({"0.1": 50.0, "1.0": 95.0, "+Inf": 100.0})
    assert Change(EMPTY, sample).quantile("h", share) == pytest.approx(expected)


def test_quantiles_are_those_of_the_change():
    before, after = (
        series({"0.1": 100.0, "1.0": 100.0, "+Inf": 100.0}),
        series({"0.1": 100.0, "1.0": 110.0, "+Inf": 110.0}),
    )
    assert Change(before, after).quantile("h", 0.5) == pytest.approx(0.55)
    assert math.isnan(Change(after, after).quantile("h", 0.5))


# --- frames ---


def test_a_frame_shows_the_server(server):
    scraper = Scraper(server, KEY)
    text = shown(Change(EMPTY, scraper.read()))
    scraper.close()
    for part in (
        "duo",
        "ready",
        "running 2 of 64",
        "queued 1 of 256",
        "math",
        "75.0%",
        "engine 40 ms",
        "33.3%",
        "70.6%",
    ):
        assert part in text, part


def test_an_idle_server_shows_what_was_since_its_start(server):
    scraper = Scraper(server, KEY)
    first, second = scraper.read(), scraper.read()
    scraper.close()
    text = shown(Change(first, second))
    assert "since the start" in text and "tokens          0/s" in text and "75.0%" in text


def test_a_narrow_terminal_cuts_nothing(server):
    scraper = Scraper(server, KEY)
    text = shown(Change(EMPTY, scraper.read()), width=80)
    scraper.close()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


# --- the command ---


def test_once_prints_a_frame(server, monkeypatch, capsys):
    monkeypatch.setenv("POLYLOGIT_API_KEY", KEY)
    assert main(["top", f"http://{server}/v1", "--once", "--interval", "0.01"]) == 0
    assert "math" in capsys.readouterr().out


def test_the_key_may_stand_in_a_file(server, tmp_path, capsys):
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    assert main(["top", server, "--once", "--interval", "0.01", "--api-key-file", str(tmp_path / "key")]) == 0
    assert "math" in capsys.readouterr().out


def test_faults_are_one_line(server, answer, tmp_path, monkeypatch, capsys):
    def fault(*arguments: str) -> str:
        assert main(["top", "--interval", "0.01", *arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("polylogit: error: ")
        return lines[0]

    monkeypatch.delenv("POLYLOGIT_API_KEY", raising=False)
    assert "wants an API key" in fault(server, "--once")
    monkeypatch.setenv("POLYLOGIT_API_KEY", KEY)
    assert "--once" in fault(server)  # the output is not a terminal
    answer[0] = (200, "# HELP other x\n# TYPE other gauge\nother 1\n")
    assert "is not polylogit's" in fault(server, "--once")
    answer[0] = (200, "<html>")
    assert "is not polylogit's" in fault(server, "--once")
    answer[0] = (500, "")
    assert "HTTP status 500" in fault(server, "--once")
    assert "cannot be reached" in fault("127.0.0.1:1", "--once")
    assert "ftp" in fault("ftp://127.0.0.1", "--once")
    assert "cannot be read" in fault(server, "--once", "--api-key-file", str(tmp_path / "none"))
    assert "--interval" in fault(server, "--once", "--interval", "0")


def test_a_server_that_went_away_is_waited_for(server, monkeypatch):
    """Frame, no answer, frame again, and the end of the command at Ctrl-C."""
    scraper = Scraper(server, KEY)
    good = scraper.read()
    scraper.close()
    steps: Iterator[Callable[[], Sample]] = iter([lambda: good, _away, lambda: good, _interrupt])
    monkeypatch.setattr(scraper, "read", lambda: next(steps)())
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50)
    with pytest.raises(KeyboardInterrupt):
        top._watch(scraper, 0.001, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("running 2 of 64") == 3 and text.count("it is away; trying again") == 1


def test_a_refusal_ends_the_command(server):
    scraper = Scraper(server, "another key")
    with pytest.raises(ServerAway, match="wants an API key"):
        top._watch(scraper, 0.001, Console(file=io.StringIO(), force_terminal=True))
    scraper.close()


def _away() -> Sample:
    raise ServerAway("it is away")


def _interrupt() -> Sample:
    raise KeyboardInterrupt
