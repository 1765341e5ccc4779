"""All counters as one `Stats`."""

from __future__ import annotations

from collections.abc import Sequence

from server.coordinator.coordinator import Coordinator
from server.coordinator.links import ExpertLink
from server.coordinator.observer import Observer
from server.wire.expert import Load
from server.wire.stats import ExpertStats, Stats


def snapshot(observer: Observer, coordinator: Coordinator, links: Sequence[ExpertLink]) -> Stats:
    counters, clock = observer.counters, observer.clock
    return Stats(
        ticks=counters.ticks,
        tokens=counters.tokens,
        running=coordinator.sequences.running,
        queued=coordinator.sequences.waiting,
        parked=counters.parked,
        readded=counters.readded,
        position_faults=counters.position_faults,
        gate_failures=counters.gate_failures,
        finished=dict(counters.finished),
        queue_seconds=counters.queue_seconds.snapshot(),
        tick_seconds=clock.ticks.snapshot(),
        phase_seconds={phase.value: seconds for phase, seconds in clock.seconds.items()},
        bound=counters.bound.snapshot(),
        whole_rows=dict(counters.whole_rows),
        fusion=observer.tally.snapshot(),
        experts=[_expert(observer, link) for link in links],
    )


def _expert(observer: Observer, link: ExpertLink) -> ExpertStats:
    own, load = observer.counters.experts[link.index], link.load or Load(0.0, 0, 0)
    return ExpertStats(
        name=link.name,
        up=link.up,
        engine=link.info.version if link.info else "",
        restarts=link.restarts,
        weight=observer.tally.shares(link.index),
        decisive_tokens=observer.tally.decisive(link.index),
        step_seconds=own.step_seconds.snapshot(),
        barrier_wait_seconds=own.barrier_wait_seconds,
        slowest_ticks=own.slowest_ticks,
        kv_used=load.kv_used,
        kv_tokens=link.info.kv_tokens if link.info else 0,
        running=load.running,
        preemptions=load.preemptions,
        masked_rows=own.masked_rows,
        prefilled_tokens=own.prefilled_tokens,
        cached_tokens=own.cached_tokens,
        received_bytes=dict(own.received_bytes),
    )
