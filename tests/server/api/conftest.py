"""Servers for all tests of the api process, and the vocabulary of their experts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from llguidance import LLTokenizer

from tests.support.api.deployment import END, VOCABULARY, byte_tokenizer, deployment
from tests.support.api.in_process import Served, served


@pytest_asyncio.fixture(scope="session")
async def _session(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(deployment(tmp_path_factory.mktemp("deployment"))) as server:
        await server.wait_ready()
        yield server


@pytest.fixture
def api(_session: Served) -> Served:
    """A ready server with a fresh fake."""
    _session.fake.reset()
    return _session


@pytest_asyncio.fixture(scope="session")
async def _hermes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served(deployment(tmp_path_factory.mktemp("hermes"), tool_parser="hermes")) as server:
        await server.wait_ready()
        yield server


@pytest.fixture
def hermes(_hermes: Served) -> Served:
    """A server that has a parser, with a fresh fake."""
    _hermes.fake.reset()
    return _hermes


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> LLTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    assert byte_tokenizer().get_vocab_size() == VOCABULARY
    return LLTokenizer(str(path), n_vocab=VOCABULARY, eos_token=[END])
