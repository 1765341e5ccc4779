"""Measures what truncation costs: `python -m tests.bench.truncation [--prompts N] [--rounds N]`.

For lists of k = 8, 32 and 128: the total-variation distance between the distribution that
the server reports and fusion over the full vocabulary (Hugging Face transformers), at every position of the right
answers to the demo's held-out prompts; and decoding time. Writes JSON and a Markdown table to docs/benchmarks/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gate.options import run_module, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncationOptions:
    """Of `python -m tests.bench.truncation`."""

    prompts: Annotated[int, whole(1)] = 100
    """How many of the held-out prompts."""
    rounds: Annotated[int, whole(1)] = 9
    """Rounds of each timing."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.truncation", __doc__, TruncationOptions, run, arguments)


def run(options: TruncationOptions) -> None:
    """Run the command."""
    # Here, because the engines' processes import this module again, before they settle on cores and import torch.
    from tests.bench.measure import measure

    measure(options.prompts, options.rounds)


if __name__ == "__main__":
    main()
