"""Random models of a large vocabulary, and what is recorded of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gate.options import OptionsError
from tests.bench import random_model
from tests.bench.exactness import recording

SPREAD, APART = 3.0, 0.4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> recording.Recording:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    options = random_model.RandomModelOptions(
        folder=folder, hidden=32, layers=1, vocabulary=2000, spread=SPREAD, apart=APART
    )
    random_model.run(options)
    return recording.load("random", folder, lambda: recording.random_pair(folder))


def test_the_models_spread_and_agree_as_told(recorded: recording.Recording) -> None:
    assert recorded.experts == ["a", "b"]
    assert recorded.logprobs.shape == (recording.TOKENS * len(recording.QUESTIONS), 2, 2000)
    assert np.logaddexp.reduce(recorded.logprobs, axis=-1) == pytest.approx(0, abs=1e-4)
    assert recorded.logprobs.std(-1).mean() == pytest.approx(SPREAD, rel=0.15)
    together = np.mean([np.corrcoef(*position)[0, 1] for position in recorded.logprobs])
    assert together == pytest.approx((1 - APART**2) ** 0.5, abs=0.05)


def test_a_recording_is_made_once(recorded: recording.Recording, tmp_path: Path) -> None:
    kept = recording.load("other", tmp_path, lambda: recorded)
    again = recording.load("other", tmp_path, lambda: pytest.fail("made again"))
    assert np.array_equal(kept.logprobs, again.logprobs) and kept.experts == again.experts


def test_models_apart_need_matrices_of_their_own() -> None:
    with pytest.raises(OptionsError, match="needs a --spread"):
        random_model.RandomModelOptions(folder=Path("x"), apart=0.5)
