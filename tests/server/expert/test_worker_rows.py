"""Whole rows, as a worker answers for them: through the socket, and through the coordinator's memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from server.wire.expert import Add, WholeRows
from server.wire.shared_rows import RowMemory
from tests.support.fake_engine import VOCABULARY, Behaviour
from tests.support.worker_script import Script, get_rows, run, tick, tokens_for, whole

NOTHING = np.full(VOCABULARY, -np.inf)


@pytest.fixture
def memory() -> Iterator[RowMemory]:
    made = RowMemory(4, VOCABULARY)
    yield made
    made.close()


def rows_of(answer: WholeRows) -> np.ndarray:
    assert answer.logprobs is not None
    return np.frombuffer(answer.logprobs, np.float32).reshape(-1, VOCABULARY)


class Look:
    """Asks for rows in shared memory, and keeps a copy of what the memory holds when the next message is due."""

    def __init__(self, memory: RowMemory) -> None:
        self._memory = memory
        self.seen: list[np.ndarray] = []

    def ask(self, slots: list[int]):
        return get_rows(slots, self._memory.path, len(slots))

    def then(self, message):
        def say(so_far: Script):
            self.seen.append(self._memory.rows.copy())
            return message(so_far) if callable(message) else message

        return say


THREE = [Add(0, 1, [1, 1], 0), Add(1, 2, [2], 1, temperature=0.5), Add(2, 3, [3], 2)]


def test_shown_rows_and_parked_ones():
    """Asked in the middle of a step, after one in which slot 0 was parked, and between steps; a dropped one is gone."""
    script, _ = run(
        tick(add=THREE),
        get_rows([2, 0, 1]),
        lambda so_far: tick(2, tokens=tokens_for(so_far.reports[-1], s0=0, s1=6, s2=0), park=[0], drop=[2]),
        get_rows([0, 1, 2]),
        lambda so_far: tick(3, tokens=[5], park=[1]),
        get_rows([0, 1]),
        tick(4, drop=[0]),
        get_rows([0, 1]),
        top_k=2,
    )
    answers = [rows_of(answer) for answer in script.of(WholeRows)]
    parked, moved = whole([1, 1]), whole([2, 6], 0.5)
    np.testing.assert_allclose(answers[0], [whole([3]), parked, whole([2], 0.5)], atol=1e-5)
    np.testing.assert_allclose(answers[1], [parked, moved, NOTHING], atol=1e-5)
    np.testing.assert_allclose(answers[2], [parked, moved], atol=1e-5)
    np.testing.assert_allclose(answers[3], [NOTHING, moved], atol=1e-5)


def test_the_same_through_shared_memory(memory):
    """The rows are where they were asked for before the answer is on its way, which says only that."""
    look = Look(memory)
    script, _ = run(
        tick(add=THREE),
        look.ask([2, 0, 1]),
        look.then(lambda so_far: tick(2, tokens=tokens_for(so_far.reports[-1], s0=0, s1=6, s2=0), park=[0], drop=[2])),
        look.ask([0, 1, 2]),
        look.then(lambda so_far: tick(3, tokens=[5], park=[1])),
        look.ask([1]),
        look.then(tick(4, drop=[0, 1])),
    )
    assert script.of(WholeRows) == [WholeRows(3, None), WholeRows(3, None), WholeRows(1, None)]
    parked, moved = whole([1, 1]), whole([2, 6], 0.5)
    np.testing.assert_allclose(look.seen[0][:3], [whole([3]), parked, whole([2], 0.5)], atol=1e-5)
    np.testing.assert_allclose(look.seen[1][:3], [parked, moved, NOTHING], atol=1e-5)
    np.testing.assert_allclose(look.seen[2][0], moved, atol=1e-5)
    np.testing.assert_array_equal(look.seen[2][1:], look.seen[1][1:])


def test_memory_that_cannot_be_opened_is_done_without():
    script, _ = run(
        tick(add=[Add(0, 1, [1, 1], 0)]),
        get_rows([0], "/proc/self/fd/999999"),
        lambda so_far: tick(2, tokens=[0], drop=[0]),
    )
    np.testing.assert_allclose(rows_of(script.of(WholeRows)[0])[0], whole([1, 1]), atol=1e-5)


def test_answers_carry_the_number_of_their_question():
    script, _ = run(
        tick(add=[Add(0, 1, [1], 0)]),
        get_rows([0], number=7),
        get_rows([0], number=8),
        lambda so_far: tick(2, tokens=[0], drop=[0]),
    )
    assert [answer.number for answer in script.of(WholeRows)] == [7, 8]


def test_what_is_shown_is_what_the_lists_are_of():
    """Not a step later, though the engine writes over its logits."""
    script, _ = run(
        tick(add=[Add(0, 1, [4, 5], 0)]),
        get_rows([0]),
        lambda so_far: tick(2, tokens=[9]),
        get_rows([0]),
        lambda so_far: tick(3, tokens=[9], drop=[0]),
    )
    for report, answer in zip(script.reports, script.of(WholeRows), strict=True):
        ids, logprobs = np.frombuffer(report.ids, np.int32), np.frombuffer(report.logprobs, np.float32)
        np.testing.assert_array_equal(rows_of(answer)[0, ids], logprobs)


def test_a_sequence_that_comes_back_forgets_its_parked_row():
    script, _ = run(
        tick(add=[Add(0, 1, [1, 1], 0)]),
        lambda so_far: tick(2, tokens=[0], park=[0]),
        tick(3, add=[Add(0, 1, [1, 1, 4], 0)]),
        get_rows([0]),
        lambda so_far: tick(4),
        get_rows([0]),
        lambda so_far: tick(5, tokens=[0], drop=[0]),
        behaviour=Behaviour(chunk=2),
    )
    early, due = (rows_of(answer)[0] for answer in script.of(WholeRows))
    assert np.isneginf(early).all()
    np.testing.assert_allclose(due, whole([1, 1, 4]), atol=1e-5)


def test_a_masked_row_stays_masked():
    script, _ = run(
        tick(add=[Add(0, 1, [1, 1], 0, grammar="5 6|7")]),
        get_rows([0]),
        lambda so_far: tick(2, tokens=[5], drop=[0]),
    )
    row = rows_of(script.of(WholeRows)[0])[0]
    assert np.flatnonzero(row > -np.inf).tolist() == [5, 6]
    assert np.exp(row[[5, 6]].astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
