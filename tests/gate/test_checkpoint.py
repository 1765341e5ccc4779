"""Saved gates compute what the Python module computes, and damaged files are refused."""

import pytest
import torch

from gate import checkpoint
from gate.contract import CheckpointError, read_contract
from gate.model import GateModel
from tests.support.gate_examples import EXPERTS, HIDDEN, contract, topk

FAMILIES = [(inputs, state) for inputs in (("topk",), ("hidden",), ("topk", "hidden")) for state in (0, 6)]


def inputs_for(agreed, rows=5):
    logprobs, ids = topk(rows)
    projected = torch.randn(rows, len(EXPERTS), agreed.projected_size)
    return logprobs, ids, projected, torch.zeros(rows, agreed.state_size)


@pytest.mark.parametrize(("inputs", "state_size"), FAMILIES)
def test_round_trip(tmp_path, inputs, state_size):
    agreed = contract(inputs, state_size)
    model = GateModel(agreed).eval()
    checkpoint.save(model, agreed, tmp_path / "gate.pt")
    gate = checkpoint.load(tmp_path / "gate.pt")
    assert gate.contract == agreed == read_contract(tmp_path / "gate.pt")
    arguments = inputs_for(agreed)
    coefficients, state = gate.forward(*arguments)
    expected, expected_state = model(*arguments)
    torch.testing.assert_close(coefficients, expected)
    torch.testing.assert_close(state, expected_state)
    assert coefficients.shape == (5, 3)
    assert state.shape == (5, state_size)
    torch.testing.assert_close(coefficients.sum(1), torch.ones(5))


def test_projection_is_per_expert(tmp_path):
    agreed = contract()
    model = GateModel(agreed).eval()
    checkpoint.save(model, agreed, tmp_path / "gate.pt")
    gate = checkpoint.load(tmp_path / "gate.pt")
    for expert, size in enumerate(HIDDEN):
        hidden = torch.randn(5, size)
        projected = gate.project(expert, hidden)
        assert projected.shape == (5, agreed.projected_size)
        torch.testing.assert_close(projected, model.project(expert, hidden))


def test_projection_without_hidden_states_is_empty(tmp_path):
    agreed = contract(("topk",))
    checkpoint.save(GateModel(agreed), agreed, tmp_path / "gate.pt")
    assert checkpoint.load(tmp_path / "gate.pt").project(0, torch.randn(5, 16)).shape == (5, 0)


def test_state_carries_the_past():
    agreed = contract(("topk", "hidden"), state_size=6)
    model = GateModel(agreed).eval()
    first, now = inputs_for(agreed), inputs_for(agreed)
    _, state = model(*first)
    fresh, _ = model(*now)
    after, _ = model(*now[:3], state)
    assert not torch.allclose(fresh, after)


def test_absent_experts_get_no_weight():
    agreed = contract()
    logprobs, ids, projected, state = inputs_for(agreed)
    logprobs[0, 1], ids[0, 1] = -torch.inf, -1
    logprobs[1], ids[1] = -torch.inf, -1
    coefficients, _ = GateModel(agreed)(logprobs, ids, projected, state)
    assert coefficients[0, 1] == 0
    torch.testing.assert_close(coefficients[1], torch.full((3,), 1 / 3))


def test_a_row_does_not_depend_on_its_batch():
    agreed = contract(state_size=6)
    model = GateModel(agreed).eval()
    arguments = inputs_for(agreed)
    together, _ = model(*arguments)
    alone, _ = model(*(part[2:3] for part in arguments))
    torch.testing.assert_close(together[2:3], alone)


def test_corrupt_archive(tmp_path):
    agreed = contract()
    path = tmp_path / "gate.pt"
    checkpoint.save(GateModel(agreed), agreed, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no gate checkpoint"):
        checkpoint.load(tmp_path / "gate.pt")


def test_contradictory_contract_is_not_saved(tmp_path):
    broken = contract(("topk",), state_size=-1)
    with pytest.raises(CheckpointError, match="state_size"):
        checkpoint.save(GateModel(contract(("topk",))), broken, tmp_path / "gate.pt")
