"""What a worker says of logits, against scipy over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from server.coordinator.bounds import MASS_SLACK
from server.expert.logprobs import statistics


def logits(rows: int = 5, vocabulary: int = 30, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def whole(values: torch.Tensor) -> np.ndarray:
    """float64[B, V] log-probabilities."""
    return log_softmax(values.double().numpy(), axis=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_best_are_normalised_over_the_whole_vocabulary(dtype):
    values = logits().to(dtype)
    ids, logprobs = statistics(values).top_k(7)
    expected = whole(values)
    assert ids.shape == logprobs.shape == (5, 7)
    assert logprobs.dtype == torch.float32
    np.testing.assert_allclose(logprobs.numpy(), -np.sort(-expected, axis=1)[:, :7], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, ids.numpy(), 1), logprobs.numpy(), atol=1e-5)


def test_a_list_is_never_longer_than_the_vocabulary():
    ids, logprobs = statistics(logits(vocabulary=4)).top_k(7)
    assert ids.shape == logprobs.shape == (5, 4)
    assert ids.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5


def test_each_row_is_divided_by_its_temperature():
    values, heat = logits(3), torch.tensor([[0.5], [1.0], [3.0]])
    found = statistics(values, heat).gather(torch.arange(30).expand(3, -1))
    np.testing.assert_allclose(found.numpy(), whole(values.double() / heat.double()), atol=1e-4)


def test_ids_that_are_named():
    values = logits(2)
    found = statistics(values).gather(torch.tensor([[3, -1, 29], [-1, -1, 0]])).numpy()
    expected = whole(values)
    np.testing.assert_allclose(found[0, [0, 2]], expected[0, [3, 29]], atol=1e-5)
    assert found[1, 2] == pytest.approx(expected[1, 0], abs=1e-5)
    assert (found[[0, 1, 1], [1, 0, 1]] == -np.inf).all()


def test_a_grammar_mask_stays():
    values = logits(1)
    values[0, 2:] = -torch.inf
    ids, logprobs = statistics(values).top_k(4)
    assert set(ids[0, :2].tolist()) == {0, 1}
    assert logprobs[0, :2].exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logprobs[0, 2:].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_a_row_without_a_distribution_shows_it(value):
    values = logits(2)
    values[0] = value
    found = statistics(values).gather(torch.tensor([[0, 1], [0, 1]]))
    assert not torch.isfinite(found[0]).any() and torch.isfinite(found[1]).all()


def test_a_copy_of_a_row_outlives_the_step():
    values = logits(4)
    expected = whole(values)
    every = torch.arange(30)[None]
    copy = statistics(values).row(2)
    values.fill_(-torch.inf)  # as the engine does when the token is known
    np.testing.assert_allclose(copy.gather(every).numpy(), expected[2:3], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies(dtype):
    values, heat = logits().to(dtype), torch.tensor([[0.3], [0.7], [1.0], [2.0], [9.0]])
    plain = statistics(values).entropies().numpy()
    np.testing.assert_allclose(plain, entropy(np.exp(whole(values)), axis=1), rtol=1e-4)
    heated = statistics(values, heat).entropies().numpy()
    np.testing.assert_allclose(heated, entropy(np.exp(whole(values.double() / heat)), axis=1), rtol=1e-4)
    assert heated[0] < heated[-1] <= np.log(30) + 1e-5


def test_entropy_ignores_impossible_tokens():
    values = torch.tensor([[np.log(0.75), np.log(0.25), -np.inf], [0.0, -np.inf, -np.inf]])
    np.testing.assert_allclose(statistics(values).entropies().numpy(), [entropy([0.75, 0.25]), 0.0], atol=1e-6)


def test_whole_rows_are_written_into_memory_of_this_host():
    values, heat = logits(4), torch.tensor([[0.5], [1.0], [1.0], [3.0]])
    values[1, 5:] = -torch.inf
    memory = np.full((3, 30), 7, np.float32)
    figures = statistics(values, heat)
    figures.write(3, torch.from_numpy(memory[0]))
    figures.row(1).write(0, torch.from_numpy(memory[2]))
    expected = whole(values.double() / heat)
    np.testing.assert_allclose(memory, [expected[3], np.full(30, 7), expected[1]], atol=1e-5)
    assert np.isneginf(memory[2, 5:]).all()


@pytest.mark.parametrize(("offset", "temperature"), [(-100.0, 1.0), (500.0, 1.0), (30.0, 0.1)])
def test_the_mass_of_all_tokens_is_one_however_large_logits_are(offset, temperature):
    """Far within what the coordinator allows a list's mass to be off."""
    values, target = logits(4, 50_000) + offset, torch.empty(50_000)
    figures = statistics(values, torch.full((4, 1), temperature))
    for row in range(4):
        figures.write(row, target)
        assert float(target.double().exp().sum()) == pytest.approx(1, abs=MASS_SLACK / 5)
