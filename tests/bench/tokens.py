"""Counts how many greedy tokens of SmolLM2 are those of full fusion: `python -m tests.bench.tokens`.

40 prompts, 48 tokens each, every policy, through real engines; transformers in float32 over the whole vocabulary is
what they are compared with (tests/support/oracle/smollm2.py). Writes tokens.json to docs/benchmarks/, where what it
says of policies that are not measured this time stays, and prints a table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from gate.options import Metavar, run_module


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOptions:
    """Of `python -m tests.bench.tokens`."""

    models: Path = Path("build/smollm2")
    """Folder of the models base and style."""
    only: Annotated[tuple[str, ...], Metavar("POLICY")] = ()
    """Policies, by their names in the table (default: all)."""
    output: Path = Path("docs/benchmarks")
    """Folder of the results."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.tokens", __doc__, TokensOptions, run, arguments)


def run(options: TokensOptions) -> None:
    """Run the command."""
    # Here, because the engines' processes import this module again, before they settle on cores and import torch.
    from server.config import parse_config
    from server.launch.local import LocalDeployment
    from server.tools.provenance import about
    from tests.support.oracle import smollm2
    from tests.support.oracle.huggingface import Reference

    models = options.models.absolute()
    reference = Reference(smollm2.models(models))
    asked = smollm2.prompts(reference)
    names = options.only or tuple(smollm2.CASES)
    found: list[smollm2.Agreement] = []
    with TemporaryDirectory() as folder:
        gate = smollm2.build_gate(models, Path(folder) / "gate.pt")
        with LocalDeployment(parse_config(smollm2.configuration(models, gate), directory=models)) as deployment:
            served = {name: smollm2.serve(name, deployment, asked) for name in names}
        print("served", flush=True)
        for name, tokens in served.items():
            found.append(smollm2.judge(name, tokens, gate, reference, asked))
            print(found[-1], flush=True)
    about_all = {"about": about() | {"command": "python -m tests.bench.tokens"}, "noise_nats": smollm2.NOISE}
    print(table(merged(options.output / "tokens.json", about_all, list(map(asdict, found)))))


def merged(file: Path, about_all: dict[str, Any], policies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the results of `policies` into `file`, with those of others that it has; all of them."""
    kept = json.loads(file.read_text(encoding="utf-8"))["policies"] if file.exists() else []
    every = list({one["policy"]: one for one in [*kept, *policies]}.values())
    file.write_text(json.dumps(about_all | {"policies": every}, indent=1) + "\n", encoding="utf-8")
    return every


def table(policies: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| policy | positions | equal | nearer than the noise | of these different | other differences |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in policies:
        numbers = [one["positions"], one["equal"], one["near"], one["near_different"], len(one["wrong"])]
        lines.append(f"| {one['policy']} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
