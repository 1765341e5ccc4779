"""Puts the repository root on the path, so that the demo's training scripts can be imported and tested."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
