"""What only the memory store must be tested for."""

from alveole.store.base import Delete, Put
from alveole.store.memory import MemoryStore


async def test_compaction_gives_memory_back() -> None:
    """Long simulations write and delete for ever: nothing that nobody can read is held."""
    store = MemoryStore()
    for number in range(20):
        await store.txn([], [Put(key=f"short/{number}", value=b""), Put(key="long", value=b"")])
        await store.txn([], [Delete(key=f"short/{number}")])
    last = (await store.txn([], [Put(key="last", value=b"")])).revision
    await store.compact(last)
    assert list(store._log) == [last]
    assert {key: len(versions) for key, versions in store._versions.items()} == {"long": 1, "last": 1}
    assert store._keys == ["last", "long"]
    await store.close()
