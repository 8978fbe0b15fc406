"""A block that was found damaged leaves the daemon's store, behind the clients, although none of them writes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from cold_blocks import damage_record
from daemon_process import OpenCache, Start
from pattern_engine import PatternEngine
from test_life_and_death import eventually

from tierkv.daemon.store_writer import StoreWriter
from tierkv.daemon.values import Write
from tierkv.errors import StoreBusyError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord

PROMPT = list(range(12))
QUOTA = 64 << 20


def test_a_damaged_block_leaves_the_store_although_nobody_writes(
    start_daemon: Start, open_cache: OpenCache, short_path: Path
) -> None:
    daemon = start_daemon()
    cache = open_cache()
    cache.release(PatternEngine(cache).start(PROMPT))
    cache.flush()
    hashes = cache.match(PROMPT).block_hashes
    cache.close()
    daemon.kill()
    with ColdStore(short_path / "store", quota_bytes=QUOTA, min_free_bytes=0) as store:
        damage_record(store, hashes[1])
    daemon.start()
    reader = open_cache()
    sequence = reader.acquire([*PROMPT, 99])
    assert sequence.num_cached_tokens == 4
    reader.release(sequence)
    with ColdStore(short_path / "store", quota_bytes=QUOTA, read_only=True) as store:
        eventually(lambda: [store.contains(each) for each in hashes] == [True, False, False])
        store.check()


class BusyStore:
    """A store that somebody else keeps: each call that writes would wait."""

    notes = SimpleNamespace(are_due=True)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def contains(self, block_hash: bytes) -> bool:
        return True

    def maintain(self) -> None:
        self.calls.append("maintain")
        raise StoreBusyError("another process is writing")

    def put(self, records: list[EncodedRecord]) -> list[PutOutcome]:
        self.calls.append("put")
        return []


def test_the_daemons_write_thread_waits_once_for_a_busy_store() -> None:
    store = BusyStore()
    core = SimpleNamespace(finish_write=lambda *_, **__: None, is_marked=lambda _: False)
    write = Write(SimpleNamespace(), SimpleNamespace(block_hash=b"h" * 16, parent=None), 0)  # type: ignore[arg-type]

    async def use() -> None:
        with ThreadPoolExecutor(1) as threads:
            writer = StoreWriter(core, store, None, threads)  # type: ignore[arg-type]
            for work, calls in (([write], ["put"]), ([write, None], ["put"]), ([None], ["maintain", "put"])):
                store.calls.clear()
                writer._write(work)
                assert store.calls == calls
            await asyncio.to_thread(writer.close)

    asyncio.run(use())
