"""The guard: a remote tier that fails costs misses, never an exception, and while it is down no time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from remote_servers import wait_until

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.breaker import Breaker
from tierkv.remote_tiers.call_threads import CallThreads
from tierkv.remote_tiers.guard import GuardedRemote
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.storage.outcomes import MissReason

KEYS = [RemoteKey(bytes(16), bytes([number]) * 16) for number in range(8)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeClient:
    """Keeps values in a dict. failure: raised by every call, if there is one."""

    def __init__(self) -> None:
        self.values: dict[RemoteKey, bytes] = {}
        self.failure: Exception | None = None
        self.write_failure: Exception | None = None
        self.num_calls = 0
        self.gate = threading.Event()
        self.gate.set()
        self.touched: list[RemoteKey] = []
        self.described: list[bytes] = []

    def _call(self) -> None:
        self.num_calls += 1
        if self.failure:
            raise self.failure

    def ping(self, deadline: Deadline) -> None:
        self._call()

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        self._call()
        return next((at for at, key in enumerate(keys) if key not in self.values), len(keys))

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        self._call()
        value = self.values.get(key)
        if value is not None and len(value) > most_bytes:
            raise RemoteDamageError("too long")
        return None if value is None else np.frombuffer(value, dtype=np.uint8)

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        self.gate.wait(10)
        self._call()
        if self.write_failure:
            raise self.write_failure
        if key in self.values and not replace:
            return False
        self.values[key] = record.tobytes()
        return True

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        self._call()
        self.touched += keys

    def describe(self, namespace: bytes, description: bytes, deadline: Deadline) -> None:
        self._call()
        self.described.append(namespace)

    def close(self) -> None: ...


def guarded(client: FakeClient, url: str = "redis://host", **options: object) -> GuardedRemote:
    remote = GuardedRemote(client, RemoteUrl.parse(url), **options)  # type: ignore[arg-type]
    assert remote.flush(timeout_s=10)
    return remote


def record(size: int = 8) -> Bytes:
    return np.arange(size, dtype=np.uint8)


def write(remote: GuardedRemote, at: int, parent: int | None = None, size: int = 8) -> None:
    remote.write_later(KEYS[at], None if parent is None else KEYS[parent], record(size), held_bytes=size)


def test_the_breaker_opens_after_three_failures_in_a_row_and_doubles_its_wait_up_to_a_minute() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    breaker.note_failure()
    breaker.note_failure()
    breaker.note_success()
    breaker.note_failure()
    breaker.note_failure()
    assert breaker.is_closed
    assert breaker.note_failure()
    assert not breaker.is_closed
    waits = []
    for _ in range(9):
        wait = breaker.probe_in_s()
        assert wait is not None
        waits.append(wait)
        clock.now += wait
        assert breaker.probe_in_s() == 0
        assert not breaker.note_failure(), "a call that began earlier and fails now"
        assert breaker.probe_in_s() == 0
        breaker.note_failure(is_probe=True)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    breaker.note_success()
    assert breaker.is_closed and breaker.probe_in_s() is None


def test_a_remote_that_fails_is_not_asked_until_a_probe_succeeds() -> None:
    client = FakeClient()
    client.values[KEYS[0]] = b"value"
    with_clock = Clock()
    remote = guarded(client, clock=with_clock)
    client.failure = RemoteError("gone")
    assert [remote.prefix(KEYS) for _ in range(2)] == [0, 0]
    assert remote.read(KEYS[0], most_bytes=100) is MissReason.REMOTE
    assert not remote.is_up
    asked = client.num_calls
    assert remote.prefix(KEYS) == 0
    assert remote.read(KEYS[0], most_bytes=100) is MissReason.REMOTE
    write(remote, 1)
    assert client.num_calls == asked, "the breaker is open"
    counters = remote.stats().counters
    assert counters["failed_prefix"] == 2 and counters["failed_read"] == 1 and counters["breaker_opened"] == 1
    assert counters["skipped_prefix"] == 1 and counters["skipped_read"] == 1
    assert counters["dropped_write_down"] == 1
    client.failure = None
    with_clock.now += 1.5
    wait_until(lambda: remote.is_up)
    assert remote.prefix(KEYS) == 1
    remote.close()


def test_a_remote_that_is_down_at_the_start_costs_no_call() -> None:
    client = FakeClient()
    client.failure = RemoteError("nothing listens")
    remote = guarded(client)
    assert not remote.is_up
    assert remote.prefix(KEYS) == 0 and client.num_calls == 1
    remote.close()


def test_a_full_remote_still_answers_reads_and_is_written_to_again_later() -> None:
    client, clock = FakeClient(), Clock()
    remote = guarded(client, clock=clock)
    write(remote, 0)
    remote.flush(timeout_s=10)
    client.write_failure = RemoteRefusedError("full", code="OOM")
    for _ in range(5):
        write(remote, 1, 0)
    remote.flush(timeout_s=10)
    assert remote.is_up and remote.prefix(KEYS) == 1
    counters = remote.stats().counters
    assert counters["failed_oom"] == 1 and counters["dropped_write_failed"] == 1
    assert counters["dropped_write_full"] == 4, "it is not asked again at once"
    client.write_failure = None
    clock.now += 6
    write(remote, 1, 0)
    remote.flush(timeout_s=10)
    assert remote.prefix(KEYS) == 2
    remote.close()


def test_a_refused_read_opens_the_breaker() -> None:
    client = FakeClient()
    remote = guarded(client)
    client.failure = RemoteRefusedError("no", code="NOPERM")
    for _ in range(3):
        assert remote.prefix(KEYS) == 0
    assert not remote.is_up and remote.stats().counters["failed_noperm"] == 3
    remote.close()


def test_no_block_is_written_without_its_parent_and_none_twice() -> None:
    client = FakeClient()
    remote = guarded(client)
    write(remote, 1, 0)
    write(remote, 0)
    write(remote, 1, 0)
    write(remote, 1, 0)
    assert remote.flush(timeout_s=10)
    assert set(client.values) == set(KEYS[:2])
    counters = remote.stats().counters
    assert counters["dropped_write_no_parent"] == 1 and counters["dropped_write_exists"] == 1
    assert counters["written"] == 2 and counters["written_bytes"] == 16
    remote.close()


def test_the_queue_of_writes_is_bounded_in_bytes_and_drops_what_comes_last() -> None:
    client = FakeClient()
    remote = guarded(client, queue_bytes=100)
    client.gate.clear()
    for at in range(5):
        write(remote, at, at - 1 if at else None, size=40)
    assert remote.stats().counters["dropped_write_queue_full"] == 3
    client.gate.set()
    assert remote.flush(timeout_s=10)
    assert set(client.values) == set(KEYS[:2])
    write(remote, 2, 1, size=40)
    remote.flush(timeout_s=10)
    assert KEYS[2] in client.values, "the memory of what was written is free again"
    remote.close()


def test_a_damaged_value_counts_as_absent_until_a_good_record_has_replaced_it() -> None:
    client = FakeClient()
    remote = guarded(client)
    for at in range(3):
        client.values[KEYS[at]] = b"zeros"
    remote.note_damaged(KEYS[1])
    assert remote.prefix(KEYS) == 1
    write(remote, 1, 0)
    assert remote.flush(timeout_s=10)
    assert client.values[KEYS[1]] == record().tobytes()
    assert remote.prefix(KEYS) == 3
    remote.close()


def test_a_value_that_is_too_long_is_damage_and_no_failure_of_the_remote() -> None:
    client = FakeClient()
    remote = guarded(client)
    client.values[KEYS[0]] = bytes(1000)
    for _ in range(5):
        assert remote.read(KEYS[0], most_bytes=10) is MissReason.CORRUPT
    assert remote.is_up and remote.prefix(KEYS) == 0
    remote.close()


def test_a_touch_writes_what_the_remote_lacks_and_this_machine_has() -> None:
    client = FakeClient()
    remote = guarded(client)
    write(remote, 0)
    stored = {at: (KEYS[at - 1], record(at + 1)) for at in (1, 2, 4)}
    remote.touch_later(KEYS[:5], stored.get)
    assert remote.flush(timeout_s=10)
    assert client.touched == KEYS[:5]
    assert set(client.values) == set(KEYS[:3]), "a block after a gap is of no use"
    assert remote.stats().counters["published"] == 2
    remote.close()


def test_a_read_only_remote_gets_no_write() -> None:
    client = FakeClient()
    remote = guarded(client, "redis://host?read_only=true")
    asked = client.num_calls
    write(remote, 0)
    remote.touch_later(KEYS, lambda _: None)
    remote.describe_later(bytes(16), b"{}")
    assert remote.flush(timeout_s=10) and client.num_calls == asked
    remote.close()


def test_a_description_that_was_dropped_is_written_later() -> None:
    client = FakeClient()
    remote = guarded(client, queue_bytes=8)
    client.gate.clear()
    write(remote, 0)
    wait_until(lambda: not remote._jobs)
    for _ in range(5000):
        remote.touch_later(KEYS, lambda _: None)
    remote.describe_later(bytes(16), b"{}")
    assert remote.stats().counters["dropped_describe_queue_full"] == 1
    client.gate.set()
    assert remote.flush(timeout_s=60)
    remote.describe_later(bytes(16), b"{}")
    assert remote.flush(timeout_s=10)
    assert client.described == [bytes(16)]
    remote.close()


def test_a_description_that_waits_while_the_remote_goes_down_is_written_later() -> None:
    client = FakeClient()
    clock = Clock()
    remote = guarded(client, clock=clock)
    client.gate.clear()
    write(remote, 0)
    wait_until(lambda: not remote._jobs)
    remote.describe_later(bytes(16), b"{}")
    client.failure = RemoteError("gone")
    for _ in range(3):
        remote.read(KEYS[5], most_bytes=10)
    client.gate.set()
    assert remote.flush(timeout_s=10)
    assert remote.stats().counters["dropped_describe_down"] == 1
    client.failure = None
    clock.now += 100
    with remote._changed:
        remote._changed.notify_all()
    wait_until(lambda: remote.is_up)
    remote.describe_later(bytes(16), b"{}")
    assert remote.flush(timeout_s=10)
    assert client.described == [bytes(16)]
    remote.close()


def test_closing_writes_what_is_queued_and_drops_what_comes_later() -> None:
    client = FakeClient()
    remote = guarded(client)
    write(remote, 0)
    remote.close()
    assert KEYS[0] in client.values
    write(remote, 1)
    assert remote.prefix(KEYS) == 0
    assert remote.stats().counters["dropped_write_closing"] == 1
    remote.close()


def test_calls_are_timed_by_kind() -> None:
    client = FakeClient()
    remote = guarded(client)
    for _ in range(10):
        remote.prefix(KEYS)
    latencies = remote.stats().latencies["prefix"]
    assert latencies.count == 10 and 0 < latencies.quantile_us(0.5) < 1_000_000
    assert latencies.total_s > 0
    remote.close()


def test_a_deadline_grows_with_the_bytes_of_a_value_and_ends() -> None:
    clock = Clock()
    deadline = Deadline(CallTime(base_s=0.3, bytes_per_s=50e6), clock=clock)
    assert deadline.left_s() == pytest.approx(0.3)
    deadline.allow_bytes(50_000_000)
    clock.now += 1.2
    assert deadline.left_s() == pytest.approx(0.1)
    clock.now += 0.2
    with pytest.raises(RemoteError, match="in time"):
        deadline.left_s()


def test_a_call_that_hangs_is_left_behind_and_its_late_result_is_undone() -> None:
    threads = CallThreads(2, name="test")
    gate, undone = threading.Event(), []

    def hang() -> str:
        gate.wait(10)
        return "late"

    calls: list[Callable[[], str]] = [hang, hang]
    for call in calls:
        with pytest.raises(RemoteError, match="in time"):
            threads.call(call, left_s=Deadline(CallTime(base_s=0.01)).left_s, undo=undone.append)
    with pytest.raises(RemoteError, match="have not returned"):
        threads.call(lambda: "never", left_s=lambda: 5.0)
    gate.set()
    wait_until(lambda: undone == ["late", "late"])
    assert threads.call(lambda: "now", left_s=lambda: 5.0) == "now"
    with pytest.raises(ZeroDivisionError):
        threads.call(lambda: str(1 // 0), left_s=lambda: 5.0)
    with pytest.raises(ZeroDivisionError):
        threads.call_all([lambda: "now", lambda: str(1 // 0)], left_s=lambda: 5.0)
    assert threads.call_all([lambda: "one", lambda: "two"], left_s=lambda: 5.0) == ["one", "two"]
    threads.close()
    with pytest.raises(RemoteError, match="closed"):
        threads.call(lambda: "never", left_s=lambda: 5.0)


def test_a_call_has_the_time_that_it_allows_itself_while_the_caller_waits() -> None:
    threads = CallThreads(1, name="test")
    deadline = Deadline(CallTime(base_s=0.1, bytes_per_s=1e6))

    def read() -> str:
        deadline.allow_bytes(10_000_000)
        threading.Event().wait(0.3)
        return "read"

    assert threads.call(read, left_s=deadline.left_s) == "read"
    threads.close()
