"""Tensor-parallel ranks: all hear the same, one speaks."""

from __future__ import annotations

import threading

from server.expert.ranks import coordinator_link
from server.placement import Placement
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint
from server.wire.expert import Add, BareDone, FromExpert, GetRows, Tick, ToExpert, WholeRows

SECONDS = 10.0
SAID = [
    Tick(1, b"", [], [], []),
    GetRows(1, b"\x00" * 4, ""),
    Tick(2, b"\x07\x00\x00\x00", [1], [2], []),
    Stop(),
]


def place(rank: int) -> Placement:
    return Placement(expert=2, generation=3, rank=rank, cpus=None, gpus=[])


def test_every_rank_hears_all_it_has_to_do_in_order_and_only_the_first_answers(tmp_path):
    """Questions for rows, which only the first may write to the coordinator's memory, go past the others."""
    coordinator: Channel[FromExpert, ToExpert] = Channel(endpoint(tmp_path, "expert-2-3"), FromExpert, bind=True)
    leader, *followers = (coordinator_link(place(rank), 3, tmp_path) for rank in range(3))
    for follower in followers:
        follower.send(BareDone([2.0]))
        follower.send(WholeRows(1, None))
    leader.send(BareDone([1.0]))
    assert coordinator.receive(SECONDS) == BareDone([1.0])
    for message in SAID:
        coordinator.send(message)
    assert [leader.receive(SECONDS) for _ in SAID] == SAID
    for follower in followers:
        to_do = [message for message in SAID if not isinstance(message, GetRows)]
        assert [follower.receive(SECONDS) for _ in to_do] == to_do
        assert follower.receive(0.05) is None
    assert leader.receive(0.05) is None
    assert coordinator.receive(0.05) is None
    for end in (leader, *followers, coordinator):
        end.close()


def test_a_rank_hears_all_of_a_message_larger_than_the_buffers_before_the_first_acts_on_it(tmp_path):
    """Else they would wait for each other in the next step."""
    coordinator: Channel[FromExpert, ToExpert] = Channel(endpoint(tmp_path, "expert-2-3"), FromExpert, bind=True)
    leader, follower = (coordinator_link(place(rank), 2, tmp_path) for rank in range(2))
    adds = [Add(slot, slot, [100_000] * 5000, 0) for slot in range(64)]  # about 1.6 MB
    heard: list[ToExpert | None] = []
    reader = threading.Thread(target=lambda: heard.append(follower.receive(SECONDS)))
    writer = threading.Thread(
        target=lambda: (coordinator.send(Tick(1, b"", [], [], adds)), coordinator.deliver(SECONDS))
    )
    reader.start()
    writer.start()
    assert leader.receive(SECONDS) == Tick(1, b"", [], [], adds)
    reader.join(SECONDS)  # the leader sends nothing more
    assert heard == [Tick(1, b"", [], [], adds)]
    writer.join(SECONDS)
    for end in (leader, follower, coordinator):
        end.close()


def test_a_single_rank_talks_to_the_coordinator_itself(tmp_path):
    coordinator: Channel[FromExpert, ToExpert] = Channel(endpoint(tmp_path, "expert-2-3"), FromExpert, bind=True)
    alone = coordinator_link(place(0), 1, tmp_path)
    assert isinstance(alone, Channel)
    alone.send(BareDone([1.0]))
    assert coordinator.receive(SECONDS) == BareDone([1.0])
    coordinator.send(SAID[0])
    assert alone.receive(SECONDS) == SAID[0]
    alone.close()
    coordinator.close()
