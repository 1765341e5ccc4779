"""What `polylogit top` shows: one reading of /metrics, compared with an earlier one, as tables and bars."""

from __future__ import annotations

import math
import time

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.tools.top.scrape import Change, Sample

_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
_OUTCOMES = {"ok": "ok", "4xx": "client_error", "5xx": "server_error", "left": "disconnected"}
_COLOURS = ("green", "yellow", "blue", "magenta", "cyan", "red", "bright_green", "bright_blue")
_BAR = 60
"""Characters for a whole tick."""


def frame(url: str, change: Change) -> RenderableType:
    """The whole screen. Where nothing was generated in `change`, what is of tokens is since the server's start."""
    tokens = change
    span = f"over {change.seconds:.0f} s"
    if not change.grown("polylogit_tokens_total"):
        tokens, span = Change(Sample(0.0), change.after), "since the start (nothing is generated now)"
    return Group(
        _header(url, change.after),
        Panel(_requests(change, tokens), title="requests", title_align="left", border_style="dim"),
        Panel(_experts(tokens), title=f"experts, {span}", title_align="left", border_style="dim"),
        Panel(_tick(tokens), title=f"a tick, {span}", title_align="left", border_style="dim"),
        Panel(_fusion(tokens), title=f"fused tokens, {span}", title_align="left", border_style="dim"),
    )


def away(url: str, last: Change | None, problem: str) -> RenderableType:
    """The last frame, if there was one, under what is wrong."""
    message = Text(f"{problem}; trying again", style="bold red")
    return message if last is None else Group(message, frame(url, last))


def _header(url: str, sample: Sample) -> Text:
    ready = sample.value("polylogit_ready") == 1
    uptime = time.time() - sample.value("process_start_time_seconds")
    [model], [version] = (sample.label("polylogit_build_info", label) for label in ("model", "version"))
    text = Text.assemble((model, "bold"), f"  {url}  polylogit {version}  up {_span(uptime)}  ")
    return text.append("ready" if ready else "not ready", "green" if ready else "bold red")


def _requests(change: Change, tokens: Change) -> RenderableType:
    now = change.after
    rates = ", ".join(f"{short} {_completions(change, outcome):.1f}/s" for short, outcome in _OUTCOMES.items())
    running, queued = (
        f"{now.value(f'polylogit_{kind}_sequences'):.0f} of {now.value(f'polylogit_{kind}_sequences_limit'):.0f}"
        for kind in ("running", "queued")
    )
    table = Table.grid(padding=(0, 2))
    table.add_row("tokens", Text(f"{change.rate('polylogit_tokens_total'):.0f}/s", "bold"))
    table.add_row("completions", rates)
    table.add_row("sequences", f"running {running}, queued {queued}")
    table.add_row("first token", _quantiles(tokens, "polylogit_time_to_first_token_seconds"))
    table.add_row("between tokens", _quantiles(tokens, "polylogit_inter_token_latency_seconds"))
    table.add_row("in the queue", _quantiles(tokens, "polylogit_queue_seconds"))
    return table


def _completions(change: Change, outcome: str) -> float:
    """Completions a second that ended so."""
    return sum(change.rate("polylogit_http_requests_total", route=route, outcome=outcome) for route in _COMPLETIONS)


def _experts(change: Change) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True)
    table.add_column("expert", no_wrap=True)
    table.add_column("weight", ratio=1, min_width=6)
    for heading in ("", "decides", "step", "waits", "slowest", "KV", "cached", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, name in enumerate(change.after.label("polylogit_expert_up", "expert")):
        table.add_row(*_expert(change, name, _COLOURS[place % len(_COLOURS)]))
    return table


def _expert(change: Change, name: str, colour: str) -> tuple[RenderableType, ...]:
    def now(what: str) -> float:
        return change.after.value(f"polylogit_expert_{what}", expert=name)

    def grown(what: str) -> float:
        return change.grown(f"polylogit_expert_{what}", expert=name)

    weight = _ratio(grown("weight_sum"), grown("weight_count"))
    return (
        Text(name, colour) if now("up") else Text(f"{name} down", "bold red"),
        _bar(weight, colour),
        _percent(weight),
        _percent(_ratio(grown("decisive_tokens_total"), change.grown("polylogit_fused_tokens_total"))),
        _duration(change.quantile("polylogit_expert_step_seconds", 0.5, expert=name)),
        _percent(_ratio(grown("barrier_wait_seconds_total"), change.grown("polylogit_tick_seconds_sum"))),
        _percent(_ratio(grown("slowest_ticks_total"), change.grown("polylogit_ticks_total"))),
        _percent(now("kv_used_ratio")),
        _percent(_ratio(grown("cached_tokens_total"), grown("prefilled_tokens_total"))),
        f"{now('restarts_total'):.0f}",
    )


def _tick(change: Change) -> RenderableType:
    phases = change.after.label("polylogit_tick_phase_seconds_total", "phase")
    spent = {phase: change.grown("polylogit_tick_phase_seconds_total", phase=phase) for phase in phases}
    whole, ticks = sum(spent.values()), change.grown("polylogit_ticks_total")
    bar, legend = Text(), Text()
    for place, (phase, seconds) in enumerate(spent.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        bar.append("█" * round(_BAR * seconds / whole) if whole else "", colour)
        legend.append("■ ", colour).append(f"{phase} {_duration(_ratio(seconds, ticks))}   ")
    return Group(Text(f"{_duration(_ratio(whole, ticks))} on average, {ticks:.0f} ticks"), bar, legend)


def _fusion(change: Change) -> RenderableType:
    fused = change.grown("polylogit_fused_tokens_total")
    disagreements = change.grown("polylogit_disagreement_tokens_total")
    certain, open_ = (change.grown("polylogit_certificates_total", verdict=verdict) for verdict in ("certain", "open"))
    sums, counts = (change.grown(f"polylogit_coefficient_entropy_nats_{part}") for part in ("sum", "count"))
    entropy = _ratio(sums, counts)
    faults = {
        "gate": change.grown("polylogit_gate_failures_total"),
        "masked rows": change.grown("polylogit_expert_masked_rows_total"),
        "parked": change.grown("polylogit_parked_sequences_total"),
        "preempted": change.grown("polylogit_expert_preemptions_total"),
    }
    table = Table.grid(padding=(0, 2))
    table.add_row("experts disagree", _percent(_ratio(disagreements, fused)))
    table.add_row("greedy choice certified", _percent(_ratio(certain, certain + open_)))
    table.add_row("experts in use", "-" if math.isnan(entropy) else f"{math.exp(entropy):.2f}")
    table.add_row("faults survived", ", ".join(f"{name} {count:.0f}" for name, count in faults.items()))
    return table


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _bar(share: float, colour: str) -> ProgressBar:
    done = 0.0 if math.isnan(share) else share
    return ProgressBar(total=1.0, completed=done, style="grey23", complete_style=colour, finished_style=colour)


def _quantiles(change: Change, name: str) -> str:
    return "   ".join(f"p{share * 100:.0f} {_duration(change.quantile(name, share)):>8}" for share in (0.5, 0.95, 0.99))


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
