"""One server for all tests of the api process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.api.deployment import deployment
from tests.support.api.serving import Served, served


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
