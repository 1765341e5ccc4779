"""The books that tell which logits row is which sequence, for both of vLLM's interfaces, and what the adapter reads in
vLLM's configuration. No engine is started, but importing vLLM takes seconds: everything that needs it is in this file.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from server.config import NOT_ENGINE_ARGS

VOCABULARY = 11
NOWHERE = torch.device("cpu")


def quietly(name: str):
    """A module that needs vLLM; what vLLM warns of at import is not ours."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def rendezvous():
    return quietly("server.expert.rendezvous")


@pytest.fixture(scope="module")
def adapter():
    return quietly("server.expert.vllm_engine")


@pytest.fixture(scope="module", autouse=True)
def _import_quietly():
    """Importing vLLM leaves its logging and thread settings behind; the number of threads matters to other tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Decider:
    """Chooses token (7 slot + position) mod V, and remembers whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int]]] = []

    def __call__(self, slots, positions, logits):
        assert slots.dtype == positions.dtype == np.int32
        assert logits.shape == (len(slots), VOCABULARY) and positions.shape == slots.shape
        self.asked.append(list(zip(slots.tolist(), positions.tolist(), strict=True)))
        return self.choose(slots, positions)

    @staticmethod
    def choose(slots, positions):
        return ((7 * slots + positions) % VOCABULARY).astype(np.int32)


def params(rendezvous, slot: int) -> SimpleNamespace:
    return SimpleNamespace(extra_args={rendezvous.SLOT: slot})


def v1(rendezvous) -> tuple:
    processor = rendezvous.V1Rendezvous(None, NOWHERE, False)
    decider = Decider()
    processor.attach(decider)
    return processor, decider


def update(removed=(), added=(), moved=()) -> SimpleNamespace:
    return SimpleNamespace(batch_size=0, removed=list(removed), added=list(added), moved=list(moved))


def assert_forced(logits: torch.Tensor, tokens: np.ndarray) -> None:
    """Exactly one finite entry a row, at its token."""
    finite = torch.isfinite(logits)
    assert finite.sum(dim=1).tolist() == [1] * len(tokens)
    assert finite.int().argmax(dim=1).tolist() == tokens.tolist()
    assert torch.isneginf(logits[~finite]).all()


class Batch:
    """vLLM's persistent batch as its interface describes it: removed, added, moved, in this order; a list of places."""

    def __init__(self, rendezvous) -> None:
        self._rendezvous = rendezvous
        self.places: list = [None] * 24
        self._next = 0

    def _new(self, rng) -> tuple[int, list[int], list[int]]:
        self._next += 1
        # Some come back with tokens they have generated already (a preemption).
        return self._next, [0] * int(rng.integers(1, 9)), [1] * int(rng.integers(3))

    def random_update(self, rng):
        """Change the batch as vLLM may; what it tells the processors."""
        directions = self._rendezvous.MoveDirectionality
        used = [index for index, place in enumerate(self.places) if place is not None]
        removed = [index for index in used if rng.random() < 0.25]
        for index in removed:
            self.places[index] = None
        added = []
        for _ in range(rng.integers(5)):
            free = self.places.index(None)
            kept = [index for index in used if index not in removed]
            index = int(rng.choice(kept)) if kept and rng.random() < 0.2 else free
            slot, prompt, output = self.places[index] = self._new(rng)
            added.append((index, params(self._rendezvous, slot), prompt, output))
        moved = []
        while (count := self._count()) and None in self.places[:count]:
            source = max(index for index, place in enumerate(self.places) if place is not None)
            target = self.places.index(None)
            self.places[target], self.places[source] = self.places[source], None
            moved.append((source, target, directions.UNIDIRECTIONAL))
        for _ in range(rng.integers(4) if self._count() > 1 else 0):
            a, b = (int(index) for index in rng.choice(self._count(), 2, replace=False))
            self.places[a], self.places[b] = self.places[b], self.places[a]
            moved.append((a, b, directions.SWAP))
        if self._count() > 1 and rng.random() < 0.3:  # the last one takes another's place for good
            source, target = self._count() - 1, int(rng.integers(self._count() - 1))
            self.places[target], self.places[source] = self.places[source], None
            moved.append((source, target, directions.UNIDIRECTIONAL))
        return update(removed, added, moved) if removed or added or moved else None

    def _count(self) -> int:
        return sum(place is not None for place in self.places)

    def rows(self) -> list:
        return self.places[: self._count()]


@pytest.mark.parametrize("seed", range(8))
def test_v1_follows_the_batch_through_any_changes(rendezvous, seed):
    rng = np.random.default_rng(seed)
    processor, decider = v1(rendezvous)
    batch = Batch(rendezvous)
    for _ in range(60):
        processor.update_state(batch.random_update(rng))
        rows = batch.rows()
        if not rows:
            continue
        logits = torch.randn(len(rows), VOCABULARY)
        assert processor.apply(logits) is logits
        expected = [(slot, len(prompt) + len(output)) for slot, prompt, output in rows]
        assert decider.asked[-1] == expected
        assert_forced(logits, Decider.choose(*np.array(expected, np.int32).T))
        for _, _, output in rows:  # the engine's own lists grow by the token
            if rng.random() < 0.8:  # but not of an unfinished prefill
                output.append(0)


def test_v1_moves_onto_a_place_that_is_taken(rendezvous):
    directions = rendezvous.MoveDirectionality
    processor, decider = v1(rendezvous)
    added = [(index, params(rendezvous, 10 + index), [0] * index, []) for index in range(4)]
    processor.update_state(update(added=added))
    # 3 replaces 1, then 0 and 2 change places, then a newcomer is told of with the next update.
    processor.update_state(update(moved=[(3, 1, directions.UNIDIRECTIONAL), (0, 2, directions.SWAP)]))
    processor.apply(torch.zeros(3, VOCABULARY))
    assert decider.asked[-1] == [(12, 2), (13, 3), (10, 0)]
    processor.update_state(update(removed=[0], added=[(0, params(rendezvous, 20), [0] * 5, [1])]))
    processor.apply(torch.zeros(3, VOCABULARY))
    assert decider.asked[-1] == [(20, 6), (13, 3), (10, 0)]


def test_v1_without_news_keeps_counting(rendezvous):
    processor, decider = v1(rendezvous)
    output: list[int] = []
    processor.update_state(update(added=[(0, params(rendezvous, 4), [1, 2, 3], output)]))
    for count in range(3):
        processor.update_state(None)
        processor.apply(torch.zeros(1, VOCABULARY))
        assert decider.asked[-1] == [(4, 3 + count)]
        output.append(9)


def test_v1_changes_what_greedy_sampling_takes(rendezvous):
    assert v1(rendezvous)[0].is_argmax_invariant() is False


def test_a_request_of_somebody_else_has_no_slot(rendezvous):
    processor, decider = v1(rendezvous)
    processor.update_state(update(added=[(0, SimpleNamespace(extra_args=None), [1], [])]))
    processor.apply(torch.zeros(1, VOCABULARY))
    assert decider.asked[-1] == [(-1, 1)]


GRAPHS = (1, 2, 4, 8)
"""Sizes that CUDA graphs are captured for."""


def context(indices, lengths) -> SimpleNamespace:
    """As vLLM's runner fills it: under a full CUDA graph the lengths, and only they, are padded to the graph's size."""
    padded = np.zeros(min(size for size in GRAPHS if size >= len(lengths)), np.int32)
    padded[: len(lengths)] = lengths
    return SimpleNamespace(idx_mapping_np=np.array(indices, np.int32), seq_lens_upper_bound_np=padded)


def test_v2_rows_are_named_by_the_context_and_slots_are_recycled(rendezvous):
    processor = rendezvous.V2Rendezvous(None, SimpleNamespace(max_num_reqs=6))
    decider = Decider()
    processor.attach(decider)
    rng = np.random.default_rng(0)
    slot_at: dict[int, int] = {}
    for step in range(50):
        for index in range(6):
            if index not in slot_at or rng.random() < 0.2:
                slot_at[index] = 100 * step + index
                assert processor.add_request(index, params(rendezvous, slot_at[index])) is True
        indices = rng.permutation(6)[: rng.integers(1, 7)]
        lengths = rng.integers(1, 1000, len(indices))
        logits = torch.randn(len(indices), VOCABULARY)
        assert processor.apply(logits, context(indices, lengths)) is logits
        expected = [(slot_at[index], length) for index, length in zip(indices.tolist(), lengths.tolist(), strict=True)]
        assert decider.asked[-1] == expected
        assert_forced(logits, Decider.choose(*np.array(expected, np.int32).T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_finite_entry_is_left_in_any_precision(rendezvous, dtype):
    processor, _ = v1(rendezvous)
    processor.update_state(update(added=[(index, params(rendezvous, index), [1], []) for index in range(3)]))
    logits = torch.randn(3, VOCABULARY).to(dtype)
    logits[1] = float("nan")
    processor.apply(logits)
    assert logits.dtype == dtype
    assert_forced(logits, np.array([1, 8, 4]))  # (7 slot + 1) mod 11


def test_detached_it_lets_logits_through(rendezvous):
    processor, decider = v1(rendezvous)
    processor.update_state(update(added=[(0, params(rendezvous, 3), [1], [])]))
    logits = torch.randn(1, VOCABULARY)
    before = logits.clone()
    processor.detach()
    assert processor.apply(logits) is logits and torch.equal(logits, before)
    assert not decider.asked
    processor.attach(decider)
    processor.apply(logits)
    assert decider.asked == [[(3, 1)]] and not torch.equal(logits, before)

    second = rendezvous.V2Rendezvous(None, SimpleNamespace(max_num_reqs=1))
    second.add_request(0, params(rendezvous, 3))
    assert torch.equal(second.apply(before.clone(), context([0], [5])), before)


@pytest.mark.parametrize(
    ("blocks", "counted", "expected"),
    [(101, None, 1600), (101, 1616, 1600), (101, 500, 500)],  # one kind of layers: vLLM counts the null block too
)
def test_kv_capacity_is_what_all_kinds_of_layers_hold(adapter, blocks, counted, expected):
    model = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: VOCABULARY, get_hidden_size=lambda: 8)
    cache = SimpleNamespace(block_size=16, num_gpu_blocks=blocks, kv_cache_size_tokens=counted)
    info = adapter.describe(SimpleNamespace(cache_config=cache, model_config=model))
    assert (info.kv_tokens, info.block_size, info.max_model_len, info.vocab_size) == (expected, 16, 64, VOCABULARY)


def test_what_a_configuration_may_not_say_are_arguments_of_vllm(adapter):
    """A misspelt or renamed one would be let through."""
    assert {field.name for field in dataclasses.fields(adapter.EngineArgs)} >= NOT_ENGINE_ARGS
