"""What `polylogit record` and `polylogit train` are told; the work is in `record` and `train` beside this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gate.options import Metavar, Output, Positional, names, number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOptions:
    """Make graded responses for a gate to learn from."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""
    prompts: Path
    """JSON lines: "id", "messages", "answer", ...."""
    grader: str
    """What grades a response: exact, numeric[:TOLERANCE], regex[:PATTERN], json, python[:SECONDS], or
    package.module:function."""
    output: Annotated[Path, Output(folder=True)]
    """Directory of the records; goes on if some are there."""
    policies: Annotated[tuple[str, ...] | None, names] = None
    """Comma-separated experts and policies that make responses (default: all that need no gate)."""
    gate: Annotated[Path | None, Metavar("CHECKPOINT")] = None
    """Also sample with this gate (default: none)."""
    answers: bool = False
    """Also score the prompts' "answer"."""
    responses: Path | None = None
    """Also score these: JSON lines of "id" and "response" (default: none)."""
    samples: Annotated[int, whole(1)] = 1
    """Responses of each policy to each prompt."""
    temperature: Annotated[float, number(0, 2)] = 1.0
    """Of the sampling; 0 is greedy."""
    max_tokens: Annotated[int, whole(1)] = 512
    """Longer responses are cut and count as wrong."""
    top_k: Annotated[int | None, whole(1)] = None
    """Of each expert and token keep so many of the most probable tokens; gates that learn from the records read as many
    (default: what the --gate reads, else 32)."""
    limit: Annotated[int | None, whole(1)] = None
    """Use only the first prompts (default: all)."""
    no_hidden: bool = False
    """Leave out hidden states."""
    seed: Annotated[int, whole(0)] = 0
    """Of the sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """The second phase of `polylogit train`; the names are the command line's."""

    refine_steps: Annotated[int, whole(0)] = 0
    """Steps of refinement; 0: none."""
    prompts: Path | None = None
    """To sample for (default: none; needed with --refine-steps)."""
    grader: str | None = None
    """What grades a sample, as for record (default: none; needed with --refine-steps)."""
    refine_prompts: Annotated[int, whole(1)] = 32
    """Prompts a step."""
    group: Annotated[int, whole(2)] = 8
    """Samples a prompt."""
    refine_rate: Annotated[float, number(0, 1)] = 1e-3
    """Learning rate."""
    kl: Annotated[float, number(0, 100)] = 0.01
    """Weight of the divergence from the gate at the start."""
    temperature: Annotated[float, number(0.01, 2)] = 1.0
    """Of the samples."""
    max_tokens: Annotated[int, whole(1)] = 512
    """Longer samples are cut and count as wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Train a gate on recorded responses."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""
    records: Path
    """Directory written by polylogit record."""
    output: Annotated[Path, Output()] = Path("gate.pt")
    """The checkpoint."""
    inputs: str = "topk,hidden"
    """What the gate reads: topk, hidden or both."""
    state_size: Annotated[int, whole(0)] = 0
    """Of a recurrent state; 0: none."""
    projected_size: Annotated[int, whole(1)] = 12
    """Of each expert's projected hidden state."""
    space: Literal["logprob", "prob"] = "logprob"
    """What the coefficients weigh: log-probabilities or probabilities."""
    updates: Annotated[int, whole(1)] = 1000
    """Updates on recorded responses, at most."""
    batch_size: Annotated[int, whole(1)] = 128
    """Responses an update."""
    rate: Annotated[float, number(0, 1)] = 3e-3
    """Learning rate on recorded responses."""
    negative_weight: Annotated[float, number(0, 10)] = 0.02
    """Of a wrong response's tokens."""
    validation: Annotated[float, number(0, 0.9)] = 0.1
    """Share of the prompts held out."""
    responses: Annotated[int | None, whole(1)] = None
    """Use only so many responses, chosen at random (default: all)."""
    seed: Annotated[int, whole(0)] = 0
    """Of the weights, the batches and the held-out prompts."""
    device: str | None = None
    """Where to train (default: a GPU if there is one)."""
    refine: RefineOptions = field(default_factory=RefineOptions)
    """Refinement: then learn from the gate's own samples, made by the deployment."""
