"""Fixtures of the conformance suites."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from alveole.store.base import Store
from alveole.store.memory import MemoryStore
from alveole.store.sqlite import SqliteStore
from tests.conformance.store_lab import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("alveole.store.lease.EXPIRY_TICK_S", 0.01)
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    opened: Store = (
        MemoryStore(clock) if request.param == "memory" else await SqliteStore.open(tmp_path / "store", clock)
    )
    yield opened
    await opened.close()
