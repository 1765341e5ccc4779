"""Puts the repository root on the path, so that the demo's training scripts can be imported and tested."""

import sys

import pytest
import torch

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
