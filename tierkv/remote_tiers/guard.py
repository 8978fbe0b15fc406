"""GuardedRemote: a remote tier that can fail, be slow or lie, and costs a request no more than a miss.

Reads run on the request's threads, with a deadline, and not at all while the breaker is open. Writes, touches and
probes run on one thread in the background, from a bounded queue that drops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.breaker import Breaker
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteDamageError, RemoteKey, WriteOutcome
from tierkv.remote_tiers.recorder import RemoteRecorder
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import BlockHash
from tierkv.values.locks import OwnedCondition
from tierkv.values.remote_stats import RemoteStats

__all__ = ["QUEUE_BYTES", "GuardedRemote"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

QUEUE_BYTES = 256 << 20
"""Memory of the records that wait to be written to one remote tier."""
_QUEUE_JOBS = 4096
_MOST_DAMAGED = 4096  # keys that are remembered, so that a good record replaces the damaged one
_BACKGROUND_S = 2.0  # for the first answer to calls that no request waits for
_FULL_S = 5.0
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for the background thread. num_bytes: memory that it holds. kind: in the counters.

    dropped: called if it is dropped; perhaps with the lock.
    """

    kind: str
    run: Callable[[], object]
    num_bytes: int = 0
    dropped: Callable[[], None] = lambda: None


class GuardedRemote:
    """One remote tier. Thread-safe. No method raises for what the remote tier does; it is counted."""

    def __init__(
        self,
        client: RemoteClient,
        url: RemoteUrl,
        *,
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.least_blocks: int = int(url.number("min_blocks", 4 if url.scheme in ("s3", "gs", "az") else 1))
        self._client = client
        self._times = url.call_time()
        self._long_times = replace(self._times, base_s=max(self._times.base_s, _BACKGROUND_S))
        self._is_read_only = url.flag("read_only")
        self._breaker = Breaker(clock=clock)
        self._clock = clock
        self._recorder = RemoteRecorder()
        self._most_bytes = queue_bytes
        self._changed = OwnedCondition()
        self._jobs: deque[_Job] = deque()
        self._num_bytes = 0  # of the jobs, the one in work included
        self._is_working = False
        self._is_closing = False
        self._full_until = 0.0
        self._damaged: OrderedDict[RemoteKey, None] = OrderedDict()
        self._described: set[BlockHash] = set()
        self._put(_Job("probe", self._probe))
        self._thread = threading.Thread(target=self._run, name="tierkv-remote", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether calls pass. If not, every method returns at once."""
        return self._breaker.is_closed

    def stats(self) -> RemoteStats:
        """Return the counters so far."""
        return self._recorder.snapshot(str(self.url), is_up=self.is_up)

    def prefix(self, keys: Sequence[RemoteKey]) -> int:
        """Return how many leading keys have a value; a key whose value was found damaged counts as absent."""
        if self._damaged:
            with self._changed:
                keys = keys[: next((at for at, key in enumerate(keys) if key in self._damaged), len(keys))]
        if not keys or not self._may_call("prefix"):
            return 0
        return self._call("prefix", lambda deadline: self._client.prefix(keys, deadline), otherwise=0)

    def read(self, key: RemoteKey, *, most_bytes: int) -> Bytes | MissReason:
        """Return a value, of which nothing is checked but the length, or why there is none."""
        if not self._may_call("read"):
            return MissReason.REMOTE
        try:
            found = self._call(
                "read", lambda deadline: self._client.read(key, deadline, most_bytes=most_bytes), otherwise=None
            )
        except _FailedError:
            return MissReason.REMOTE
        except RemoteDamageError:
            self.note_damaged(key)
            return MissReason.CORRUPT
        if found is None:
            return MissReason.ABSENT
        self._recorder.count("read_bytes", found.size)
        return found

    def count(self, name: str) -> None:
        """Raise a counter of `stats`: only the reader of a record knows whether it was a hit."""
        self._recorder.count(name)

    def note_damaged(self, key: RemoteKey) -> None:
        """Remember that a value is not the record of its key. The next write of that record replaces it."""
        with self._changed:
            self._damaged[key] = None
            if len(self._damaged) > _MOST_DAMAGED:
                self._damaged.popitem(last=False)

    def write_later(self, key: RemoteKey, parent: RemoteKey | None, record: Bytes, *, held_bytes: int) -> None:
        """Queue a record, or drop and count it. parent: its parent's key; None for a first block.

        held_bytes: memory that the record keeps, at least its size.
        """
        if self._is_read_only:
            return
        self._put(_Job("write", lambda: self._write(key, parent, record), held_bytes))

    def touch_later(
        self, keys: Sequence[RemoteKey], stored: Callable[[int], tuple[RemoteKey | None, Bytes] | None]
    ) -> None:
        """Queue a touch of a chain's values, and a write of those that are missing.

        stored: returns the parent's key and the record of a missing value, or None where this machine has none.
        """
        if self._is_read_only or not keys:
            return
        self._put(_Job("touch", lambda: self._touch(keys, stored)))

    def describe_later(self, namespace: BlockHash, description: bytes) -> None:
        """Queue the description of a namespace, once."""
        if self._is_read_only or namespace in self._described:
            return
        self._described.add(namespace)
        forget = partial(self._described.discard, namespace)

        def describe() -> None:
            if not self._background("describe", lambda d: self._client.describe(namespace, description, d)):
                forget()

        self._put(_Job("describe", describe, dropped=forget))

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all queued jobs have been done or dropped. Return False where that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._is_working, timeout_s)

    def close(self) -> None:
        """Write what is queued for a bounded time, drop the rest, and close the client. May be called twice."""
        with self._changed:
            was_closing, self._is_closing = self._is_closing, True
            self._changed.notify_all()
        if was_closing:
            return
        self.flush(timeout_s=_CLOSE_S)
        with self._changed:
            dropped = self._drop_all("closing")
        if dropped:
            _log.warning("%d records were not written to %s before the end", dropped, self.url)
        self._client.close()
        self._thread.join(self._times.base_s)

    def _may_call(self, kind: str) -> bool:
        """Return whether the breaker lets a call pass; count it if not."""
        if self._breaker.is_closed and not self._is_closing:
            return True
        self._recorder.count(f"skipped_{kind}")
        return False

    def _call(
        self,
        kind: str,
        work: Callable[[Deadline], Result],
        *,
        otherwise: Result,
        num_bytes: int = 0,
        is_probe: bool = False,
        times: CallTime | None = None,
    ) -> Result:
        """Make one call and record how it went. Raises RemoteDamageError; `read` also gets _FailedError."""
        begin = self._clock()
        try:
            result = work(Deadline(times or self._times, num_bytes=num_bytes, clock=self._clock))
        except RemoteDamageError:
            self._breaker.note_success()
            raise
        except RemoteRefusedError as exc:
            self._recorder.count(f"failed_{exc.code.lower()}")
            # A full server that takes no writes still answers reads; one that wants a password answers nothing.
            if kind == "write":
                self._breaker.note_success()
                self._full_until = self._clock() + _FULL_S
            else:
                self._note_failure(exc, is_probe=is_probe)
            if kind in ("read", "write"):
                raise _FailedError from exc
            return otherwise
        except RemoteError as exc:
            self._recorder.count(f"failed_{kind}")
            self._note_failure(exc, is_probe=is_probe)
            if kind in ("read", "write"):
                raise _FailedError from exc
            return otherwise
        else:
            if not self._breaker.is_closed:
                _log.warning("the remote tier %s answers again", self.url)
            self._breaker.note_success()
            return result
        finally:
            self._recorder.time(kind, self._clock() - begin)

    def _note_failure(self, failure: RemoteError, *, is_probe: bool) -> None:
        if self._breaker.note_failure(is_probe=is_probe):
            self._recorder.count("breaker_opened")
            _log.warning("the remote tier %s is not asked for a while: %s", self.url, failure)
            with self._changed:
                self._changed.notify_all()  # the background thread probes later

    def _put(self, job: _Job) -> None:
        """Queue a job, or drop and count it."""
        reason = ""
        with self._changed:
            if self._is_closing:
                reason = "closing"
            elif not self._breaker.is_closed:
                reason = "down"
            elif len(self._jobs) >= _QUEUE_JOBS or self._num_bytes + job.num_bytes > self._most_bytes:
                reason = "queue_full"
            else:
                self._jobs.append(job)
                self._num_bytes += job.num_bytes
                self._changed.notify_all()
        if reason:
            job.dropped()
            self._recorder.count(f"dropped_{job.kind}_{reason}")

    def _run(self) -> None:
        """Do queued jobs, and probe while the breaker is open, until `close`."""
        while True:
            with self._changed:
                while not (self._jobs or self._is_closing or self._breaker.probe_in_s() == 0):
                    self._changed.wait(self._breaker.probe_in_s())
                if not self._breaker.is_closed:
                    self._drop_all("down")
                if self._is_closing and not self._jobs:
                    return
                job = self._jobs.popleft() if self._jobs else None
                self._is_working = job is not None
            try:
                if job is not None:
                    job.run()
                elif self._breaker.probe_in_s() == 0:
                    self._probe()
            except Exception:  # noqa: BLE001 - the outermost loop of its thread
                _log.exception("a job for the remote tier %s failed", self.url)
            finally:
                with self._changed:
                    self._is_working = False
                    self._num_bytes -= job.num_bytes if job else 0
                    self._changed.notify_all()

    def _drop_all(self, why: str) -> int:
        """Drop and count all queued jobs; return how many writes were among them. The caller holds the lock."""
        assert self._changed.is_owned()
        num_writes = 0
        while self._jobs:
            job = self._jobs.popleft()
            self._num_bytes -= job.num_bytes
            num_writes += job.kind == "write"
            job.dropped()
            self._recorder.count(f"dropped_{job.kind}_{why}")
        self._changed.notify_all()
        return num_writes

    def _probe(self) -> None:
        """Ask something small: this opens the first connection, and closes the breaker of a tier that is back."""
        self._call("probe", self._client.ping, otherwise=None, is_probe=True, times=self._long_times)

    def _background(self, kind: str, work: Callable[[Deadline], None]) -> bool:
        """Make a call whose failure is only counted; return whether it succeeded."""

        def succeed(deadline: Deadline) -> bool:
            work(deadline)
            return True

        return self._call(kind, succeed, otherwise=False, times=self._long_times)

    def _touch(self, keys: Sequence[RemoteKey], stored: Callable[[int], tuple[RemoteKey | None, Bytes] | None]) -> None:
        """Touch the leading values, and write the others as far as the remote tier takes them."""
        if not self._background("touch", lambda deadline: self._client.touch(keys, deadline)):
            return
        found = self._call(
            "prefix",
            lambda deadline: self._client.prefix(keys, deadline),
            otherwise=len(keys),
            times=self._long_times,
        )
        for at in range(found, len(keys)):
            if self._is_closing or not self._breaker.is_closed or (record := stored(at)) is None:
                return
            self._recorder.count("published")
            if not self._write(keys[at], *record):
                return

    def _write(self, key: RemoteKey, parent: RemoteKey | None, record: Bytes) -> bool:
        """Write a record, if the engine lacks it and has its parent: a block without its parent is never found.

        Return whether the engine has it then. An engine that is full gets no record for some seconds: it would refuse
        each one only after all of it was sent.
        """
        if self._clock() < self._full_until:
            self._recorder.count("dropped_write_full")
            return False
        with self._changed:
            is_damaged = key in self._damaged
        try:
            outcome = self._call(
                "write",
                lambda deadline: self._write_missing(key, parent, record, deadline, replace=is_damaged),
                otherwise=WriteOutcome.EXISTS,
                num_bytes=record.size,
                times=self._long_times,
            )
        except (_FailedError, RemoteDamageError):
            self._recorder.count("dropped_write_failed")
            return False
        if outcome is WriteOutcome.STORED:
            self._recorder.count("written")
            self._recorder.count("written_bytes", record.size)
            with self._changed:
                self._damaged.pop(key, None)
        else:
            self._recorder.count(f"dropped_write_{outcome.value}")
        return outcome is not WriteOutcome.NO_PARENT

    def _write_missing(
        self, key: RemoteKey, parent: RemoteKey | None, record: Bytes, deadline: Deadline, *, replace: bool
    ) -> WriteOutcome:
        wanted = [*([parent] if parent else []), key]
        found = self._client.prefix(wanted, deadline)
        if parent and not found:
            return WriteOutcome.NO_PARENT
        if found == len(wanted) and not replace:
            return WriteOutcome.EXISTS
        is_stored = self._client.write(key, record, deadline, replace=replace)
        return WriteOutcome.STORED if is_stored else WriteOutcome.EXISTS


class _FailedError(Exception):
    """A call failed and has been counted."""
