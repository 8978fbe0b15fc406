"""A disk without a byte left, a real one: what was stored stays, the rest is an outcome, and no process dies."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import block_bytes, open_store, read, record_of

from tierkv.storage.outcomes import MissReason, PutOutcome

WORKER = Path(__file__).with_name("store_worker.py")
TIMEOUT_S = 60


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return the directory of a file system in memory with room for so many bytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root and the command mount")
    line = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(path)]
    mounted = subprocess.run(line, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no tmpfs: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def run(action: str, path: Path) -> subprocess.CompletedProcess[str]:
    line = command(WORKER, action, path)
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("small_disk", ["512k", "1m", "3m"], indirect=True)
def test_a_full_disk_is_an_outcome_and_every_block_not_evicted_stays(small_disk: Path) -> None:
    done = run("fill_this_disk", small_disk)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    *numbers, evicted = [int(line) for line in done.stdout.splitlines()]
    assert len(numbers) > 20
    assert not {path.name for path in small_disk.iterdir()} - {"cold", "ballast", "reserve", "state"}
    with open_store(small_disk, quota_bytes=64 << 20) as store:  # the disk is still full
        assert store.damaged is None
        found = [read(store, record_of(number, seed=number).info) for number in numbers]
        for number, block in zip(numbers, found, strict=True):
            assert block is MissReason.ABSENT or np.array_equal(block, block_bytes(number))
        absent = [number for number, block in zip(numbers, found, strict=True) if block is MissReason.ABSENT]
        assert len(absent) <= -evicted
        assert not set(absent) & set(range(8)), "a pinned block was evicted"
        store.check()
        assert store.verify().is_sound
        (small_disk / "reserve").unlink()  # LMDB needs some room even to delete: it copies what it changes
        store.evict(to_bytes=store.stats().live_bytes // 2)
        assert store.put([record_of(999_999)]) == [PutOutcome.STORED]


@pytest.mark.parametrize("small_disk", ["16k", "64k", "80k", "120k"], indirect=True)
def test_a_disk_too_full_for_a_new_store_is_an_error_that_says_so(small_disk: Path) -> None:
    done = run("open_on_a_tiny_disk", small_disk)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    assert "No space left" in done.stdout or "cannot be opened" in done.stdout or done.stdout == "opened\n"
