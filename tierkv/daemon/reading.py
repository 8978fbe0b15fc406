"""The threads and the reader processes with which a daemon reads blocks of its store into the slab."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tierkv.daemon.config import DaemonConfig
from tierkv.readers.choice import choose_num_readers
from tierkv.readers.pool import ReaderPool
from tierkv.storage.warm import Slab

__all__ = ["Reading", "open_reading"]


@dataclass(frozen=True, slots=True)
class Reading:
    """threads: read blocks of the store. readers: decode in place of these, where there are any."""

    threads: ThreadPoolExecutor
    readers: ReaderPool | None

    def counters(self) -> dict[str, int]:
        """Return the numbers of the processes, for the status; none without them."""
        if self.readers is None:
            return {}
        stats = self.readers.stats()
        return {"reader_processes": stats.ready, "reader_blocks": stats.blocks, "reader_failures": stats.failed}


@contextmanager
def open_reading(slab: Slab, threads: ThreadPoolExecutor, config: DaemonConfig) -> Iterator[Reading]:
    """Yield threads that read: `threads` without reader processes, else as many as processes at least.

    The processes are started by the first read of a large block.
    """
    num_readers = choose_num_readers(config.num_reader_processes)
    readers = ReaderPool.of_slab(slab, num_processes=num_readers, num_in_process=config.num_io_threads)
    if readers is None:
        yield Reading(threads, None)
        return
    num_threads = max(config.num_io_threads, num_readers)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="tierkv-read") as read_threads:
        try:
            yield Reading(read_threads, readers)
        finally:
            readers.close()
