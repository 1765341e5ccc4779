"""A gate without one of its inputs no longer depends on it, and still depends on the others."""

import pytest
import torch

from gate import checkpoint
from gate.baselines.ablate import Without, main
from gate.model import GateModel
from tests.support.gate_examples import EXPERTS, HIDDEN, contract, topk

ROWS = 6


def coefficients(gate, lists, hidden, state):
    projected = torch.stack([gate.project(i, states) for i, states in enumerate(hidden)], dim=1)
    return gate.forward(*lists, projected, state)[0]


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(ROWS, size, generator=generator) for size in HIDDEN]
    return {"topk": topk(ROWS, generator), "hidden": hidden, "state": torch.randn(ROWS, 5, generator=generator)}


@pytest.mark.parametrize("removed", ["topk", "hidden", "state"])
def test_only_the_removed_input_no_longer_matters(tmp_path, removed):
    agreed = contract(state_size=5)
    checkpoint.save(GateModel(agreed), agreed, tmp_path / "whole.pt")
    whole = checkpoint.load(tmp_path / "whole.pt")
    checkpoint.save(Without(whole.module, removed), agreed, tmp_path / "without.pt")
    without = checkpoint.load(tmp_path / "without.pt")
    one, other = inputs(1), inputs(2)
    reference = coefficients(without, *one.values())
    for name in one:
        changed = coefficients(without, *{**one, name: other[name]}.values())
        assert torch.equal(changed, reference) == (name == removed), name
        assert not torch.equal(
            coefficients(whole, *{**one, name: other[name]}.values()), coefficients(whole, *one.values())
        )


def test_an_absent_expert_stays_absent(tmp_path):
    agreed = contract()
    checkpoint.save(GateModel(agreed), agreed, tmp_path / "whole.pt")
    gate = Without(checkpoint.load(tmp_path / "whole.pt").module, "topk")
    logprobs, ids = topk(ROWS)
    logprobs[:, 1] = -torch.inf
    found, _ = gate(logprobs, ids, torch.zeros(ROWS, len(EXPERTS), 4), torch.zeros(ROWS, 0))
    assert (found[:, 1] == 0).all()


def test_the_command_makes_the_folder_of_its_output(tmp_path):
    agreed = contract()
    checkpoint.save(GateModel(agreed), agreed, tmp_path / "whole.pt")
    output = tmp_path / "new" / "without.pt"
    main(["--gate", str(tmp_path / "whole.pt"), "--remove", "topk", "--output", str(output)])
    assert checkpoint.load(output).contract == agreed


def test_an_input_that_the_gate_does_not_read_is_a_wrong_argument(tmp_path, capsys):
    agreed = contract()
    checkpoint.save(GateModel(agreed), agreed, tmp_path / "whole.pt")
    with pytest.raises(SystemExit) as ended:
        main(["--gate", str(tmp_path / "whole.pt"), "--remove", "state", "--output", str(tmp_path / "without.pt")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("whole.pt does not read state\n")
