"""A daemon that is another user's, broken, or none: what it says is never believed further than it can be."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from daemon_process import OpenCache, Start
from fake_daemon import NUM_SLOTS, FakeDaemon, found, honest, numbers, sealed_memory
from pattern_engine import PatternEngine
from raw_client import LAYOUT, NAMESPACE, chain_of, hello, tokens_of
from test_life_and_death import eventually

import tierkv.daemon.client
import tierkv.daemon.host
import tierkv.transfer.daemon_connector
from tierkv.cache import TierCache
from tierkv.daemon.answers import AnswerCheck, WrongAnswerError
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.eviction_messages import (
    EngineEvicted,
    EvictBlocks,
    EvictedBlocks,
    Eviction,
    EvictionNotice,
    Evictions,
    EvictionsSince,
)
from tierkv.daemon.messages import (
    NO_SLOT,
    Chain,
    ChainAnswer,
    Count,
    Done,
    Evict,
    Failure,
    Fetch,
    Fetched,
    Flush,
    Found,
    FoundPartial,
    LoadState,
    Match,
    Message,
    Pin,
    Prefetch,
    Publish,
    Published,
    Reserve,
    Reserved,
    Saved,
    SaveState,
    Status,
    StatusReport,
    TenantStatus,
    Waited,
    Welcome,
)
from tierkv.daemon.protocol import HEADER, PROTOCOL_VERSION, frame, split_numbers
from tierkv.errors import DaemonError, DaemonGoneError, StoreError
from tierkv.storage.warm import Slab
from tierkv.values.users import user_name

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as Python says of threads

PROMPT = list(range(1000, 1013))  # three whole blocks and one token
MATCH = Match(hashes=chain_of(tokens_of(15)), tokens=tokens_of(15), lease=True)
REST = tokens_of(3, start=12)
CHECK = AnswerCheck(num_slots=NUM_SLOTS, block_size=4)


def partial_block(**fields: Any) -> FoundPartial:
    plain: dict[str, Any] = {"block_hash": bytes(16), "tokens": REST + tokens_of(1, 99), "num_tokens": 3, "slot": 9}
    return FoundPartial(**{**plain, **fields})


def chain(**fields: Any) -> ChainAnswer:
    plain: dict[str, Any] = {
        "numbers": numbers(0, 2),
        "slots": numbers(5, 6),
        "num_there": 1,
        "num_busy": 0,
        "refusal": "",
    }
    return ChainAnswer(**{**plain, **fields})


def report(**fields: Any) -> StatusReport:
    sizes = "pid warm_bytes warm_free_bytes rss_bytes clients leased_slots reserved_slots claims pending_writes"
    plain: dict[str, Any] = dict.fromkeys([*sizes.split(), "bytes_received", "bytes_sent"], 1)
    plain |= {"uptime_s": 1.0, "socket": "", "store": "", "counters": {}, "tenants": [], "cold": {}}
    return StatusReport(**{**plain, **fields})


RESERVE = Reserve(chains=[Chain(chain_of(tokens_of(12)), tokens_of(12), numbers(0, 1, 2))])
THREE = numbers(5, 6, 7)

RIGHT: list[tuple[Message, Message]] = [
    (MATCH, found()),
    (MATCH, found(THREE, partial_block=partial_block())),
    (MATCH, found(numbers(5, NO_SLOT, 7), cursor=1)),
    (MATCH, found(THREE, partial_block=partial_block(slot=NO_SLOT), cursor=1)),
    (Fetch(cursor=1, first=0, count=2), Fetched(slots=numbers(1, 2), miss="")),
    (Fetch(cursor=1, first=0, count=2), Fetched(slots=b"", miss="absent")),
    (RESERVE, Reserved(chains=[chain()])),
    (Publish(slots=numbers(5, 6)), Published(count=1, lost=numbers(6))),
    (Pin(hashes=chain_of(tokens_of(12)), tokens=tokens_of(12), pinned=True), Count(count=4)),
    (Evict(count=-1), Count(count=NUM_SLOTS)),
    (SaveState(path="/x"), Saved(blocks=0, file_bytes=0)),
    (Status(), report(cold={"blocks": 1, "live_bytes": 2, "quota_bytes": 3})),
    (Flush(), Done()),
]

WRONG: dict[str, tuple[Message, Message]] = {
    "a slot beyond the memory": (MATCH, found(numbers(5, NUM_SLOTS, 6))),
    "a slot far beyond the memory": (MATCH, found(numbers(3_999_999_999, 1, 2))),
    "more blocks than were asked for": (MATCH, found(numbers(1, 2, 3, 4))),
    "half a number": (MATCH, found(b"\1\0\0")),
    "one slot for two blocks": (MATCH, found(numbers(5, 6, 5))),
    "one slot for a block and the partial block": (MATCH, found(THREE, partial_block=partial_block(slot=6))),
    "cold blocks without a cursor": (MATCH, found(numbers(5, NO_SLOT))),
    "a cursor that is no number of 32 bits": (MATCH, found(numbers(NO_SLOT), cursor=1 << 32)),
    "a cursor below zero": (MATCH, found(THREE, cursor=-1)),
    "a claim that the client did not ask for": (MATCH, found(claim=3)),
    "computing, where nobody asked": (MATCH, found(is_computing=True)),
    "an endless reason": (MATCH, found(miss="x" * 100_000)),
    "a partial block of a million tokens": (MATCH, found(THREE, partial_block=partial_block(num_tokens=10**6))),
    "a partial block of more tokens than the rest": (MATCH, found(THREE, partial_block=partial_block(num_tokens=4))),
    "a partial block of no token": (MATCH, found(THREE, partial_block=partial_block(num_tokens=0))),
    "a partial block of fewer than no tokens": (MATCH, found(THREE, partial_block=partial_block(num_tokens=-3))),
    "a partial block of other tokens": (MATCH, found(THREE, partial_block=partial_block(tokens=tokens_of(4, 50)))),
    "a partial block that is larger than a block": (
        MATCH,
        found(THREE, partial_block=partial_block(tokens=REST + tokens_of(2))),
    ),
    "a partial block of half a token": (MATCH, found(THREE, partial_block=partial_block(tokens=REST + b"\1"))),
    "a partial block behind other blocks than it says": (MATCH, found(numbers(5), partial_block=partial_block())),
    "a partial block beyond the memory": (MATCH, found(THREE, partial_block=partial_block(slot=NUM_SLOTS))),
    "a partial block with a short hash": (MATCH, found(THREE, partial_block=partial_block(block_hash=b"x"))),
    "more blocks than were fetched": (Fetch(1, 0, 1), Fetched(slots=numbers(1, 2), miss="")),
    "a block fetched to nowhere": (Fetch(1, 0, 1), Fetched(slots=numbers(NO_SLOT), miss="")),
    "a block fetched beyond the memory": (Fetch(1, 0, 1), Fetched(slots=numbers(NUM_SLOTS), miss="")),
    "two blocks fetched to one slot": (Fetch(1, 0, 2), Fetched(slots=numbers(1, 1), miss="")),
    "fewer chains than were asked about": (RESERVE, Reserved(chains=[])),
    "more chains than were asked about": (RESERVE, Reserved(chains=[chain(), chain(slots=b"", numbers=b"")])),
    "a slot to write beyond the memory": (RESERVE, Reserved(chains=[chain(slots=numbers(5, NUM_SLOTS))])),
    "a block to write nowhere": (RESERVE, Reserved(chains=[chain(slots=numbers(5, NO_SLOT))])),
    "one slot to write two blocks": (RESERVE, Reserved(chains=[chain(slots=numbers(5, 5))])),
    "slots for no block": (RESERVE, Reserved(chains=[chain(numbers=numbers(0))])),
    "a block that was not offered": (RESERVE, Reserved(chains=[chain(numbers=numbers(0, 3))])),
    "one block twice": (RESERVE, Reserved(chains=[chain(numbers=numbers(2, 2))])),
    "children before parents": (RESERVE, Reserved(chains=[chain(numbers=numbers(2, 0))])),
    "more blocks there than were offered": (RESERVE, Reserved(chains=[chain(num_there=4)])),
    "fewer than no busy blocks": (RESERVE, Reserved(chains=[chain(num_busy=-1)])),
    "an endless refusal": (RESERVE, Reserved(chains=[chain(refusal="x" * 100_000)])),
    "more published than written": (Publish(slots=numbers(5)), Published(count=2, lost=b"")),
    "another slot lost": (Publish(slots=numbers(5)), Published(count=0, lost=numbers(6))),
    "more pinned than there are": (Pin(hashes=bytes(16), tokens=tokens_of(4), pinned=True), Count(count=3)),
    "more announced than there are": (Prefetch(hashes=bytes(16), tokens=tokens_of(4)), Count(count=10**9)),
    "more evicted than fit": (Evict(count=-1), Count(count=NUM_SLOTS + 1)),
    "more evicted than asked for": (Evict(count=2), Count(count=3)),
    "fewer than none evicted": (Evict(count=2), Count(count=-1)),
    "a file of more blocks than any": (LoadState(path="/x"), Count(count=1 << 60)),
    "fewer than no blocks saved": (SaveState(path="/x"), Saved(blocks=-1, file_bytes=1)),
    "a file of fewer than no bytes": (SaveState(path="/x"), Saved(blocks=1, file_bytes=-1)),
    "a cold tier without sizes": (Status(), report(cold={"blocks": 1})),
    "a cold tier of less than nothing": (Status(), report(cold={"blocks": -1, "live_bytes": 0, "quota_bytes": 0})),
    "a time that is none": (Status(), report(uptime_s=float("nan"))),
    "memory of less than nothing": (Status(), report(warm_bytes=-1)),
    "a namespace of less than nothing": (
        Status(),
        report(
            tenants=[
                TenantStatus(namespace="", name="", block_bytes=1, warm_blocks=-1, pinned_bytes=0, clients=0),
            ]
        ),
    ),
}


@pytest.mark.parametrize(("asked", "answer"), RIGHT)
def test_what_a_daemon_may_answer_is_taken(asked: Message, answer: Message) -> None:
    CHECK.check(asked, answer)


@pytest.mark.parametrize("lie", WRONG)
def test_what_a_daemon_cannot_answer_is_refused(lie: str) -> None:
    with pytest.raises(WrongAnswerError):
        CHECK.check(*WRONG[lie])


def test_a_partial_block_shorter_than_asked_for_is_refused() -> None:
    asked = Match(hashes=MATCH.hashes, tokens=MATCH.tokens, lease=True, min_partial_tokens=3)
    CHECK.check(asked, found(THREE, partial_block=partial_block()))
    with pytest.raises(WrongAnswerError):
        CHECK.check(asked, found(THREE, partial_block=partial_block(num_tokens=2)))


# --- Through a cache: a lie is a miss, and the daemon is gone ------------------------------------------


@pytest.fixture
def fast_reconnecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tierkv.transfer.daemon_connector, "_TICK_S", 0.005)
    monkeypatch.setattr(tierkv.transfer.daemon_connector, "RECONNECT_S", 0.01)


def connection_of(cache: TierCache) -> object:
    assert cache._daemon
    return cache._daemon.connection


def wrongly(answer: Message | bytes) -> Callable[[Message], Message | bytes]:
    """Answer a Match so, and everything else as the prompt's client expects."""

    def said(message: Message) -> Message | bytes:
        return answer if isinstance(message, Match) else Done()

    return said


FALSE_FRAMES: dict[str, Message | bytes] = {
    "another message": Count(count=3),
    "a request": Match(hashes=b"", tokens=b""),
    "no message": HEADER.pack(4, PROTOCOL_VERSION, 1, 77) + b"\xc1\xc1\xc1\xc1",
    "half of a message": HEADER.pack(2, PROTOCOL_VERSION, 1, 77) + b"\x91\x04",
    "a frame without end": HEADER.pack(0xFFFF_FFFF, PROTOCOL_VERSION, 1, 77),
    "another version": HEADER.pack(1, PROTOCOL_VERSION + 1, 1, 77) + b"\x90",
    "another daemon": bytes(frame(found(), number=1, boot=78)),
}


@pytest.mark.parametrize(
    "answer",
    [
        found(numbers(3_999_999_999, 3_999_999_999, 3_999_999_999)),
        found(numbers(1, 1, 1)),
        found(numbers(1, 2, 3, 4)),
        found(numbers(1, 2, 3), partial_block=FoundPartial(bytes(16), tokens_of(4, 1000), 10**6, 3)),
        found(b"\1"),
        *FALSE_FRAMES.values(),
    ],
    ids=["slots", "one slot", "blocks", "partial_block", "bytes", *FALSE_FRAMES],
)
@pytest.mark.usefixtures("fast_reconnecting")
def test_a_wrong_answer_is_a_miss_and_the_daemon_is_asked_no_more(
    short_path: Path, open_cache: OpenCache, answer: Message | bytes
) -> None:
    with FakeDaemon(short_path / "d.sock", wrongly(answer)) as daemon:
        cache = open_cache()
        assert connection_of(cache)
        sequence = cache.acquire(PROMPT)
        assert sequence.num_cached_tokens == 0
        cache.release(sequence)
        before = daemon.num_greeted
        eventually(lambda: daemon.num_greeted > before + 1)  # it is looked for again
        assert connection_of(cache) is None, "what it says is believed again"
        assert cache.match(PROMPT).num_cached_tokens == 0
        assert sum(isinstance(each, Match) for each in daemon.received) == 1
        daemon.boot, daemon.answer = 78, wrongly(found())  # another daemon, which does not lie
        eventually(lambda: connection_of(cache) is not None)
        cache.check()


@pytest.mark.usefixtures("fast_reconnecting")
def test_slots_that_this_process_writes_are_not_leased_nor_the_other_way_round(
    short_path: Path, open_cache: OpenCache
) -> None:
    for first, second in (("begin_writing", "lease"), ("lease", "begin_writing"), ("begin_writing", "begin_writing")):
        with FakeDaemon(short_path / "d.sock"):
            cache = open_cache()
            connection: Any = connection_of(cache)
            getattr(connection, first)([3, 4])
            with pytest.raises(DaemonGoneError, match=r"in use|being written"):
                getattr(connection, second)([5, 4])
            if first == "lease":
                connection.return_lease(3)
                connection.return_lease(4)
            else:
                connection.end_writing([3, 4])
            eventually(lambda cache=cache: connection_of(cache) is None)
            cache.close()
        (short_path / "d.sock").unlink()


def test_slots_are_leased_again_once_they_are_written(short_path: Path, open_cache: OpenCache) -> None:
    with FakeDaemon(short_path / "d.sock"):
        connection: Any = connection_of(open_cache())
        connection.begin_writing([3])
        connection.end_writing([3])
        connection.lease([3, 3])
        connection.return_lease(3)
        connection.return_lease(3)
        connection.begin_writing([3])
        connection.end_writing([3])
        assert not connection.client.has_answered_wrongly


def test_a_slot_is_no_longer_leased_when_the_daemon_hears_of_it(short_path: Path, open_cache: OpenCache) -> None:
    """From then on the daemon may give it to be written, to this very process."""
    seen: list[bool] = []
    with FakeDaemon(short_path / "d.sock"):
        connection: Any = connection_of(open_cache())
        connection.post = lambda message: seen.append(3 in connection._leased)
        connection.lease([3])
        connection.return_lease(3)
        connection.send_returned()
        assert seen == [False]


def test_every_lease_is_returned_once_though_threads_return_and_send_at_once(
    short_path: Path, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeDaemon(short_path / "d.sock"):
        cache = open_cache()
        connection: Any = connection_of(cache)
        sent: list[int] = []
        monkeypatch.setattr(connection, "post", lambda message: sent.extend(split_numbers(message.slots)))
        connection.lease([slot % 4 for slot in range(4000)])
        returning = Thread(target=lambda: [connection.return_lease(number % 4) for number in range(4000)])
        failures: list[BaseException] = []

        def send() -> None:
            try:
                while returning.is_alive():
                    connection.send_returned()
            except BaseException as exc:  # noqa: BLE001 - reported below
                failures.append(exc)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [returning, Thread(target=send), Thread(target=send)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        connection.send_returned()
        assert not failures
        assert sorted(sent) == sorted(number % 4 for number in range(4000))


def test_a_slot_is_no_longer_being_written_when_the_daemon_hears_that_it_is(
    short_path: Path, open_cache: OpenCache
) -> None:
    """From then on the daemon may lend it, to another request of this very process."""
    written: list[set[int]] = []

    def answer(message: Message) -> Message:
        connection: Any = connection_of(cache)
        if isinstance(message, Reserve):
            offered = [split_numbers(each.proposed) for each in message.chains]
            assert [list(each) for each in offered] == [[0, 1]]
            return Reserved(chains=[chain(numbers=numbers(0, 1), num_there=0)])
        if isinstance(message, Publish):
            written.append(set(connection._written))
            return Published(count=2, lost=b"")
        return Done() if isinstance(message, Flush) else found()

    with FakeDaemon(short_path / "d.sock", answer) as daemon:
        cache = open_cache(write_through=True)
        cache.release(PatternEngine(cache).start(PROMPT[:9]))
        cache.flush()
        assert sum(isinstance(each, Publish) for each in daemon.received) == 1
        assert written == [set()]
        assert not cache.stats().skip_reasons


def test_sizes_that_cannot_be_are_none(short_path: Path, open_cache: OpenCache) -> None:
    with FakeDaemon(short_path / "d.sock", lambda message: report(cold={"blocks": 3})):
        stats = open_cache().stats()
        assert stats.hit_rate == 0


# --- The greeting -------------------------------------------------------------------------------------


def regular_file() -> list[int]:
    memory = os.memfd_create("plain")
    os.ftruncate(memory, NUM_SLOTS * 4096)
    return [memory]


MEMORY: dict[str, Callable[[], list[int]]] = {
    "that can shrink": lambda: [sealed_memory(seals=0x1 | 0x4)],
    "that can grow": lambda: [sealed_memory(seals=0x1 | 0x2)],
    "whose seals are not all": lambda: [sealed_memory(seals=0x2 | 0x4)],
    "without seals": lambda: [sealed_memory(seals=0)],
    "that cannot be sealed": regular_file,
    "that is smaller than said": lambda: [sealed_memory(size=4096)],
    "that is larger than said": lambda: [sealed_memory(size=1 << 20)],
    "that is a pipe": lambda: list(os.pipe())[:1],
    "that is a directory": lambda: [os.open("/", os.O_RDONLY)],
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_is_mapped_only_if_its_size_is_sealed_and_right(kind: str) -> None:
    (descriptor, *rest) = MEMORY[kind]()
    with pytest.raises(StoreError, match="cannot be mapped"):
        Slab.attach(descriptor, NUM_SLOTS * 4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    for each in rest:
        os.close(each)


def test_memory_as_a_daemon_makes_it_is_mapped() -> None:
    slab = Slab(NUM_SLOTS * 4096)
    assert slab.fd is not None
    other = Slab.attach(os.dup(slab.fd), slab.size_bytes)
    other.bytes[7] = 3
    assert slab.bytes[7] == 3
    for each in (other, slab):
        each.close()


@pytest.mark.parametrize("count", [0, 2, 17])
def test_one_descriptor_comes_with_the_greeting_and_no_other_is_kept(short_path: Path, count: int) -> None:
    with FakeDaemon(short_path / "d.sock", descriptors=lambda: [sealed_memory() for _ in range(count)]):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DaemonGoneError, match="descriptors came"):
            DaemonClient(short_path / "d.sock", hello())
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)  # and the daemon's end of the socket


WELCOMES: dict[str, Message | bytes] = {
    "no memory": Welcome(pid=1, slab_bytes=0, store="", has_cold=False),
    "less memory than none": Welcome(pid=1, slab_bytes=-4096, store="", has_cold=False),
    "more memory than any": Welcome(pid=1, slab_bytes=1 << 62, store="", has_cold=False),
    "another message": Done(),
    "no message": HEADER.pack(1, PROTOCOL_VERSION, 1, 77) + b"\xc1",
    "another number": bytes(
        frame(Welcome(pid=1, slab_bytes=NUM_SLOTS * 4096, store="", has_cold=False), number=2, boot=77)
    ),
}


@pytest.mark.parametrize("kind", WELCOMES)
def test_a_greeting_that_cannot_be_is_refused(short_path: Path, kind: str) -> None:
    with (
        FakeDaemon(short_path / "d.sock", welcome=lambda _: WELCOMES[kind]),
        pytest.raises(DaemonError),
    ):
        DaemonClient(short_path / "d.sock", hello())


def test_nothing_is_sent_to_a_daemon_of_another_user(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process is the daemon, and it is the client that seems to be somebody else."""
    monkeypatch.setattr(tierkv.daemon.host, "_CREDENTIALS", _Credentials(os.geteuid() + 1))
    with FakeDaemon(short_path / "d.sock") as daemon:
        with pytest.raises(DaemonError, match="belongs to user"):
            DaemonClient(short_path / "d.sock", hello())
        time.sleep(0.02)
        assert daemon.received_bytes == 0
        for own in (0, os.geteuid()):  # root, and the same user, are believed
            monkeypatch.setattr(tierkv.daemon.host, "_CREDENTIALS", _Credentials(own))
            DaemonClient(short_path / "d.sock", hello()).close()


class _Credentials:
    """What SO_PEERCRED says, with another uid."""

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self.size = 12

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        assert len(raw) == 12
        return 1, self._uid, 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_cache_refuses_a_socket_that_another_user_has_made(short_path: Path, open_cache: OpenCache) -> None:
    os.chmod(short_path, 0o777)
    server = socket.socket(socket.AF_UNIX)
    child = os.fork()
    if not child:
        os.setuid(65534)
        server.bind(str(short_path / "d.sock"))
        server.listen()
        os.kill(os.getpid(), 19)  # until it is killed
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        with pytest.raises(DaemonError, match=f"belongs to user {user_name(65534)}"):
            open_cache()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        server.close()


def test_a_refusal_is_read_although_the_daemon_has_closed_the_connection(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = short_path / "d.sock"
    connect = tierkv.daemon.client.connect
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def connect_late(path: Path, **_: object) -> socket.socket:
            connection = connect(path)
            with server.accept()[0] as peer:
                peer.sendall(frame(Failure(message="3 connections already", is_fatal=True), number=0, boot=77))
            return connection

        monkeypatch.setattr(tierkv.daemon.client, "connect", connect_late)
        with pytest.raises(DaemonError, match="refused: 3 connections already"):
            DaemonClient(path)


# --- Slow, silent, interrupted ------------------------------------------------------------------------


def test_a_daemon_that_dribbles_its_greeting_has_no_more_time_than_a_silent_one(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tierkv.daemon.client, "CONNECT_TIMEOUT_S", 0.2)
    with FakeDaemon(short_path / "d.sock", chunk_s=0.02):
        started = time.monotonic()
        with pytest.raises(DaemonGoneError, match="in time"):
            DaemonClient(short_path / "d.sock", hello(), timeout_s=0.1)
        assert time.monotonic() - started < 2


def test_a_daemon_that_dribbles_its_answer_has_no_more_time_than_a_silent_one(short_path: Path) -> None:
    with (
        FakeDaemon(short_path / "d.sock", lambda _: b"\0" * 8 + b"x" * 500, chunk_s=0.001) as daemon,
        closing(DaemonClient(short_path / "d.sock", hello(), timeout_s=5.0)) as client,
    ):
        daemon._chunk_s = 0.02
        started = time.monotonic()
        with pytest.raises(DaemonError):
            client.call(MATCH, Found, timeout_s=0.2)
        assert time.monotonic() - started < 2
        assert not client.is_alive


def test_answers_to_other_requests_are_no_answer(short_path: Path) -> None:
    with FakeDaemon(short_path / "d.sock") as daemon:
        client = DaemonClient(short_path / "d.sock", hello(), timeout_s=0.2)
        daemon._number = lambda number: number + 7
        with pytest.raises(DaemonGoneError, match="in time"):
            client.call(MATCH, Found)
        client.close()


def test_an_interrupted_call_ends_the_connection(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes all the same, and may lend slots that nobody would give back."""
    with FakeDaemon(short_path / "d.sock"):
        client = DaemonClient(short_path / "d.sock", hello())

        def interrupted(*_: object) -> bytes:
            raise KeyboardInterrupt

        monkeypatch.setattr(tierkv.daemon.client, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.call(MATCH, Found)
        assert not client.is_alive
        with pytest.raises(DaemonGoneError, match="interrupted"):
            client.call(MATCH, Found)
        client.close()


def test_what_a_daemon_says_is_one_line_of_plain_text(short_path: Path) -> None:
    said = "\x1b[2Jno\r\n\x00" + "x" * 100_000
    with (
        FakeDaemon(short_path / "d.sock", lambda _: Failure(message=said, is_fatal=False)),
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
        pytest.raises(DaemonError) as raised,
    ):
        client.call(MATCH, Found)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def test_a_path_that_is_not_unicode_is_refused_before_it_is_sent(short_path: Path) -> None:
    with (
        FakeDaemon(short_path / "d.sock") as daemon,
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        with pytest.raises(DaemonError, match="cannot be sent"):
            client.call(SaveState(path="/tmp/\udcff"), Saved)
        assert client.is_alive
        assert len(daemon.received) == 1


def test_a_daemon_that_computes_for_ever_is_waited_for_as_long_as_is_allowed(
    short_path: Path, open_cache: OpenCache
) -> None:
    def answer(message: Message) -> Message:
        if isinstance(message, Match):
            return found(is_computing=message.wants_claim)
        return Waited(is_over=False)

    with FakeDaemon(short_path / "d.sock", answer) as daemon:
        cache = open_cache(compute_wait_s=20.0)
        started = time.monotonic()
        cache.release(cache.acquire(PROMPT))
        assert time.monotonic() - started < 5
        assert len(daemon.received) < 20


# --- Evictions ----------------------------------------------------------------------------------------


def eviction(number: int = 1, at: float = 0.0, **fields: Any) -> Evictions:
    return Evictions(log=1, number=1, is_complete=True, evictions=[Eviction(number, at, **fields)])


def tell(daemon: FakeDaemon, message: Message, number: int = 0) -> None:
    """Send something that nobody has asked for."""
    daemon._connections[0].sendall(frame(message, number=number, boot=daemon.boot))


@pytest.mark.parametrize(
    "answer",
    [
        Evictions(log=0, number=1, is_complete=True, evictions=[]),
        Evictions(log=1, number=-1, is_complete=True, evictions=[]),
        eviction(number=2),
        eviction(at=float("nan")),
        eviction(older_than_s=float("inf")),
        eviction(namespace=bytes(3)),
        eviction(tokens=bytes(3)),
        eviction(block_hashes=bytes(17)),
    ],
    ids=["log", "number", "order", "time", "age", "namespace", "tokens", "hashes"],
)
def test_impossible_evictions_are_rejected(short_path: Path, answer: Evictions) -> None:
    with (
        FakeDaemon(short_path / "d.sock", evictions=lambda _: answer),
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        with pytest.raises(DaemonGoneError, match="impossible"):
            client.call(EvictionsSince(log=0, number=0), Evictions)
        assert client.has_answered_wrongly


@pytest.mark.parametrize(
    "answer",
    [
        EvictedBlocks(-1, 0, 0, 0, 0, {}, []),
        EvictedBlocks(0, 0, 0, 0, 1 << 62, {}, []),
        EvictedBlocks(0, 0, 0, 0, 0, {"pinned": -1}, []),
        EvictedBlocks(0, 0, 0, 0, 0, {"x" * 1000: 1}, []),
        EvictedBlocks(0, 0, 0, 0, 0, {}, [EngineEvicted("a", True, -1)]),
        EvictedBlocks(0, 0, 0, 0, 0, {}, [EngineEvicted("a" * 1000, False)]),
    ],
)
def test_what_a_daemon_claims_to_have_evicted_is_checked(short_path: Path, answer: EvictedBlocks) -> None:
    with (
        FakeDaemon(short_path / "d.sock", lambda _: answer),
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        with pytest.raises(DaemonGoneError, match="impossible"):
            client.call_long(EvictBlocks(older_than_s=1.0), EvictedBlocks, timeout_s=5)
        assert client.has_answered_wrongly


def test_a_daemon_that_notifies_of_evictions_that_it_does_not_know_is_not_asked_for_ever(
    short_path: Path, open_cache: OpenCache
) -> None:
    with FakeDaemon(short_path / "d.sock") as daemon:
        cache = open_cache()
        cache.release(cache.acquire(PROMPT))
        tell(daemon, EvictionNotice(number=1 << 61))
        cache.release(cache.acquire(PROMPT))
        eventually(lambda: connection_of(cache) is None)
        assert len([each for each in daemon.received if isinstance(each, Match)]) == 1


def test_only_a_notice_of_evictions_may_come_unasked(short_path: Path) -> None:
    with (
        FakeDaemon(short_path / "d.sock") as daemon,
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        tell(daemon, EvictionNotice(number=3))
        tell(daemon, EvictionNotice(number=2))
        tell(daemon, EvictionNotice(number=9), number=7)
        tell(daemon, found(numbers(1)))
        client.call(MATCH, Found)
        assert client.is_alive and client.last_eviction == 3 and not client._answers


def test_a_daemon_that_notifies_without_end_delays_no_call(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        FakeDaemon(short_path / "d.sock"),
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        started = time.monotonic()

        def read(deadline: float) -> None:
            assert time.monotonic() - started < 2
            time.sleep(0.001)

        monkeypatch.setattr(client, "_has_input", lambda timeout_s: True)
        monkeypatch.setattr(client, "_read_some", read)
        client.read_waiting()


@pytest.mark.parametrize("name", ["read_waiting", "call_long"])
def test_an_interrupt_while_others_are_read_for_ends_the_connection(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with (
        FakeDaemon(short_path / "d.sock") as daemon,
        closing(DaemonClient(short_path / "d.sock", hello())) as client,
    ):
        tell(daemon, EvictionNotice(number=3))
        eventually(lambda: client._has_input(0))

        def interrupted(*_: object) -> bytes:
            raise KeyboardInterrupt

        monkeypatch.setattr(tierkv.daemon.client, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.read_waiting() if name == "read_waiting" else client.call_long(Flush(), Done, timeout_s=60)
        assert not client.is_alive and not client._is_reading and not client._waiting


def test_a_long_call_has_one_deadline_whatever_trickles_in(short_path: Path) -> None:
    answer = Saved(blocks=1, file_bytes=1)

    def answered(message: Message) -> Message:
        return answer if isinstance(message, SaveState) else honest(message)

    with (
        FakeDaemon(short_path / "d.sock", answered) as daemon,
        closing(DaemonClient(short_path / "d.sock", hello(), timeout_s=0.3)) as client,
    ):
        assert client.call_long(SaveState(path="/x"), Saved, timeout_s=5) == answer
        daemon._chunk_s = 0.05
        started = time.monotonic()
        with pytest.raises(DaemonError):
            client.call_long(SaveState(path="/x"), Saved, timeout_s=0.5)
        assert time.monotonic() - started < 3
        assert not client._waiting and not client._answers


# --- Fork ---------------------------------------------------------------------------------------------


@pytest.fixture
def real_client(start_daemon: Start) -> Iterator[DaemonClient]:
    daemon = start_daemon()
    with DaemonClient(daemon.socket, hello()) as client:
        yield client


def test_a_forked_process_does_not_keep_the_connection_and_cannot_use_it(real_client: DaemonClient) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            is_closed = real_client._socket.fileno() == -1
            refused = 0
            for call in (
                lambda: real_client.call(MATCH, Found),
                lambda: real_client.post(Done()),
                real_client.has_hung_up,
            ):
                try:
                    call()
                except DaemonGoneError:
                    refused += 1
            real_client.close()
            said = f"{is_closed} {refused}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"True 3"
    os.close(read)
    os.waitpid(child, 0)
    assert real_client.call(MATCH, Found).slots == b"", "the parent's end is as it was"


def test_the_check_is_of_the_namespace_that_was_named() -> None:
    welcome = Welcome(pid=1, slab_bytes=NUM_SLOTS * 4096, store="", has_cold=False)
    assert AnswerCheck.of(hello(), welcome) == AnswerCheck(NUM_SLOTS, LAYOUT.block_size)
    assert AnswerCheck.of(hello(), welcome).block_size == NAMESPACE.layout.block_size
