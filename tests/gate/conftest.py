"""Shared by the tests of the gate: every test starts from the same random numbers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
