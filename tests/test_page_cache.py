"""Whether part of a file is in memory: asked without bringing it there."""

from __future__ import annotations

import os
from pathlib import Path

from tierkv.storage.record_source import is_in_memory

HOLE_BYTES = 4 << 20


def test_what_was_written_is_in_memory_and_a_hole_is_not(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, bytes(1 << 16), HOLE_BYTES)
        assert is_in_memory(fd, HOLE_BYTES + 100)
        for _ in range(2):  # asking brings nothing
            assert not is_in_memory(fd, HOLE_BYTES // 2 + 100)
        assert is_in_memory(fd, 1 << 40), "nothing is fetched for what is not there"
    finally:
        os.close(fd)
