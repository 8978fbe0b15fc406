"""What a request waits for goes before what is done behind it."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, open_tiny, store_prompt

from tierkv.background.work_queue import Priority
from tierkv.cache import TierCache
from tierkv.transfer import block_writer
from tierkv.values.block import Tier

PROMPT = list(range(12))
OTHER = list(range(100, 132))


def open_cache(path: Path) -> TierCache:
    return open_tiny(path, warm=16, num_io_threads=1)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return a folder whose store has the prompt's three blocks."""
    return store_prompt(tmp_path, PROMPT)


def test_a_requests_reads_overtake_encodes_that_were_queued_before(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    encodes, gate, reads_wait = threading.Event(), threading.Event(), threading.Event()
    encode_record = block_writer.encode_record

    def encode(*arguments: Any, **options: Any) -> Any:
        order.append("encode")
        encodes.set()
        assert gate.wait(20)
        return encode_record(*arguments, **options)

    monkeypatch.setattr(block_writer, "encode_record", encode)
    with open_cache(stored) as cache, ExitStack() as undo:
        undo.callback(gate.set)  # whatever fails, nothing waits for ever
        assert cache.cold
        threads, submit, read = cache._tiers.memory.threads, cache._tiers.memory.threads.submit, cache.cold.read_into

        def submit_and_tell(priority: Priority, function: Any, *arguments: Any) -> Any:
            future = submit(priority, function, *arguments)
            if priority is Priority.REQUEST and len(threads._queue._queues[priority]) == 3:
                reads_wait.set()
            return future

        def read_into(*arguments: Any, **options: Any) -> Any:
            order.append("read")
            return read(*arguments, **options)

        monkeypatch.setattr(threads, "submit", submit_and_tell)
        monkeypatch.setattr(cache.cold, "read_into", read_into)
        is_held, together = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            assert together.wait(20)

        assert cache._offloader.after_writes(hold)
        assert is_held.wait(20)
        busy = PatternEngine(cache).start(OTHER)
        together.set()  # now its eight blocks are written down in one batch, and encoded by one thread
        assert encodes.wait(20)
        found: list[int] = []

        def request() -> None:
            sequence = cache.acquire([*PROMPT, 7])
            found.append(sequence.cached_tokens[Tier.COLD])
            cache.release(sequence)

        asking = threading.Thread(target=request)
        asking.start()
        assert reads_wait.wait(20)
        assert len(threads._queue._queues[Priority.DEMOTION]) == 7
        gate.set()
        asking.join(20)
        cache.flush()
        assert found == [len(PROMPT)]
        cache.release(busy)
        cache.check()
    assert order[:4] == ["encode", "read", "read", "read"]
    assert order.count("encode") >= 8
