"""Shared by the tests that run a coordinator over fake engines."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.fake_engine import FakeModel


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def models() -> list[FakeModel]:
    return [FakeModel(0), FakeModel(1)]
