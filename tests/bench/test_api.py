"""The worst bodies of nearly 4 MB, and the longest answers, neither break the api nor keep its event loop busy for
long. What it costs exactly is for `python -m tests.bench.api` on a quiet machine to say."""

from __future__ import annotations

from tests.bench.api import bench, bodies

STALL_SECONDS = 0.15
"""Of processor time, which other processes hardly change; three times what a quiet machine must keep."""


async def test_what_is_long_leaves_the_event_loop_free() -> None:
    async with bench() as api:
        for name, (path, body) in bodies().items():
            status, spent = await api.refusal(path, body)
            assert status in (200, 400), name
            assert spent.stall_cpu < STALL_SECONDS, (name, spent)
        length, spent = await api.whole(16, 500)
        assert length > 5_000_000 and spent.stall_cpu < STALL_SECONDS, spent
        streams = await api.streams(8, 16)
        assert len(streams.first) == 8 and min(streams.first) > 0 and streams.cpu_per_token > 0
