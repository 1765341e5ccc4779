"""How long an expert that dies waits for its next start."""

from __future__ import annotations

from server.launch.restarts import Restarts


def test_an_expert_that_dies_again_waits_longer_each_time():
    """Up to half a minute; what is more than an hour ago does not count."""
    restarts = Restarts(per_hour=7)
    assert [restarts.pause(1000.0) for _ in range(7)] == [0, 1, 3, 7, 15, 30, 30]
    assert restarts.pause(1000.0) is None
    assert restarts.pause(4600.0) is None
    assert restarts.pause(4601.0) == 0


def test_no_restart_is_granted_where_none_is_allowed():
    assert Restarts(per_hour=0).pause(0.0) is None
