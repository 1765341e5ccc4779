"""What the commands that measure, watch and ask a deployment are told; the work is in the modules beside this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gate.options import Metavar, Output, Positional, commas, names, number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Measure fused decoding beside each expert alone."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""
    experts: Annotated[tuple[str, ...], names, Metavar("NAMES")] = ()
    """Comma-separated names of the experts to use (default: all)."""
    sequences: Annotated[tuple[int, ...], commas(whole(1)), Metavar("NUMBERS")] = (1, 8, 32)
    """Numbers of concurrent sequences."""
    tokens: Annotated[int, whole(4)] = 64
    """Tokens a sequence in each short run."""
    prompt_tokens: Annotated[int, whole(1)] = 32
    """Tokens of each prompt."""
    rounds: Annotated[int, whole(1)] = 15
    """Interleaved rounds; medians are over these."""
    gate: bool = False
    """Fuse by the configured gate, and tell its share of a tick."""
    temperature: Annotated[float, number(0.0, 2.0)] = 0.0
    """Sample at this temperature, each sequence with a seed of its own; 0 is greedy."""
    top_logprobs: Annotated[int | None, whole(0)] = None
    """Ask for log-probabilities, with so many alternatives to each token (default: for none)."""
    list_length: Annotated[int | None, whole(1)] = None
    """Log-probabilities that each expert lists of each token (default: the configuration's)."""
    json: Annotated[Path | None, Output()] = None
    """Write all measurements here (default: nowhere)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopOptions:
    """Watch a running server."""

    url: Annotated[str, Positional("URL")] = "http://127.0.0.1:8000"
    """The server."""
    once: bool = False
    """Print one frame, over one interval."""
    interval: float = 1.0
    """Seconds between readings."""
    api_key_file: Annotated[Path | None, Metavar("FILE")] = None
    """The server's API key stands here (default: POLYLOGIT_API_KEY is the key)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Which deployment is asked."""

    config: Annotated[Path | None, Positional("FILE")] = None
    """A deployment to serve meanwhile."""
    gate: Annotated[Path | None, Metavar("CHECKPOINT")] = None
    """With FILE: this gate (default: the configuration's)."""
    url: str | None = None
    """A running server instead; POLYLOGIT_API_KEY is its key (default: none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(TargetOptions):
    """Grade a deployment's answers to a file of prompts, through its HTTP endpoint."""

    models: Annotated[tuple[str, ...], Metavar("MODEL[=LABEL]")] = ()
    """Which to ask (default: all it offers, but not NAME alone, which is one of NAME:POLICY)."""
    prompts: Path
    """JSON lines with messages, answer, domain, id."""
    grader: str = "exact"
    """How a whole answer is graded."""
    output: Annotated[Path, Output()]
    """Results with every answer; an unfinished one is taken up."""
    limit: Annotated[int | None, whole(1)] = None
    """Only the first prompts (default: all)."""
    concurrency: Annotated[int, whole(1)] = 32
    """Requests in flight."""
    max_tokens: Annotated[int, whole(1)] = 256
    """Longer answers are cut and wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """One table and one plot of several evaluations."""

    results: Annotated[tuple[Path, ...], Positional("RESULTS")]
    """Written by evaluate."""
    compare: Annotated[str | None, Metavar("LABEL")] = None
    """This row against the best other, paired (default: no comparison)."""
    against: Annotated[tuple[str, ...], Metavar("LABEL")] = ()
    """The other rows (default: all)."""
    seed: Annotated[int, whole(0)] = 0
    """Of the bootstrap."""
    markdown: Annotated[Path | None, Output()] = None
    """Write the table here (default: print it)."""
    plot: Annotated[Path | None, Output()] = None
    """Write a PNG here (default: nowhere)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions(TargetOptions):
    """Show which expert chose each token of an answer, as a table and as a picture."""

    prompt: str
    """One user message."""
    model: str | None = None
    """Which to ask (default: the deployment's own)."""
    max_tokens: Annotated[int, whole(1)] = 256
    """Most tokens of the answer."""
    html: Annotated[Path | None, Output()] = None
    """Write a page here (default: nowhere)."""
    png: Annotated[Path | None, Output()] = None
    """Write an image here (default: nowhere)."""
