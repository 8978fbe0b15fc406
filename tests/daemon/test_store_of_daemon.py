"""A block store over the daemon: daemons end, hang and lie; clients share and die. No byte is wrong, nothing raises."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import ENVIRONMENT, command
from daemon_process import TIMEOUT_S, Daemon, Start
from fake_daemon import FakeDaemon, found, numbers
from stored_blocks import LAYOUT, NAMESPACE, SIZE, TOKENS, load, payload, save
from test_bounded_calls import within
from test_life_and_death import eventually

import tierkv.transfer.daemon_connector
from tierkv import (
    BlockKey,
    BlockStore,
    BlockStoreConfig,
    Buffers,
    ConfigError,
    Namespace,
    Strided,
    Tier,
    digest_namespace,
)
from tierkv.block_store.engines import Engines
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks, EvictionDone, EvictionNotice
from tierkv.daemon.messages import (
    NO_SLOT,
    ChainAnswer,
    Count,
    Done,
    Fetch,
    Fetched,
    FoundPartial,
    Match,
    Message,
    Publish,
    Published,
    Reserve,
    Reserved,
)
from tierkv.daemon.protocol import frame
from tierkv.movers.engine_memory import EngineMemory
from tierkv.movers.ready import Ready
from tierkv.storage.codec import Bytes
from tierkv.storage.outcomes import MissReason
from tierkv.storage.warm import WarmPool

OpenStore = Callable[..., BlockStore]
STORE_WORKER = Path(__file__).with_name("block_store_worker.py")
LOOKUP_WORKER = Path(__file__).with_name("lookup_worker.py")
DIGESTS = digest_namespace(weights="weights", row_bytes=SIZE, dtype="bfloat16")
BOUND_S = 10.0


@pytest.fixture
def open_store(short_path: Path) -> Iterator[OpenStore]:
    """Return a function that opens a block store on the daemon's socket; it may be called for several at a time."""
    opened: list[BlockStore] = []

    def open_one(namespace: Namespace = NAMESPACE, **options: Any) -> BlockStore:
        config = BlockStoreConfig(**{"socket": short_path / "d.sock", "daemon_timeout_s": 1.0, **options})
        store = BlockStore(config, namespace=namespace)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def fast_reconnecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tierkv.transfer.daemon_connector, "_TICK_S", 0.005)
    monkeypatch.setattr(tierkv.transfer.daemon_connector, "RECONNECT_S", 0.01)


def connection_of(store: BlockStore) -> Any:
    return store._tiers._connector.connection  # type: ignore[attr-defined]


def is_connected_to(store: BlockStore, daemon: Daemon) -> bool:
    connection = connection_of(store)
    with DaemonClient(daemon.socket) as client:
        return connection is not None and connection.client.boot == client.boot


def held(daemon: Daemon) -> tuple[int, int]:
    status = daemon.status()
    return status.leased_slots, status.reserved_slots


class Copy:
    """A copy that ends when a test says so. Satisfies `Ready`."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def wait(self, layer: int | None = None) -> None: ...

    def synchronize(self) -> None:
        assert self.ended.wait(TIMEOUT_S)

    def is_done(self) -> bool:
        return self.ended.is_set()


class LateBuffers(Buffers):
    """Buffers that are copied only when a test says so, as a GPU would copy them."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        super().__init__(buffers)
        object.__setattr__(self, "copies", [])
        object.__setattr__(self, "calls", [])

    def load(self, first: int, slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        self.calls.append(lambda: Buffers.load(self, first, slots, memory, after=after))
        self.copies.append(Copy())
        return self.copies[-1]

    def save(self, places: Sequence[int], slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]) -> Ready:
        self.calls.append(lambda: Buffers.save(self, places, slots, memory, after=after))
        self.copies.append(Copy())
        return self.copies[-1]

    def finish(self, number: int = 0) -> None:
        self.calls[number]()
        self.copies[number].ended.set()


# --- Clients share, and die ---------------------------------------------------------------------------------


def test_two_clients_share_blocks(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    first, second = open_store(), open_store()
    keys = first.keys(TOKENS)[:10]
    assert save(first, keys[:6]) == 6
    assert second.contains(keys) == 6 and load(second, keys) == (6, [])
    assert save(second, keys) == 4 and save(first, keys) == 0
    assert load(first, keys, start=5) == (5, [])
    stats = second.stats()
    assert stats.of(Tier.WARM).hits == 6 and stats.tiers[Tier.WARM].blocks == 10
    assert stats.tiers[Tier.WARM].capacity_bytes == 64 * 4096 and not stats.skip_reasons
    eventually(lambda: held(daemon) == (0, 0))


def test_what_another_client_writes_is_found_once_it_is_written(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    first, second = open_store(), open_store()
    keys = first.keys(TOKENS)[:4]
    sources = LateBuffers([payload(key) for key in keys])
    saved = first.save(keys, sources)
    assert saved.num_saved == 4 and not saved.is_done()
    time.sleep(0.05)
    assert held(daemon) == (0, 4)
    assert second.contains(keys) == first.contains(keys) == 0, "half of a block may be there"
    assert save(second, keys) == 0 and not second.stats().skip_reasons, "they are another client's to write"
    sources.finish()
    eventually(lambda: second.contains(keys) == 4)
    assert load(second, keys) == (4, [])
    first.flush()
    assert first.stats().of(Tier.WARM).bytes_in == 4 * SIZE


def test_slots_are_returned_when_the_copies_from_them_have_ended(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    targets = LateBuffers([bytearray(SIZE) for _ in keys])
    found = store.load(store.reserve(keys), targets)
    assert not found.is_done()
    time.sleep(0.3)
    assert held(daemon) == (4, 0), "they are being read"
    targets.finish()
    eventually(lambda: held(daemon) == (0, 0))
    assert found.is_done() and [bytes(each) for each in targets.buffers] == [payload(key) for key in keys]


def test_a_reservation_that_is_released_or_cut_holds_no_more(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:6]
    save(store, keys)
    reservation = store.reserve(keys)
    assert reservation.is_ready and held(daemon) == (6, 0)
    reservation.cut(2)
    eventually(lambda: held(daemon) == (2, 0))
    reservation.release()
    eventually(lambda: held(daemon) == (0, 0))
    store.flush()
    daemon.kill()
    daemon.start()
    eventually(lambda: is_connected_to(store, daemon))
    with store.reserve(keys) as reservation:
        assert reservation.wait(10) and reservation.is_ready and held(daemon) == (6, 0)
    eventually(lambda: held(daemon) == (0, 0))
    cursors = next(each for each in daemon.status().limits if each.name == "cursors")
    assert cursors.used == 0, "a cursor is kept"


@pytest.mark.parametrize("action", ["reserve", "pin"])
def test_a_killed_client_returns_what_it_held(start_daemon: Start, open_store: OpenStore, action: str) -> None:
    daemon = start_daemon()
    line = command(STORE_WORKER, action, daemon.socket)
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert held(daemon) == (8, 0)
        process.kill()
    eventually(lambda: held(daemon) == (0, 0))
    store = open_store()
    assert load(store, store.keys(TOKENS)[:]) == (8, [])


def test_a_scheduler_that_looks_up_needs_no_torch_and_no_memory(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    save(store, store.keys(TOKENS)[:7])
    line = command(LOOKUP_WORKER, daemon.socket)
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.stdout, done.returncode) == ("7 not mapped ['numpy']\n", 0), done.stderr


def test_waves_of_a_long_load_hold_their_slots_until_they_are_copied(
    start_daemon: Start, open_store: OpenStore
) -> None:
    daemon = start_daemon(slots=16)
    store = open_store()
    keys = store.keys(TOKENS)[:]
    for start in range(0, 40, 4):
        assert save(store, keys[: start + 4], start=start) == 4
        store.flush()
    targets = LateBuffers([bytearray(SIZE) for _ in keys])
    found = store.load(store.reserve(keys), targets)
    number = 0
    while not found.is_done():
        eventually(lambda number=number: len(targets.calls) > number or found.is_done())
        if found.is_done():
            break
        time.sleep(0.2)
        assert len(targets.calls) == number + 1 and 0 < held(daemon)[0] <= 8
        targets.finish(number)
        number += 1
    assert found.num_loaded == 40 and number > 4
    assert [bytes(each) for each in targets.buffers] == [payload(key) for key in keys]


def test_blocks_that_are_fetched_for_a_reservation_that_was_released_are_returned(
    start_daemon: Start, open_store: OpenStore
) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:6]
    save(store, keys)
    store.flush()
    daemon.kill()
    daemon.start()
    eventually(lambda: is_connected_to(store, daemon))
    connection, is_released = connection_of(store), threading.Event()
    fetch = connection.call_long

    def fetch_late(*arguments: Any, **options: Any) -> Any:
        answer = fetch(*arguments, **options)
        assert is_released.wait(TIMEOUT_S)
        return answer

    connection.call_long = fetch_late
    reservation = store.reserve(keys)
    eventually(lambda: held(daemon) == (6, 0))
    reservation.cut(2)
    is_released.set()
    assert reservation.wait(TIMEOUT_S) and reservation.num_ready == 2
    eventually(lambda: held(daemon) == (2, 0))
    reservation.release()
    eventually(lambda: held(daemon) == (0, 0))


def test_a_block_that_begins_as_another_one_is_not_held(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    save(store, store.keys(TOKENS[:8])[:])
    with store.reserve(store.keys([*TOKENS[:6], 1, 2])) as reservation:
        assert reservation.num_blocks == 1 and held(daemon) == (1, 0)
    eventually(lambda: held(daemon) == (0, 0))


# --- Pins -------------------------------------------------------------------------------------------------


def test_a_pin_with_a_time_ends_with_it(start_daemon: Start, short_path: Path) -> None:
    now = [0.0]
    daemon = start_daemon(slots=16, store=False, eviction_policy="lru")  # which other blocks push out for sure
    config = BlockStoreConfig(socket=short_path / "d.sock")
    with BlockStore(config, namespace=NAMESPACE, clock=lambda: now[0]) as store:
        first = store.keys(TOKENS)[:4]
        save(store, first)
        assert store.pin(first, ttl_s=10) == 4 and store.pin(first[:2], ttl_s=5) == 2
        eventually(lambda: held(daemon) == (4, 0))
        for seed in range(8):
            save(store, store.keys([seed, *TOKENS])[:4])
        assert store.contains(first) == 4
        now[0] = 6
        eventually(lambda: held(daemon) == (2, 0))
        assert store.unpin(first[2:]) == 0, "a chain begins with its first block"
        eventually(lambda: held(daemon) == (0, 0))
        for seed in range(8):
            save(store, store.keys([seed + 10, *TOKENS])[:4])
        assert store.contains(first) == 0


def test_a_pin_that_is_refused_is_none(start_daemon: Start, open_store: OpenStore) -> None:
    start_daemon(slots=16, pin_share=0.025)
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    assert store.pin(keys) == 0 and store.pin(keys[:3]) == 3


@pytest.mark.parametrize("is_saved_again", [False, True])
def test_a_touched_chain_is_evicted_later(start_daemon: Start, open_store: OpenStore, is_saved_again: bool) -> None:
    start_daemon(slots=16, store=False, eviction_policy="lru")
    store = open_store()
    chains = [store.keys([seed, *TOKENS])[:4] for seed in range(5)]
    for chain in chains[:4]:
        save(store, chain)
    if is_saved_again:
        assert save(store, chains[0]) == 0
    else:
        store.touch(chains[0])
    save(store, chains[4])
    assert store.contains(chains[0]) == 4 and store.contains(chains[1]) == 0


# --- Daemons that end, hang and come back -------------------------------------------------------------------


@pytest.mark.usefixtures("fast_reconnecting")
def test_what_is_reserved_can_be_loaded_though_the_daemon_was_killed(
    start_daemon: Start, open_store: OpenStore
) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:6]
    tensors = [torch.zeros(8, 2, 4, 8) for _ in range(2)]
    memory = store.register([[tensor] for tensor in tensors])
    save(store, keys)
    store.flush()
    old, other = store.reserve(keys), store.reserve(keys[:3])
    assert old.is_ready
    daemon.kill()
    eventually(lambda: connection_of(store) is None)
    assert old.is_ready and old.num_ready == 6, "a promise"
    assert store.contains(keys) == 0 and load(store, keys) == (0, [])
    assert save(store, store.keys(TOKENS[1:])[:2]) == 0
    stats = store.stats()
    assert stats.miss_reasons[MissReason.DAEMON.value] == 1 and stats.skip_reasons["daemon"] == 2
    daemon.start()
    eventually(lambda: is_connected_to(store, daemon))
    other_keys = store.keys(TOKENS[2:])[:6]
    assert save(store, other_keys) == 6, "into the same slots of another slab"
    out = [bytearray(SIZE) for _ in range(3)]
    assert store.load(other, Buffers(out)).num_loaded == 3
    assert [bytes(each) for each in out] == [payload(key) for key in keys[:3]]
    assert store.load(old, Strided(memory, [[at] for at in range(6)])).num_loaded == 6
    assert bytes_of(tensors, 6) == [payload(key) for key in keys], "the other slab's bytes"
    found = store.load(store.reserve(other_keys), Strided(memory, [[at] for at in range(6)]))
    assert found.num_loaded == 6 and bytes_of(tensors, 6) == [payload(key) for key in other_keys]
    assert load(store, keys) == (6, []), "from the disk"


def bytes_of(tensors: Sequence[torch.Tensor], count: int) -> list[bytes]:
    return [b"".join(tensor[at].numpy().tobytes() for tensor in tensors) for at in range(count)]


@pytest.mark.usefixtures("fast_reconnecting")
def test_a_save_whose_daemon_ends_before_its_copies_is_skipped(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    sources = LateBuffers([payload(key) for key in keys])
    assert store.save(keys, sources).num_saved == 4
    before = connection_of(store)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_connected_to(store, daemon))
    assert not before._is_closed, "a copy writes into its slab"
    sources.finish()
    eventually(lambda: store.stats().skip_reasons.get("daemon") == 4)
    assert before._is_closed and store.contains(keys) == 0
    assert save(store, keys) == 4


@pytest.mark.parametrize("are_cold", [False, True])
@pytest.mark.parametrize("is_saved_last", [False, True])
def test_the_slots_of_a_connection_that_was_lost_stay_until_the_copies_have_ended(
    start_daemon: Start, open_store: OpenStore, are_cold: bool, is_saved_last: bool
) -> None:
    """The daemon may be there still: another client must not get the slots meanwhile."""
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    if are_cold:
        store.flush()
        daemon.kill()
        daemon.start()
        eventually(lambda: is_connected_to(store, daemon))
    targets = LateBuffers([bytearray(SIZE) for _ in keys])
    reservation = store.reserve(keys)
    assert reservation.wait(TIMEOUT_S)
    found = store.load(reservation, targets)
    sources = LateBuffers([payload(key) for key in keys])
    saved = store.save(store.keys(TOKENS[1:])[:4], sources)
    connection_of(store).retire()
    time.sleep(0.3)
    assert held(daemon) == (4, 4)
    (targets if is_saved_last else sources).finish()
    time.sleep(0.3)
    assert found.is_done() is is_saved_last and saved.is_done() is not is_saved_last
    assert held(daemon)[is_saved_last] == 4, "the other copies go on"
    (sources if is_saved_last else targets).finish()
    assert found.is_done() and saved.is_done()
    eventually(lambda: held(daemon) == (0, 0))


def test_a_store_may_be_opened_and_used_before_its_daemon(start_daemon: Start, open_store: OpenStore) -> None:
    store = open_store()
    tensors = [torch.zeros(8, 2, 4, 8) for _ in range(2)]
    memory = store.register([[tensor] for tensor in tensors])
    keys = store.keys(TOKENS)[:4]
    places = Strided(memory, [[at] for at in range(4)])
    assert store.save(keys, places).num_saved == 0 and store.contains(keys) == 0
    assert store.pin(keys) == store.pin(keys, ttl_s=1) == store.unpin(keys) == store.clear() == 0
    store.touch(keys)
    store.flush()
    daemon = start_daemon()
    eventually(lambda: is_connected_to(store, daemon))
    assert store.save(keys, places).num_saved == 4
    assert store.load(store.reserve(keys), places).num_loaded == 4


CALLS: dict[str, Callable[[BlockStore, list[BlockKey]], object]] = {
    "contains": lambda store, keys: store.contains(keys),
    "reserve": lambda store, keys: store.reserve(keys).num_blocks,
    "save": lambda store, keys: save(store, store.keys(TOKENS[1:])[:3]),
    "pin": lambda store, keys: store.pin(keys),
    "pin for a time": lambda store, keys: store.pin(keys, ttl_s=3),
    "unpin": lambda store, keys: store.unpin(keys),
    "clear": lambda store, keys: store.clear(),
    "touch": lambda store, keys: store.touch(keys) or 0,
    "flush": lambda store, keys: store.flush() or 0,
    "stats": lambda store, keys: store.stats().tiers[Tier.WARM].blocks,
    "close": lambda store, keys: store.close() or 0,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_to_a_stopped_daemon_ends_and_raises_nothing(
    start_daemon: Start, open_store: OpenStore, name: str
) -> None:
    daemon = start_daemon()
    store = open_store(daemon_timeout_s=0.3)
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    assert daemon.process
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        with within(BOUND_S):
            assert CALLS[name](store, keys) == 0
        with within(BOUND_S):
            store.close()
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def test_blocks_that_a_stopped_daemon_was_to_fetch_have_failed(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    first = open_store(daemon_timeout_s=0.3)
    keys = first.keys(TOKENS)[:8]
    save(first, keys)
    first.flush()
    daemon.kill()
    daemon.start()
    eventually(lambda: is_connected_to(first, daemon))
    connection = connection_of(first)
    fetch = connection.call_long

    def stop_and_fetch(*arguments: Any, **options: Any) -> Any:
        assert daemon.process
        daemon.process.send_signal(signal.SIGSTOP)
        return fetch(*arguments, **options)

    connection.call_long = stop_and_fetch
    try:
        with within(BOUND_S):
            reservation = first.reserve(keys)
            out = [bytearray(SIZE) for _ in keys]
            found = first.load(reservation, Buffers(out))
            assert found.failed_keys == keys and found.num_loaded == 0 and found.is_done()
        assert first.stats().miss_reasons[MissReason.DAEMON.value] == 1
    finally:
        assert daemon.process
        daemon.process.send_signal(signal.SIGCONT)


# --- Daemons that lie ---------------------------------------------------------------------------------------


def chain(**fields: Any) -> Reserved:
    plain: dict[str, Any] = {"numbers": b"", "slots": b"", "num_there": 0, "num_busy": 0, "refusal": ""}
    return Reserved(chains=[ChainAnswer(**{**plain, **fields})])


def answering(**answers: Message | bytes) -> Callable[[Message], Message | bytes]:
    """Answer these messages so, and everything else as an empty daemon does."""
    empty: dict[str, Message] = {"Match": found(), "Reserve": chain(), "Pin": Count(count=0)}

    def answer(message: Message) -> Message | bytes:
        name = type(message).__name__
        return answers.get(name) or empty.get(name) or Done()

    return answer


KEYS = 4
LIES: dict[str, tuple[str, dict[str, Message | bytes]]] = {
    "slots beyond the memory": ("reserve", {"Match": found(numbers(3_999_999_999))}),
    "one slot for two blocks": ("reserve", {"Match": found(numbers(1, 1))}),
    "more blocks than asked for": ("contains", {"Match": found(numbers(1, 2, 3, 4, 5))}),
    "cold blocks without a cursor": ("reserve", {"Match": found(numbers(NO_SLOT))}),
    "a partial block, which the client did not ask for": (
        "contains",
        {"Match": found(partial_block=FoundPartial(bytes(16), bytes(16), 1, 3))},
    ),
    "another message": ("contains", {"Match": Count(count=3)}),
    "half of a number": ("contains", {"Match": found(b"\1")}),
    "a block fetched beyond the memory": (
        "reserve",
        {"Match": found(numbers(NO_SLOT), cursor=1), "Fetch": Fetched(slots=numbers(64), miss="")},
    ),
    "more blocks than were fetched": (
        "reserve",
        {"Match": found(numbers(NO_SLOT), cursor=1), "Fetch": Fetched(slots=numbers(1, 2), miss="")},
    ),
    "a slot to write that is leased": (
        "save",
        {"Reserve": chain(numbers=numbers(0), slots=numbers(9)), "Publish": Published(count=1, lost=b"")},
    ),
    "a slot to write beyond the memory": ("save", {"Reserve": chain(numbers=numbers(0), slots=numbers(64))}),
    "a block to write that is not proposed": ("save", {"Reserve": chain(numbers=numbers(7), slots=numbers(1))}),
    "more published than written": (
        "save",
        {
            "Reserve": chain(numbers=numbers(0), slots=numbers(1)),
            "Publish": Published(count=2, lost=b""),
        },
    ),
    "more pinned than there are": ("pin", {"Pin": Count(count=9)}),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.usefixtures("fast_reconnecting")
def test_a_lie_is_a_miss_and_the_daemon_is_asked_no_more(short_path: Path, open_store: OpenStore, lie: str) -> None:
    name, answers = LIES[lie]
    with FakeDaemon(short_path / "d.sock", answering(**answers)) as daemon:
        store = open_store()
        keys = store.keys(TOKENS)[:KEYS]
        first = connection_of(store)
        first.lease([9])
        if name == "reserve":
            reservation = store.reserve(keys)
            assert reservation.wait(10) and reservation.num_blocks == 0
        elif name == "save":
            assert save(store, keys) == 0
            assert sum(store.stats().skip_reasons.values()) == KEYS
        else:
            assert CALLS[name](store, keys) == 0
        eventually(lambda: connection_of(store) is None)
        asked = sum(isinstance(each, Match | Reserve | Fetch) for each in daemon.received)
        before = daemon.num_greeted
        eventually(lambda: daemon.num_greeted > before + 1)
        assert store.contains(keys) == 0 and load(store, keys) == (0, []) and save(store, keys) == 0
        assert sum(isinstance(each, Match | Reserve | Fetch) for each in daemon.received) == asked
        daemon.boot, daemon.answer = 78, answering(Match=found(numbers(1, 2)))
        eventually(lambda: connection_of(store) is not None)
        assert store.contains(keys) == 2
        first.return_lease(9)


def test_refusals_and_reasons_of_a_daemon_are_counted_under_known_names(
    short_path: Path, open_store: OpenStore
) -> None:
    answers = answering(Match=found(miss="x" * 99), Reserve=chain(refusal="y" * 99))
    with FakeDaemon(short_path / "d.sock", answers):
        store = open_store()
        keys = store.keys(TOKENS)[:KEYS]
        assert store.reserve(keys).num_blocks == 0 and save(store, keys) == 0
        stats = store.stats()
        assert stats.skip_reasons == {"refused": KEYS} and stats.miss_reasons == {MissReason.DAEMON.value: 1}


def test_a_slot_is_no_longer_being_written_when_the_daemon_hears_that_it_is(
    short_path: Path, open_store: OpenStore
) -> None:
    """From then on the daemon may lease it, to another request of this very process."""
    written: list[set[int]] = []

    def answer(message: Message) -> Message | bytes:
        if isinstance(message, Publish):
            written.append(set(connection_of(store)._written))
            return Published(count=2, lost=b"")
        return answering(Reserve=chain(numbers=numbers(0, 1), slots=numbers(5, 6)))(message)

    with FakeDaemon(short_path / "d.sock", answer):
        store = open_store()
        assert save(store, store.keys(TOKENS)[:2]) == 2
        assert written == [set()]


# --- Messages -----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the requests that are waited for, and may be cleared."""
    names: list[str] = []
    call = DaemonClient.call

    def counted(self: DaemonClient, message: Message, *arguments: Any, **options: Any) -> Any:
        names.append(type(message).__name__)
        return call(self, message, *arguments, **options)

    monkeypatch.setattr(DaemonClient, "call", counted)
    return names


@pytest.mark.parametrize("are_rows", [False, True])
def test_a_list_of_keys_takes_one_message(
    start_daemon: Start, open_store: OpenStore, asked: list[str], are_rows: bool
) -> None:
    start_daemon(slots=256)
    store = open_store(DIGESTS if are_rows else NAMESPACE)
    keys = [store.key_of_digest(bytes([at]) * 32) for at in range(40)] if are_rows else store.keys(TOKENS)[:]
    asked.clear()
    assert store.save(keys, Buffers([payload(key) for key in keys])).num_saved == 40
    assert asked == ["Reserve", "Publish"]
    asked.clear()
    assert store.contains(keys) == 40 and asked == ["Match"]
    asked.clear()
    assert load(store, keys) == (40, []) and asked == ["Match"]
    asked.clear()
    store.touch(keys)
    assert asked == []
    assert store.pin(keys) == 40 and store.unpin(keys) == 40


def test_an_eviction_is_answered_though_nothing_is_kept_here(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    time.sleep(0.3)
    with DaemonClient(daemon.socket) as client, within(1.5):
        evicted = client.call(EvictBlocks(namespace=NAMESPACE.digest), EvictedBlocks)
    assert evicted.warm == 4
    assert [(engine.has_answered, engine.blocks) for engine in evicted.engines] == [(True, 0)]
    assert store.contains(keys) == 0


@pytest.mark.usefixtures("fast_reconnecting")
def test_evictions_are_answered_once(short_path: Path, open_store: OpenStore) -> None:
    with FakeDaemon(short_path / "d.sock", answering()) as daemon:
        open_store()

        def answered() -> list[int]:
            return [each.number for each in daemon.received if isinstance(each, EvictionDone)]

        eventually(lambda: answered() == [0])
        for number in (3, 2, 7):
            daemon._connections[0].sendall(frame(EvictionNotice(number), number=0, boot=daemon.boot))
        eventually(lambda: answered()[-1] == 7)
        time.sleep(0.1)
        assert answered() in ([0, 7], [0, 3, 7])


# --- What a store over a daemon is opened with ----------------------------------------------------------------


def test_a_daemon_that_speaks_of_another_layout_refuses(start_daemon: Start, open_store: OpenStore) -> None:
    start_daemon(slots=4)
    big = LAYOUT.uniform(num_layers=8, block_size=64, kv_heads=4, head_dim=64, dtype="float32")
    with pytest.raises(Exception, match="does not fit"):
        open_store(Namespace(weights="w", layout=big))


def test_a_store_of_its_own_and_a_daemons_exclude_each_other(short_path: Path) -> None:
    with pytest.raises(ConfigError, match="socket names a daemon"):
        BlockStoreConfig(socket=short_path / "d.sock", read_only=True)
    with pytest.raises(ConfigError, match="daemon_timeout_s"):
        BlockStoreConfig(socket=short_path / "d.sock", daemon_timeout_s=0)
    assert BlockStoreConfig(socket="~/d.sock", warm_bytes=0).socket == Path.home() / "d.sock"  # type: ignore[arg-type]


# --- Ends ---------------------------------------------------------------------------------------------------


def test_closing_a_store_returns_what_its_user_still_reserves(start_daemon: Start, open_store: OpenStore) -> None:
    daemon = start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    reservation = store.reserve(keys)
    assert store.pin(keys, ttl_s=100) == 4
    store.close()
    eventually(lambda: held(daemon) == (0, 0) and daemon.status().clients == 1)
    reservation.release()
    reservation.release()


def test_a_pool_of_an_earlier_connection_is_unbound_with_its_last_slot(
    start_daemon: Start, open_store: OpenStore
) -> None:
    daemon = start_daemon()
    store = open_store()
    memory = store.register([[torch.zeros(8, 2, 4, 8)] for _ in range(2)])
    keys = store.keys(TOKENS)[:2]
    save(store, keys)
    reservation = store.reserve(keys)
    assert store.pin(keys[:1], ttl_s=100) == 1
    daemon.kill()
    daemon.start()
    eventually(lambda: is_connected_to(store, daemon))
    assert len(memory._slots) == 2
    reservation.release()
    eventually(lambda: len(memory._slots) == 1)
    store.close()
    assert not memory._slots


def test_a_memory_that_is_registered_while_a_pool_opens_is_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(LAYOUT)
    engines.open(WarmPool(SIZE, 4))
    is_binding, bind = threading.Event(), EngineMemory.bind

    def bind_slowly(self: EngineMemory, address: int, slots: torch.Tensor) -> None:
        assert engines._lock.locked(), "another pool may open meanwhile"
        is_binding.set()
        time.sleep(0.2)
        bind(self, address, slots)

    monkeypatch.setattr(EngineMemory, "bind", bind_slowly)
    memories: list[EngineMemory] = []

    def register() -> None:
        layers = [[torch.zeros(8, 2, 4, 8)] for _ in range(2)]
        memories.append(engines.register(layers, pages_per_block=1))

    thread = threading.Thread(target=register)
    thread.start()
    assert is_binding.wait(TIMEOUT_S)
    engines.open(WarmPool(SIZE, 4))
    thread.join(TIMEOUT_S)
    assert len(memories[0]._slots) == 2


def test_a_message_without_a_number_is_not_answered(start_daemon: Start, open_store: OpenStore) -> None:
    start_daemon()
    store = open_store()
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    client = connection_of(store).client
    time.sleep(0.2)
    store.contains(keys)
    before = client.bytes_received
    store.touch(keys)
    store.contains(keys)
    once = client.bytes_received - before
    store.contains(keys)
    assert client.bytes_received - before == 2 * once, "the use was answered"


def test_a_pool_is_page_locked_once_for_all_engines_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("tierkv.movers.engine_memory.page_lock", lambda *_: calls.append("lock") or torch.zeros(1))
    monkeypatch.setattr("tierkv.movers.engine_memory.page_unlock", lambda *_: calls.append("unlock"))
    engines = Engines(LAYOUT)
    pool = engines.open(WarmPool(SIZE, 4))
    for _ in range(2):
        engines.register([[torch.zeros(8, 2, 4, 8)] for _ in range(2)], pages_per_block=1)
    second = engines.open(WarmPool(SIZE, 4))
    assert calls == ["lock", "lock"], "CUDA refuses to lock memory twice"
    pool.close()
    pool.close()
    assert calls == ["lock", "lock", "unlock"]
    engines.close()
    second.close()
    assert calls == ["lock", "lock", "unlock", "unlock"]
