"""`polylogit top`: a running server in the terminal, from its /metrics alone."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.live import Live

from server.errors import ConfigError, ServerAway
from server.tools.options import TopOptions
from server.tools.top.frame import away, frame
from server.tools.top.scrape import Change, Sample, Scraper

_READINGS = 6
"""Figures are over the span of so many readings."""


def top(options: TopOptions) -> int:
    """Run the command; the exit code. Raises ServerAway, ConfigError."""
    if options.interval <= 0:
        raise ConfigError("--interval must be more than 0")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    scraper = Scraper(options.url, _key(options.api_key_file))
    console = Console()
    try:
        if options.once:
            console.print(frame(scraper.url, _twice(scraper, options.interval)))
        elif console.is_terminal:
            _watch(scraper, options.interval, console)
        else:
            raise ConfigError("the output is not a terminal: use --once")
    except KeyboardInterrupt:
        pass
    finally:
        scraper.close()
    return 0


def _twice(scraper: Scraper, interval: float) -> Change:
    before = scraper.read()
    time.sleep(interval)
    return Change(before, scraper.read())


def _watch(scraper: Scraper, interval: float, console: Console) -> None:
    """Show frame after frame. A server that goes away is waited for."""
    readings: deque[Sample] = deque(maxlen=_READINGS)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                sample = scraper.read()
            except ServerAway as error:
                if error.lasting:
                    raise
                last = Change(readings[0], readings[-1]) if readings else None
                live.update(away(scraper.url, last, str(error)), refresh=True)
                time.sleep(interval)
                continue
            if readings and _started(readings[-1]) != _started(sample):
                readings.clear()  # another process: its counters began anew
            readings.append(sample)
            live.update(frame(scraper.url, Change(readings[0], sample)), refresh=True)
            time.sleep(interval)


def _started(sample: Sample) -> float:
    return sample.value("process_start_time_seconds")


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("POLYLOGIT_API_KEY")
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: {file} cannot be read: {type(error).__name__}") from None
    if not lines:
        raise ConfigError(f"--api-key-file: {file} has no key in it")
    return lines[0]
