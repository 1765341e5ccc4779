"""The worker over a fake engine, told what to do message by message, in one thread. Whole rows: `test_worker_rows`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from server.wire.expert import Add, Bare, BareDone, Load, Ready, Report, Scored, WholeRows
from tests.support.fake_engine import VOCABULARY, Behaviour
from tests.support.worker_script import MODEL, get_rows, run, tick, tokens_for, whole


def rows_of(report: Report) -> dict[int, tuple[int, np.ndarray, np.ndarray]]:
    """slot -> (position, ids, log-probabilities)."""
    slots = np.frombuffer(report.slots, np.int32)
    positions = np.frombuffer(report.positions, np.int32)
    ids = np.frombuffer(report.ids, np.int32).reshape(len(slots), -1)
    logprobs = np.frombuffer(report.logprobs, np.float32).reshape(len(slots), -1)
    return {int(slot): (int(positions[row]), ids[row], logprobs[row]) for row, slot in enumerate(slots)}


def exact_of(report: Report) -> dict[int, np.ndarray]:
    slots = np.frombuffer(report.slots, np.int32)
    return dict(zip(slots.tolist(), np.frombuffer(report.exact, np.float32).reshape(len(slots), -1), strict=True))


def test_a_conversation_from_ready_to_stop():
    add = Add(3, 77, [5, 6, 7], 0)
    script, engine = run(
        tick(10, add=[add]),
        lambda so_far: tick(11, tokens=[9]),
        lambda so_far: tick(12, tokens=[2], drop=[3]),
    )
    assert isinstance(script.heard[0], Ready)
    assert [report.number for report in script.reports] == [10, 11]
    for report, history in zip(script.reports, ([5, 6, 7], [5, 6, 7, 9]), strict=True):
        position, ids, logprobs = rows_of(report)[3]
        assert position == len(history)
        best = np.argsort(-whole(history))[:4]
        assert ids.tolist() == best.tolist()
        np.testing.assert_allclose(logprobs, whole(history)[best], atol=1e-5)
        assert report.exact == b"" and report.projected == b""
    assert script.reports[0].cached_tokens == {77: 0} and script.reports[1].cached_tokens == {}
    assert isinstance(script.heard[-1], Load) and script.heard[-1].running == 0
    assert not engine.sequences and engine.steps == 2


def test_tokens_go_to_the_rows_they_were_chosen_for():
    adds = [Add(slot, 100 + slot, [slot, slot + 1], slot) for slot in range(6)]
    chosen = {f"s{slot}": slot * 7 % VOCABULARY for slot in range(6)}
    script, _ = run(
        tick(add=adds),
        lambda so_far: tick(2, tokens=tokens_for(so_far.reports[-1], **chosen)),
        lambda so_far: tick(3, tokens=tokens_for(so_far.reports[-1], **chosen), drop=range(6)),
    )
    orders = [np.frombuffer(report.slots, np.int32).tolist() for report in script.reports]
    assert any(order != sorted(order) for order in orders)
    for slot, (position, ids, _) in rows_of(script.reports[1]).items():
        assert position == 3
        assert ids[0] == whole([slot, slot + 1, chosen[f"s{slot}"]]).argmax()


def test_a_step_in_which_no_token_is_due_reports_no_rows():
    script, _ = run(
        tick(add=[Add(0, 1, list(range(9)), 0)]),
        lambda so_far: tick(2),
        lambda so_far: tick(3),
        lambda so_far: tick(4, tokens=[1], drop=[0]),
        behaviour=Behaviour(chunk=3),
    )
    assert [len(np.frombuffer(report.slots, np.int32)) for report in script.reports] == [0, 0, 1]


def test_temperatures_are_each_sequences_own():
    heat = {0: 0.5, 1: 1.0, 2: 2.0}
    script, _ = run(
        tick(add=[Add(slot, slot, [slot, 4], slot, [7], temperature) for slot, temperature in heat.items()]),
        lambda so_far: tick(2, tokens=[0, 0, 0], drop=[0, 1, 2]),
    )
    for slot, (_, ids, logprobs) in rows_of(script.reports[0]).items():
        expected = whole([slot, 4], heat[slot])
        np.testing.assert_allclose(logprobs, expected[ids], atol=1e-5)
        assert exact_of(script.reports[0])[slot][0] == pytest.approx(expected[7], abs=1e-5)


def test_exact_ids_are_padded_and_follow_the_slot():
    """Slot 1 is given to another sequence, with other ids and another temperature, in the tick that drops the first."""
    script, _ = run(
        tick(add=[Add(0, 1, [1], 0, [5, 6, 7]), Add(1, 2, [2], 1, [40]), Add(2, 3, [3], 2)]),
        lambda so_far: tick(2, tokens=tokens_for(so_far.reports[-1], s0=9, s1=9, s2=9)),
        lambda so_far: tick(
            3,
            tokens=tokens_for(so_far.reports[-1], s0=9, s1=9, s2=9),
            drop=[1],
            add=[Add(1, 4, [8], 3, [11, 12], 0.5)],
        ),
        lambda so_far: tick(4, tokens=[0, 0, 0], drop=[0, 1, 2]),
    )
    first, last = exact_of(script.reports[0]), exact_of(script.reports[2])
    np.testing.assert_allclose(first[0], whole([1])[[5, 6, 7]], atol=1e-5)
    np.testing.assert_allclose(first[1], [whole([2])[40], -np.inf, -np.inf], atol=1e-5)
    assert (first[2] == -np.inf).all()
    np.testing.assert_allclose(exact_of(script.reports[1])[1][:1], whole([2, 9])[[40]], atol=1e-5)
    np.testing.assert_allclose(last[0], whole([1, 9, 9])[[5, 6, 7]], atol=1e-5)
    np.testing.assert_allclose(last[1], [*whole([8], 0.5)[[11, 12]], -np.inf], atol=1e-5)


def test_a_slot_that_changes_hands_in_one_tick():
    """The same slots in the same rows, but not what they asked for."""
    script, _ = run(
        tick(add=[Add(0, 1, [1], 0, [5], 0.5)]),
        lambda so_far: tick(2, tokens=[9], drop=[0], add=[Add(0, 2, [8], 1, [11, 12], 2.0)]),
        lambda so_far: tick(3, tokens=[9], drop=[0]),
    )
    for report, ids, expected in zip(script.reports, ([5], [11, 12]), (whole([1], 0.5), whole([8], 2.0)), strict=True):
        np.testing.assert_allclose(exact_of(report)[0], expected[ids], atol=1e-5)


def test_rows_carry_entropies_where_a_sequence_asks():
    """All of a step's rows do, as long as one of them asks."""
    script, _ = run(
        tick(add=[Add(0, 1, [1, 2], 0), Add(1, 2, [3], 1, temperature=0.5)]),
        lambda so_far: tick(2, tokens=[0, 0], add=[Add(2, 3, [4], 2, entropy=True)]),
        lambda so_far: tick(3, tokens=tokens_for(so_far.reports[-1], s0=9, s1=9, s2=9), drop=[2]),
        lambda so_far: tick(4, tokens=[0, 0], drop=[0, 1]),
    )
    before, asked, after = script.reports
    assert before.entropies == after.entropies == b""
    slots = np.frombuffer(asked.slots, np.int32).tolist()
    found = dict(zip(slots, np.frombuffer(asked.entropies, np.float32).tolist(), strict=True))
    expected = {0: whole([1, 2, 0]), 1: whole([3, 0], 0.5), 2: whole([4])}
    for slot, logprobs in expected.items():
        assert found[slot] == pytest.approx(float(entropy(np.exp(logprobs))), rel=1e-4)


class Projector:
    """Two of the hidden state's numbers, and which expert it was."""

    def project(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden[:, :2], torch.full((len(hidden), 1), float(expert))], 1)


def test_hidden_states_travel_projected():
    script, _ = run(
        tick(add=[Add(slot, slot, [slot, 3], slot) for slot in range(3)]),
        lambda so_far: tick(2, tokens=[0] * 3, drop=range(3)),
        projector=Projector(),
    )
    report = script.reports[0]
    projected = np.frombuffer(report.projected, np.float32).reshape(3, 3)
    for row, slot in enumerate(np.frombuffer(report.slots, np.int32).tolist()):
        np.testing.assert_allclose(projected[row], [*MODEL.hidden([slot, 3])[:2], 1.0])


def test_a_scored_prompt_is_answered_once():
    prompt = [5, 9, 30, 2]
    script, _ = run(
        tick(add=[Add(0, 42, prompt, 0, score=True)]),
        lambda so_far: tick(2, tokens=[0]),
        lambda so_far: tick(3, tokens=[0], drop=[0]),
        behaviour=Behaviour(),
    )
    (scored,) = script.of(Scored)
    expected = [whole(prompt[:at])[prompt[at]] for at in range(1, 4)]
    assert scored.sequence == 42
    np.testing.assert_allclose(np.frombuffer(scored.logprobs, np.float32), expected, atol=1e-5)


def test_a_stop_in_the_middle_of_a_step_ends_it():
    script, engine = run(tick(add=[Add(0, 1, [1], 0)]))
    assert len(script.reports) == 1 and engine.steps == 1


def test_bare_runs_and_unknown_slots():
    script, _ = run(Bare(2, 8, 3), tick(drop=[5], park=[6]), get_rows([4]))
    assert script.of(BareDone) == [BareDone([0.002] * 3)]
    assert np.isneginf(np.frombuffer(script.of(WholeRows)[0].logprobs, np.float32)).all()
    assert not script.reports
