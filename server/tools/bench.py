"""`polylogit bench`: what a fused token costs beside each expert alone, in one run, on the same engines.

For each number of sequences, short runs alternate: `fused` (all chosen experts, one token a tick), `single` (one expert
through the same machinery), `bare` (the same engine stepping by itself, no rendezvous, all engines at the same time).
Tokens are greedy, or sampled at a temperature; with log-probabilities or without. What that takes of the experts, bytes
and whole rows, stands beside the times. The machine may be shared, so the figure to quote is the median over rounds of
the ratio within a round; the processor time stolen by the host stands beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from server.config import Config, load_config
from server.errors import ConfigError
from server.launch.local import LocalDeployment
from server.policy import Gate, Policy, Single, Uniform
from server.request import SamplingParams, SequenceRequest
from server.text.model_files import read_model_files
from server.tools.options import BenchOptions
from server.tools.provenance import about, cpu_times, steal
from server.wire.expert import Bare
from server.wire.stats import Stats

_PROMPT_IDS = 250
"""Prompts are of the first so many token ids: ordinary ones in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What experts showed of their distributions in a fused run."""

    lists: float
    """Bytes a token of lists, of all experts together."""
    rows: float
    """Bytes a token of whole rows, of all experts together."""
    whole: dict[str, float]
    """Why -> share of the tokens for which rows had to be whole; reasons of `server.wire.stats.Stats.whole_rows`."""


@dataclass(frozen=True, slots=True)
class Round:
    """One interleaved round: milliseconds a step (median within the run) of each thing compared."""

    sequences: int
    """How many ran together."""
    fused: float
    """All chosen experts, one token a tick."""
    single: dict[str, float]
    """Expert -> it alone, through the same machinery."""
    bare: dict[str, float]
    """Expert -> its engine by itself, all engines at the same time."""
    parts: dict[str, float]
    """Where the fused ticks' time went, mean milliseconds a tick: phases of `server.coordinator.clock.Phase`."""
    shown: Shown
    """What that took of the experts."""
    steal: float
    """Share of processor time that the host took meanwhile."""

    @property
    def ratio(self) -> float:
        """Fused over the slowest bare engine."""
        return self.fused / max(self.bare.values())


def bench(options: BenchOptions) -> int:
    """Run the command; the exit code. Raises ConfigError, StartError."""
    config = choose_experts(load_config(options.config), options.experts, gated=options.gate)
    if config.limits.sequences < max(options.sequences):
        raise ConfigError(f"limits.sequences is {config.limits.sequences}, fewer than {max(options.sequences)}")
    if options.list_length is not None:
        config = msgspec.structs.replace(config, list_length=options.list_length)
    vocabulary = check_lengths(config, options.prompt_tokens, options.tokens)
    with LocalDeployment(config) as deployment:
        runner = _Runner(deployment, config, options, vocabulary)
        rounds = _measure(runner, options.sequences, options.rounds)
    console = Console(width=140)
    console.print(_table(config, rounds))
    console.print(_parts_table(rounds))
    console.print(_shown_table(rounds))
    for line in _gate_lines(rounds) if options.gate else []:
        console.print(line)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = about() | {"rounds": [asdict(entry) | {"ratio": entry.ratio} for entry in rounds]}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def choose_experts(config: Config, names: Sequence[str], *, gated: bool = False) -> Config:
    """`config` reduced to some of its experts (`names`, or all), without a gate, fused uniformly; or, `gated`, as it
    is, fused by its gate. Raises ConfigError."""
    if gated:
        if config.gate is None or names:
            raise ConfigError("--gate needs a gate in the configuration, and all experts that it was trained for")
        return msgspec.structs.replace(config, policies={"gate": Gate()}, default_policy="gate")
    wanted = names or config.expert_names
    if unknown := [name for name in wanted if name not in config.expert_names]:
        raise ConfigError(f"--experts: no expert is named {unknown[0]!r} (there are {', '.join(config.expert_names)})")
    experts = [expert for expert in config.experts if expert.name in wanted]
    return msgspec.structs.replace(
        config, experts=experts, gate=None, policies={"uniform": Uniform()}, default_policy="uniform"
    )


def check_lengths(config: Config, prompt_tokens: int, tokens: int) -> int:
    """The smallest vocabulary. Raises ConfigError if some expert's context is shorter than a prompt and its answer."""
    sizes = []
    for expert in config.experts:
        files = read_model_files(config.path(expert.model), weights=False)
        room = min(expert.max_model_len or files.max_positions, files.max_positions)
        if room < prompt_tokens + tokens:
            lengths = f"--prompt-tokens {prompt_tokens} and --tokens {tokens}"
            raise ConfigError(f"{lengths}: expert {expert.name} has room for {room} together")
        sizes.append(files.vocab_size)
    return min(sizes)


def _measure(runner: _Runner, counts: Sequence[int], rounds: int) -> list[Round]:
    """`rounds` rounds of each number of sequences, taking turns, after one of each that warms up."""
    measured: list[Round] = []
    with Bar(transient=True) as bar:
        work = bar.add_task("rounds", total=rounds * len(counts))
        for index in range(rounds + 1):
            for count in counts:
                one = runner.round(count)
                if index:
                    measured.append(one)
                    bar.advance(work)
    return measured


class _Runner:
    """Short runs on one deployment."""

    def __init__(self, deployment: LocalDeployment, config: Config, options: BenchOptions, vocabulary: int) -> None:
        self._deployment = deployment
        self._names = config.expert_names
        self._fused = config.policies[config.default_policy]
        self._options = options
        self._ids = min(vocabulary, _PROMPT_IDS)
        self._next = 1

    def round(self, sequences: int) -> Round:
        """Each thing once, one after another."""
        before, options = cpu_times(), self._options
        alone = Bare(sequences, options.prompt_tokens, options.tokens)
        bare = self._deployment.bare(list(range(len(self._names))), alone)
        earlier = self._deployment.stats()
        fused = self._policy(self._fused, sequences)
        later = self._deployment.stats()
        single = {name: self._policy(Single(name), sequences) for name in self._names}
        return Round(
            sequences=sequences,
            fused=fused,
            single=single,
            bare={self._names[index]: _decoding(seconds) for index, seconds in bare.items()},
            parts=_parts(earlier, later),
            shown=_shown(earlier, later),
            steal=steal(before, cpu_times()),
        )

    def _policy(self, policy: Policy, sequences: int) -> float:
        """Milliseconds between two ticks while all sequences decode."""
        requests = [self._request(policy, index) for index in range(sequences)]
        results = self._deployment.generate(requests)
        arrivals = results[requests[-1].id].arrivals
        return float(np.median(np.diff(arrivals)[1:])) * 1e3

    def _request(self, policy: Policy, index: int) -> SequenceRequest:
        options = self._options
        prompt = [(7 * index + position) % self._ids for position in range(options.prompt_tokens)]
        request = SequenceRequest(
            id=self._next,
            prompts=[prompt if not isinstance(policy, Single) or name == policy.expert else [] for name in self._names],
            policy=policy,
            sampling=SamplingParams(temperature=options.temperature, seed=self._next),
            max_tokens=options.tokens,
            top_logprobs=options.top_logprobs,
        )
        self._next += 1
        return request


def _decoding(seconds: list[float]) -> float:
    """Median milliseconds of a step, prefill left out."""
    return statistics.median(seconds[2:]) * 1e3


def _parts(before: Stats, after: Stats) -> dict[str, float]:
    """Mean milliseconds of a tick's parts between two snapshots."""
    ticks = max(1, after.ticks - before.ticks)
    whole = 1e3 * (after.tick_seconds.sum - before.tick_seconds.sum) / ticks
    spent = after.phase_seconds.items()
    return {"tick": whole} | {phase: 1e3 * (late - before.phase_seconds[phase]) / ticks for phase, late in spent}


def _shown(before: Stats, after: Stats) -> Shown:
    """What experts showed between two snapshots."""
    tokens = max(1, after.tokens - before.tokens)
    lists, rows = ((_received(after, kind) - _received(before, kind)) / tokens for kind in ("lists", "rows"))
    whole = {why: (count - before.whole_rows[why]) / tokens for why, count in after.whole_rows.items()}
    return Shown(lists, rows, whole)


def _received(stats: Stats, kind: str) -> int:
    """Bytes from all experts together."""
    return sum(expert.received_bytes[kind] for expert in stats.experts)


def _gate_lines(rounds: list[Round]) -> list[str]:
    """The gate's forward pass beside the tick; its projections run inside the engines' steps."""
    lines = []
    for count in sorted({entry.sequences for entry in rounds}):
        of = [entry.parts for entry in rounds if entry.sequences == count]
        share = statistics.median(entry["gate"] / entry["tick"] for entry in of)
        milliseconds = statistics.median(entry["gate"] for entry in of)
        lines.append(f"gate at {count} sequences: {milliseconds:.3f} ms, {100 * share:.1f}% of a tick")
    return lines


def _parts_table(rounds: list[Round]) -> Table:
    """Where a fused tick goes."""
    table = Table(title="where a fused tick goes: mean ms, medians over rounds")
    table.add_column("sequences", justify="right")
    for part in rounds[0].parts:
        table.add_column(part, justify="right")
    for count in sorted({entry.sequences for entry in rounds}):
        of = [entry.parts for entry in rounds if entry.sequences == count]
        table.add_row(
            str(count), *(f"{statistics.median(entry[part] for entry in of):.2f}" for part in rounds[0].parts)
        )
    return table


def _shown_table(rounds: list[Round]) -> Table:
    """What the fused runs took of the experts."""
    table = Table(title="what experts showed for a fused token, medians over rounds")
    for column in ("sequences", "bytes of lists", "bytes of whole rows"):
        table.add_column(column, justify="right")
    for reason in rounds[0].shown.whole:
        table.add_column(f"whole rows: {reason}", justify="right")
    for count in sorted({entry.sequences for entry in rounds}):
        of = [entry.shown for entry in rounds if entry.sequences == count]
        shares = {why: statistics.median(entry.whole[why] for entry in of) for why in of[0].whole}
        table.add_row(
            str(count),
            f"{statistics.median(entry.lists for entry in of):,.0f}",
            f"{statistics.median(entry.rows for entry in of):,.0f}",
            *(f"{100 * share:.1f}%" for share in shares.values()),
        )
    return table


def _table(config: Config, rounds: list[Round]) -> Table:
    table = Table(title=f"ms per token step, medians of {len(rounds) // len({r.sequences for r in rounds})} rounds")
    for column in ("sequences", "fused", *(f"single {name}" for name in config.expert_names)):
        table.add_column(column, justify="right")
    for column in (*(f"bare {name}" for name in config.expert_names), "fused / slowest bare", "tokens/s", "steal"):
        table.add_column(column, justify="right")
    for count in sorted({entry.sequences for entry in rounds}):
        of = [entry for entry in rounds if entry.sequences == count]
        fused = statistics.median(entry.fused for entry in of)
        table.add_row(
            str(count),
            f"{fused:.2f}",
            *(f"{statistics.median(entry.single[name] for entry in of):.2f}" for name in config.expert_names),
            *(f"{statistics.median(entry.bare[name] for entry in of):.2f}" for name in config.expert_names),
            f"{statistics.median(entry.ratio for entry in of):.2f}",
            f"{count / fused * 1e3:.0f}",
            f"{100 * statistics.median(entry.steal for entry in of):.0f}%",
        )
    return table
