"""The arguments of `polylogit record` and `polylogit train`; the work is in `record` and `train` beside this."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRADERS = "exact, numeric[:TOLERANCE], regex[:PATTERN], json, python[:SECONDS], or package.module:function"


def add_commands(commands: Any) -> None:
    """Add both to the command line's subparsers."""
    _add_record(commands)
    _add_train(commands)


def _add_record(commands: Any) -> None:
    record = commands.add_parser("record", help="make graded responses for a gate to learn from")
    record.add_argument("config", type=Path, metavar="FILE")
    record.add_argument("--prompts", type=Path, required=True, help='JSON lines: "id", "messages", "answer", ...')
    record.add_argument("--grader", required=True, help=GRADERS)
    record.add_argument(
        "--output", type=Path, required=True, help="directory of the records; goes on if some are there"
    )
    record.add_argument("--policies", help="comma-separated experts and policies (default: all that need no gate)")
    record.add_argument("--gate", type=Path, help="also draw with this gate checkpoint")
    record.add_argument("--answers", action="store_true", help='also score the prompts\' "answer"')
    record.add_argument("--responses", type=Path, help='also score these: JSON lines of "id" and "response"')
    record.add_argument("--samples", type=whole(1), default=1, help="responses of each policy to each prompt")
    record.add_argument("--temperature", type=number(0, 2), default=1.0)
    record.add_argument("--max-tokens", type=whole(1), default=512, help="longer responses are cut and count as wrong")
    record.add_argument("--limit", type=whole(1), help="use only the first prompts")
    record.add_argument("--no-hidden", dest="hidden", action="store_false", help="leave out hidden states")
    record.add_argument("--seed", type=whole(0), default=0)
    record.set_defaults(run=_record)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a gate on recorded responses")
    train.add_argument("config", type=Path, metavar="FILE")
    train.add_argument("--records", type=Path, required=True, help="written by polylogit record")
    train.add_argument("--output", type=Path, default=Path("gate.pt"), help="the checkpoint (default: %(default)s)")
    train.add_argument("--inputs", default="topk,hidden", help="topk, hidden or both (default: %(default)s)")
    train.add_argument("--state-size", type=whole(0), default=0, help="of a recurrent state (default: none)")
    train.add_argument("--projected-size", type=whole(1), default=12, help="of each expert's projected hidden state")
    train.add_argument("--space", choices=["logprob", "prob"], default="logprob")
    train.add_argument("--updates", type=whole(1), default=1000, help="most updates on recorded responses")
    train.add_argument("--batch-size", type=whole(1), default=128, help="responses an update")
    train.add_argument("--rate", type=number(0, 1), default=3e-3, help="learning rate on recorded responses")
    train.add_argument("--negative-weight", type=number(0, 10), default=0.02, help="of a wrong response's tokens")
    train.add_argument("--validation", type=number(0, 0.9), default=0.1, help="share of the prompts held out")
    train.add_argument("--responses", type=whole(1), help="use only so many responses, drawn at random")
    train.add_argument("--seed", type=whole(0), default=0)
    train.add_argument("--device", help="where to train (default: a GPU if there is one)")
    refine = train.add_argument_group("refinement", "then learn from the gate's own samples, drawn by the deployment")
    refine.add_argument("--refine-steps", type=whole(0), default=0)
    refine.add_argument("--prompts", type=Path, help="to draw for")
    refine.add_argument("--grader", help=GRADERS)
    refine.add_argument("--refine-prompts", type=whole(1), default=32, help="prompts a step")
    refine.add_argument("--group", type=whole(2), default=8, help="samples a prompt")
    refine.add_argument("--refine-rate", type=number(0, 1), default=1e-3, help="learning rate")
    refine.add_argument("--kl", type=number(0, 100), default=0.01, help="weight of the divergence from the start")
    refine.add_argument("--temperature", type=number(0.01, 2), default=1.0, help="of the samples")
    refine.add_argument("--max-tokens", type=whole(1), default=512, help="longer samples are cut and count as wrong")
    train.set_defaults(run=_train)


def whole(least: int) -> Callable[[str], int]:
    """Parses a whole number of at least `least`."""

    def parse(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "whole number"
    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Parses a number from `least` to `most`."""

    def parse(text: str) -> float:
        if not least <= (value := float(text)) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}")
        return value

    parse.__name__ = "number"
    return parse


def _record(options: argparse.Namespace) -> int:
    from server.training.record import record

    return record(options)


def _train(options: argparse.Namespace) -> int:
    from server.training.train import train

    return train(options)
