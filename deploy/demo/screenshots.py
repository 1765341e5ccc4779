"""Pictures of the playground for the README: the example prompt answered, beside every expert alone, light and dark.

    polylogit serve deploy/demo/polylogit.yaml &
    python deploy/demo/screenshots.py http://127.0.0.1:8000 docs/images

Needs playwright and a Chromium (docker/requirements/dev.txt; Debian's package `chromium`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from playwright.sync_api import Page, sync_playwright

from gate.options import Output, Positional, run_module

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SIZE = {"width": 1180, "height": 830}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenshotOptions:
    """Of this script."""

    url: Annotated[str, Positional("URL")]
    """A running server."""
    folder: Annotated[Path, Positional("FOLDER"), Output(folder=True)]
    """The pictures go into this."""


def main(arguments: list[str] | None = None) -> None:
    run_module("screenshots.py", __doc__, ScreenshotOptions, run, arguments)


def run(options: ScreenshotOptions) -> None:
    """Run the command."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme, name in (("light", "playground.png"), ("dark", "playground-dark.png")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            answer(page, options.url)
            page.screenshot(path=options.folder / name)
        browser.close()


def answer(page: Page, url: str) -> None:
    """Have the first example answered by the gate and by every expert alone, then point at a token."""
    page.goto(url)
    page.wait_for_selector("#examples button")
    page.select_option("#beside", "*")
    page.click("#examples button")
    page.wait_for_selector(".turn[data-done]", timeout=60_000)
    page.hover(".answer >> nth=0 >> .token >> nth=4")


if __name__ == "__main__":
    main()
