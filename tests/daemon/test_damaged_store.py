"""A block that was found damaged leaves the daemon's store, behind the clients, although none of them writes."""

from __future__ import annotations

from pathlib import Path

from cold_blocks import damage_record
from daemon_process import OpenCache, Start
from pattern_engine import PatternEngine
from test_life_and_death import eventually

from tierkv.storage.cold import ColdStore

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
