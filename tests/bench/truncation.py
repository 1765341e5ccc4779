"""Measures what truncation costs: `python -m tests.bench.truncation [--prompts N] [--rounds N]`.

For k = 8, 32 and 128, with `missing: tail` and `exact`: the total-variation distance between the distribution that
the server reports and fusion over the full vocabulary (Hugging Face transformers), at every position of the right
answers to the demo's held-out prompts; and decoding time, the two deployments of one k taking turns. Writes JSON and
a Markdown table to docs/benchmarks/.
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="how many of the held-out prompts")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each timing")
    options = parser.parse_args()
    # Here, because the engines' processes import this module again, before they settle on cores and import torch.
    from tests.bench.measure import measure

    measure(options.prompts, options.rounds)


if __name__ == "__main__":
    main()
