"""MkDocs calls this for every page, with this folder on the path."""

from __future__ import annotations

from typing import Any

from reference import filled


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its generated parts."""
    return filled(markdown)
