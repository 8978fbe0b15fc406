"""ReaderProcesses: starts reader processes, hands out those that are free, and ends them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tierkv.readers.reader import Reader, ReaderFailedError
from tierkv.values.locks import OwnedCondition

__all__ = ["ReaderProcesses"]

_START_S = 60.0  # to import numpy on a busy machine, from a slow disk
_CLOSE_S = 5.0
_POLL_S = 0.1
_log = logging.getLogger(__name__)


class ReaderProcesses:
    """Up to `num_processes` processes over one piece of shared memory (a memfd; duplicated). Thread-safe.

    Close it before the shared memory. In the child of a fork it has no processes and does nothing.
    """

    def __init__(self, memory_fd: int, *, memory_bytes: int, num_processes: int) -> None:
        self.num_processes = num_processes
        self._fd = os.dup(memory_fd)
        self._memory_bytes = memory_bytes
        self._pid = os.getpid()
        self._changed = OwnedCondition()
        self._idle: list[Reader] = []
        self._busy: set[Reader] = set()
        self._starting: set[Reader] = set()
        self._threads: list[threading.Thread] = []  # that start processes
        self._num_asked_for = 0
        self._is_closed = False
        self._num_failed = 0

    @property
    def num_failed(self) -> int:
        """Processes that ended, or were killed because they did not answer, before the pool was closed."""
        return self._num_failed

    def start(self, most: int | None = None) -> None:
        """Start `most` processes, or all, in the background; those that have been started count. Raises nothing."""
        with self._changed:
            wanted = self.num_processes if most is None else min(most, self.num_processes)
            missing = wanted - self._num_asked_for
            if missing <= 0 or self._is_closed or os.getpid() != self._pid:
                return
            self._num_asked_for = wanted
            thread = threading.Thread(target=self._start_some, args=(missing,), name="tierkv-readers", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # the interpreter ends, or the system has no more threads
                self._num_asked_for = self.num_processes
                _log.warning("no reader processes are started: %s", exc)
                return
            self._threads.append(thread)

    def pids(self) -> list[int]:
        """Return the numbers of the processes that are ready."""
        with self._changed:
            return [each.pid for each in (*self._idle, *self._busy)]

    def wait_until_ready(self, has_ended: Callable[[], bool]) -> None:
        """Wait until every process that is being started is ready or has failed, or `has_ended` returns True."""
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            while thread.is_alive() and not has_ended():
                thread.join(_POLL_S)

    def close(self) -> None:
        """End the processes; a request in work is left to its caller. Bounded. May be called twice."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            idle, self._idle = self._idle, []
            for each in (*self._busy, *self._starting):
                each.kill()  # the thread that uses it waits for its end
            threads = list(self._threads)
        deadline = time.monotonic() + _CLOSE_S
        for each in idle:
            each.kill()
        hanging = [each for each in idle if not each.end(max(0.0, deadline - time.monotonic()))]
        with self._changed:
            self._changed.wait_for(lambda: not (self._busy or self._starting), max(0.0, deadline - time.monotonic()))
            hanging += [*self._busy, *self._starting]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in threads):
            os.close(self._fd)  # such a thread may still start a process with it
        for each in hanging:
            _log.warning("reader process %d does not end: the system holds it", each.pid)

    def _start_some(self, count: int) -> None:
        """Start so many processes, then wait until each is ready. Runs on a thread of its own."""
        starting: list[Reader] = []
        for _ in range(count):
            if self._is_closed:
                return
            try:
                reader = self._start_one()
            except OSError as exc:
                _log.warning("%d of %d reader processes were started: %s", len(starting), count, exc)
                break
            if reader is None:
                break
            starting.append(reader)
        deadline = time.monotonic() + _START_S
        for reader in starting:
            try:
                reader.wait_until_ready(max(0.1, deadline - time.monotonic()))
            except ReaderFailedError as exc:
                self._drop(reader, str(exc))
            else:
                self._put_back(reader)

    def _start_one(self) -> Reader | None:
        """Start a process; None once the pool is closed."""
        if not sys.executable:
            raise OSError("this interpreter has no program of its own to run")
        reader = Reader(self._fd, self._memory_bytes)
        with self._changed:
            if not self._is_closed:
                self._starting.add(reader)
                return reader
        reader.end()
        return None

    def _take(self, most: int | None = None) -> Reader | None:
        """Return a free process; None if there is none, or this is the child of a fork. most: see `start`."""
        if os.getpid() != self._pid:
            return None
        self.start(most)
        with self._changed:
            if not self._idle:
                return None
            reader = self._idle.pop()
            self._busy.add(reader)
            return reader

    def _put_back(self, reader: Reader) -> None:
        with self._changed:
            if not self._is_closed:
                self._forget(reader)
                self._idle.append(reader)
                return
        self._drop(reader, "the pool is closed")

    def _drop(self, reader: Reader, why: str) -> None:
        """End a process and wait for that, however long it takes: until then it may write into a place."""
        reader.end()
        with self._changed:
            self._forget(reader)
            left = len(self._idle) + len(self._busy) + len(self._starting)
            is_failure = not self._is_closed
            self._num_failed += is_failure
            self._changed.notify_all()
        if is_failure:
            how = reader.describe_end()
            _log.warning("reader process %d was lost: %s (%s); %d are left", reader.pid, why, how, left)

    def _forget(self, reader: Reader) -> None:
        """Forget that a process is busy, or is being started; the caller holds the lock."""
        assert self._changed.is_owned()
        self._busy.discard(reader)
        self._starting.discard(reader)

    @contextlib.contextmanager
    def _a_process(self, *, is_wanted: bool, most: int | None = None) -> Iterator[Reader | None]:
        """A free process, None if there is none; its failure in the body ends the process, and the body.

        most: see `start`.
        """
        reader = self._take(most) if is_wanted else None
        try:
            yield reader
        except ReaderFailedError as exc:
            assert reader is not None
            self._drop(reader, str(exc))
        except BaseException:  # an interrupt: the process may still write
            if reader is not None:
                self._drop(reader, "a request was interrupted")
            raise
        else:
            if reader is not None:
                self._put_back(reader)
