"""A cache over a store that is only read: it finds what is there, writes nothing, and keeps what is new in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv.config import CacheConfig
from tierkv.errors import ConfigError, StoreError
from tierkv.values.block import Tier

PROMPT = list(range(16))
OTHER_PROMPT = list(range(500, 516))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return a folder whose store has one prompt."""
    with open_tiny(tmp_path) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
    return tmp_path


@pytest.fixture
def read_only_mount(stored: Path) -> Iterator[Path]:
    """Return the folder with its store on a read-only file system."""
    store = str(stored / "store")
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting takes root and the command mount")
    lines = [["mount", "--bind", store, store], ["mount", "-o", "remount,bind,ro", store]]
    if subprocess.run(lines[0], capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        subprocess.run(lines[1], check=True)
        yield stored
    finally:
        subprocess.run(["umount", store], check=True)


def fingerprint(folder: Path) -> list[tuple[str, str]]:
    files = sorted(path for path in (folder / "store").iterdir() if path.name != "lock.mdb")  # LMDB's readers
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def use(folder: Path) -> None:
    """Find the stored prompt, compute and find another one, and call whatever may be called."""
    with open_tiny(folder, hot=12, warm=8, read_only=True) as cache:
        engine = PatternEngine(cache)
        assert cache.match(PROMPT).num_cached_tokens == 16
        for prompt in (PROMPT, OTHER_PROMPT, PROMPT, OTHER_PROMPT):
            cache.release(engine.start(prompt))
        assert cache.match(OTHER_PROMPT).num_cached_tokens > 0
        assert cache.pin(PROMPT) == 4
        cache.unpin(PROMPT)
        assert cache.blocks.manual_cache_management(pin_blocks=[0], offload_blocks=range(1, 12)).pinned == (0,)
        cache.blocks.unpin([0])
        cache.evict(Tier.HOT)
        cache.flush()
        assert cache.stats().tiers[Tier.COLD].blocks == 4
        assert cache.stats().skipped_writes == 0
        cache.check()


def test_a_read_only_cache_finds_what_is_stored_and_writes_nothing(stored: Path) -> None:
    before = fingerprint(stored)
    use(stored)
    assert fingerprint(stored) == before


def test_a_store_on_a_read_only_file_system_is_read(read_only_mount: Path) -> None:
    with pytest.raises(StoreError, match=r"read-only file system.*read_only"):
        open_tiny(read_only_mount)
    use(read_only_mount)


def test_a_data_file_alone_is_a_store_for_readers(stored: Path) -> None:
    """As in an image that was built with nothing but that file."""
    for name in ("users.lock", "write.lock", "lock.mdb"):
        (stored / "store" / name).unlink()
    use(stored)


def test_a_read_only_cache_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no cold store"):
        open_tiny(tmp_path, read_only=True)
    assert not (tmp_path / "store").exists()


def test_read_only_is_not_for_a_daemons_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="read_only"):
        CacheConfig(socket=tmp_path / "d.sock", read_only=True)


def test_the_quota_and_the_floor_may_be_left_to_the_store(tmp_path: Path) -> None:
    with open_tiny(tmp_path, cold_bytes=tiny_layout().block_bytes << 10) as cache:
        assert cache.cold is not None
        quota = cache.cold.quota_bytes
    with open_tiny(tmp_path, cold_bytes=None, min_free_bytes=None) as cache:
        assert cache.cold is not None and cache.cold.quota_bytes == quota
    for options in ({"cold_bytes": 0}, {"min_free_bytes": -1}, {"cold_bytes": 1.5}):
        with pytest.raises(ConfigError):
            CacheConfig(**options)
