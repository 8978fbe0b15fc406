"""What the daemon's core keeps for clients is bounded, for each and for all, and goes with its owner. No processes."""

from __future__ import annotations

import os
from array import array
from typing import Any

import pytest
from core_model import (
    SLOT_BYTES,
    Client,
    DictStore,
    Stored,
    as_bytes,
    finish_load,
    finish_write,
    layout,
)

from tierkv.daemon.core import Core
from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import Chain, Fetch, Match, Pin, Release, Reserve
from tierkv.daemon.protocol import ProtocolError, split_numbers
from tierkv.daemon.status import usage_of
from tierkv.daemon.values import Connection
from tierkv.errors import CapacityError, ConfigError, DaemonError
from tierkv.index.chosen_eviction import Choice
from tierkv.values.block import hash_block

NAMESPACE = b"n" * 16


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_core(
    num_slots: int = 32, *, store: DictStore | None = None, clock: Clock | None = None, **limits: Any
) -> Core:
    return Core(
        num_slots * SLOT_BYTES, clock=clock or Clock(), store=store, extent_bytes=SLOT_BYTES, limits=Limits(**limits)
    )


def connect(core: Core, *, pages: int = 1, digest: bytes = NAMESPACE, description: bytes = b"") -> Connection:
    """Return a connection whose blocks take so many pages."""
    connection = core.connect()
    core.open_tenant(connection, digest, description, layout=layout(pages * SLOT_BYTES // layout().block_bytes))
    return connection


def used(core: Core, name: str) -> int:
    return next(each.used for each in usage_of(core) if each.name == name)


def in_store_only(core: Core, store: DictStore, prompt: list[int]) -> Client:
    """Return a client whose prompt is in the store and not in the warm tier."""
    client = Client(core, {}, NAMESPACE, hash_block)
    while len(store.blocks) < len(prompt) // 2:
        client.reserve(as_bytes(prompt), list(range(len(prompt) // 2)))
        for write in client.publish(len(client.reserved)):
            finish_write(core, store, client.slab, write)
    core.evict(client.connection, -1)
    return client


def test_fetching_the_same_block_again_and_again_takes_no_more_leases_than_a_client_may_have() -> None:
    store = DictStore()
    core = make_core(16, store=store)
    client = in_store_only(core, store, [1, 2, 3, 4])
    found = client.match(as_bytes([1, 2, 3, 4]))
    for _ in range(30):
        task = core.loads.begin_fetch(client.connection, Fetch(cursor=found.cursor, first=0, count=1))
        finish_load(core, client.slab, task)
        fetched = core.loads.end_fetch(client.connection, task)
    assert client.connection.num_leases == 8, "half of the slots"
    assert (fetched.slots, fetched.miss) == (b"", "no_room")
    core.check()


def test_fetches_that_are_in_work_count_as_leases() -> None:
    store = DictStore()
    core = make_core(16, store=store)
    prompt = list(range(2, 24))
    client = in_store_only(core, store, prompt)
    found = client.match(as_bytes(prompt))
    tasks = [core.loads.begin_fetch(client.connection, Fetch(cursor=found.cursor, first=0, count=5)) for _ in range(3)]
    assert [len(task.slots) for task in tasks] == [5, 3, 0]
    finish_load(core, client.slab, tasks[0])
    for task in tasks:
        core.loads.end_fetch(client.connection, task)
    assert (client.connection.num_leases, client.connection.num_fetching) == (8, 0)
    core.check()
    core.disconnect(client.connection)
    assert used(core, "leases") == 0
    core.check()


def test_leases_of_all_clients_have_a_limit() -> None:
    core = make_core(64, leases=5)
    client = Client(core, {}, NAMESPACE, hash_block)
    client.reserve(as_bytes(list(range(8))), [0, 1, 2, 3])
    client.publish(4)
    other = Client(core, client.slab, NAMESPACE, hash_block)
    assert len(client.match(as_bytes(list(range(8)))).slots) == 16
    other.match(as_bytes(list(range(8))))
    assert other.connection.num_leases == 1, "the others are found, and not leased"
    core.check()


def test_reservations_of_all_clients_leave_slots_to_read() -> None:
    core = make_core(32)
    for number in range(6):
        tokens = as_bytes([number] * 40)
        Client(core, {}, NAMESPACE, hash_block).reserve(tokens, list(range(20)))
    assert len(core.reservations) == 24, "three quarters"
    assert max(len(each.reservations) for each in core.connections) == 8, "a quarter"
    core.check()
    for connection in list(core.connections):
        core.disconnect(connection)
    assert len(core.reservations) == 0
    core.check()


def matched(core: Core, connection: Connection, count: int, **options: Any) -> Any:
    tokens = os.urandom(8 * count)
    return core.match(connection, Match(hashes=os.urandom(16 * count), tokens=tokens, **options))


def test_claims_are_bounded_for_each_client_and_for_all() -> None:
    core = make_core(claimed_blocks_of_client=100, claimed_blocks=150)
    first, second = connect(core), connect(core)
    for _ in range(3):
        matched(core, first, 60, wants_claim=True)
    assert (first.num_claimed, len(first.claims)) == (100, 2)
    assert matched(core, first, 60, wants_claim=True).claim == 0, "nothing is promised, and nothing refused"
    matched(core, second, 60, wants_claim=True)
    assert (second.num_claimed, core.claims.num_blocks) == (50, 150)
    core.check()
    core.disconnect(first)
    assert core.claims.num_blocks == 50
    core.check()


def test_a_ticket_that_has_expired_is_freed() -> None:
    clock = Clock()
    core = make_core(clock=clock)
    client = Client(core, {}, NAMESPACE, hash_block)
    client.match(as_bytes([1, 2, 3, 4]))
    clock.now = 10
    client.match(as_bytes([5, 6, 7, 8]))
    clock.now = 50
    client.reserve(as_bytes([1, 2]), [0])
    client.publish(1)  # news of the first claim: the other one expires before it
    core.trim()
    assert core.claims.num_blocks == 3
    clock.now = 71
    core.trim()
    assert (core.claims.num_blocks, len(client.connection.claims)) == (1, 1)
    core.check()
    clock.now = 111
    core.trim()
    assert (client.connection.num_claimed, core.claims.num_blocks, client.connection.claims) == (0, 0, {})
    core.check()


def test_a_ticket_of_one_namespace_says_nothing_of_another() -> None:
    core = make_core()
    forger, honest = connect(core, digest=b"f" * 16), connect(core)
    hashes, tokens = os.urandom(32), os.urandom(16)
    for connection in (forger, honest):
        found = core.match(connection, Match(hashes=hashes, tokens=tokens, wants_claim=True))
        assert found.claim and not found.is_computing
    core.check()


def cursors_of(core: Core, store: DictStore, count: int, blocks: int) -> Client:
    """Return a client that has asked so often for a prompt of so many blocks in the store."""
    client = in_store_only(core, store, list(range(2 * blocks)))
    for _ in range(count):
        assert client.match(as_bytes(list(range(2 * blocks)))).cursor
    return client


def test_cursors_are_bounded_in_number_and_in_bytes() -> None:
    store = DictStore()
    core = make_core(store=store, cursors_of_client=3, cursor_bytes_of_client=2000, cursor_bytes=3000)
    first = cursors_of(core, store, 9, 2)
    assert len(first.connection.cursors) == 3
    assert next(iter(first.connection.cursors)) == first.cursors[-3][0], "the oldest goes"
    second = cursors_of(core, store, 9, 8)
    assert len(second.connection.cursors) == 2, "three of 704 bytes are too many"
    assert core.loads.cursor_bytes <= 3000
    assert first.connection.cursors, "of all, those go whose owner has most"
    core.check()
    core.release(second.connection, Release(cursors=array("I", [1, 2, 3, 4_000_000_000]).tobytes()))
    core.disconnect(second.connection)
    core.disconnect(first.connection)
    assert core.loads.cursor_bytes == 0
    core.check()


def test_a_cursor_keeps_what_was_found_and_not_what_was_asked() -> None:
    store = DictStore()
    core = make_core(store=store)
    client = in_store_only(core, store, [1, 2])
    client.match(as_bytes([1, 2] + [9] * 20_000))
    assert 0 < client.connection.cursor_bytes < 1000


def test_sizes_of_blocks_that_nobody_uses_are_given_up() -> None:
    core = make_core(64)
    for pages in range(1, 40):
        core.disconnect(connect(core, pages=pages, digest=bytes([pages]) * 16))
    core.trim()
    assert not core.slab.classes and not core.tenants.by_digest
    core.check()


def test_a_size_in_use_makes_no_room_and_one_with_idle_blocks_does() -> None:
    core = make_core(64, block_sizes=2)
    idle = Client(core, {}, NAMESPACE, hash_block)
    idle.reserve(as_bytes([1, 2, 3, 4]), [0, 1])
    idle.publish(2)
    core.pin(idle.connection, Pin(hashes=b"".join(idle.chain(as_bytes([1, 2]))), tokens=as_bytes([1, 2]), pinned=True))
    held = connect(core, pages=2, digest=b"h" * 16)
    with pytest.raises(CapacityError, match="sizes of blocks already, all of them in use"):
        connect(core, pages=3, digest=b"w" * 16)
    core.check()
    core.disconnect(idle.connection)
    wanting = connect(core, pages=3, digest=b"w" * 16)
    assert (
        set(core.tenants.by_digest) == {held.tenant.digest, wanting.tenant.digest}
        if held.tenant and wanting.tenant
        else False
    )
    assert used(core, "pinned_bytes") == 0
    core.check()


def test_a_block_that_is_being_stored_keeps_its_size() -> None:
    store = DictStore()
    core = make_core(64, store=store, block_sizes=1)
    client = Client(core, {}, NAMESPACE, hash_block)
    client.reserve(as_bytes([1, 2]), [0])
    (write,) = client.publish(1)
    core.disconnect(client.connection)
    with pytest.raises(CapacityError, match="sizes of blocks"):
        connect(core, pages=2, digest=b"w" * 16)
    core.check()
    finish_write(core, store, client.slab, write)
    connect(core, pages=2, digest=b"w" * 16)
    core.check()


def test_slots_of_all_sizes_have_a_limit() -> None:
    core = make_core(64, slots=80, slots_of_block_size=60)
    small = connect(core)
    assert small.tenant and small.tenant.size_class.num_slots == 60
    assert len(small.tenant.size_class.take(64)) == 60
    with pytest.raises(CapacityError, match="sizes of blocks"):
        connect(core, pages=2, digest=b"o" * 16)
    connect(core, pages=4, digest=b"l" * 16)


def test_namespaces_are_bounded_in_number_and_in_the_bytes_of_their_descriptions() -> None:
    core = make_core(namespaces=4, description_bytes=1000)
    held = [connect(core, digest=bytes([number]) * 16, description=b"x" * 200) for number in range(4)]
    with pytest.raises(CapacityError, match="4 namespaces already, all of them in use"):
        connect(core, digest=b"more" * 4)
    core.disconnect(held.pop())
    with pytest.raises(CapacityError, match="3 namespaces already"):
        connect(core, digest=b"more" * 4, description=b"x" * 401)
    connect(core, digest=b"more" * 4, description=b"x" * 400)
    for number in range(100):
        core.disconnect(held.pop())
        held.append(connect(core, digest=bytes([100 + number]) * 16))
    assert len(core.tenants.by_digest) == 4
    core.check()


def test_the_namespace_that_was_left_first_gives_its_blocks_up_first() -> None:
    clock = Clock()
    core = make_core(namespaces=2, clock=clock)
    for name in (b"a" * 16, b"b" * 16):
        client = Client(core, {}, name, hash_block)
        client.reserve(as_bytes([1, 2]), [0])
        client.publish(1)
        clock.now += 1
        core.disconnect(client.connection)
    connect(core)
    assert set(core.tenants.by_digest) == {b"b" * 16, NAMESPACE}
    core.check()


def pin(core: Core, client: Client, tokens: bytes) -> None:
    core.pin(client.connection, Pin(hashes=b"".join(client.chain(tokens)), tokens=tokens, pinned=True))


def test_tenants_that_have_gone_cannot_keep_everything_pinned() -> None:
    core = Core(16 * SLOT_BYTES, clock=Clock(), extent_bytes=SLOT_BYTES, pin_share=0.002)  # 131 bytes; a block has 64
    for owner in range(1000):
        connection = core.connect()
        core.open_tenant(connection, owner.to_bytes(16, "big"), b"", layout=layout(), owner=str(owner))
        core.disconnect(connection)
    assert core.pins.quota_of_all_bytes == 8 * SLOT_BYTES
    core.pins.quota_of_all_bytes = 3 * 64
    clients = []
    for name in (b"a" * 16, b"b" * 16, b"c" * 16, b"d" * 16):
        client = Client(core, {}, name, hash_block)
        assert client.connection.tenant
        client.connection.tenant.owner = name.decode()
        client.reserve(as_bytes([1, 2]), [0])
        client.publish(1)
        clients.append(client)
    for client in clients[:3]:
        pin(core, client, as_bytes([1, 2]))
    with pytest.raises(DaemonError, match="all tenants together"):
        pin(core, clients[3], as_bytes([1, 2]))
    core.disconnect(clients[0].connection)
    pin(core, clients[3], as_bytes([1, 2]))
    assert [client.connection.tenant.pinned_bytes for client in clients if client.connection.tenant] == [0, 64, 64, 64]
    core.check()


def test_a_pin_with_a_time_to_live_ends_and_frees_its_share() -> None:
    clock = Clock()
    core = Core(16 * SLOT_BYTES, clock=clock, extent_bytes=SLOT_BYTES)
    client = Client(core, {}, NAMESPACE, hash_block)
    tokens = as_bytes([1, 2])
    client.reserve(tokens, [0])
    client.publish(1)
    ask = Pin(hashes=b"".join(client.chain(tokens)), tokens=tokens, pinned=True, ttl_s=30.0)
    core.pin(client.connection, ask)
    assert client.connection.tenant
    clock.now += 29
    core.trim()
    assert client.connection.tenant.pinned_bytes == 64
    clock.now += 2
    core.trim()
    assert client.connection.tenant.pinned_bytes == 0 and core.evict(client.connection, -1) == 1
    client.reserve(tokens, [0])
    client.publish(1)
    core.pin(client.connection, ask)
    pin(core, client, tokens)  # for good: it replaces the time
    clock.now += 1e6
    core.trim()
    assert client.connection.tenant.pinned_bytes == 64
    with pytest.raises(ProtocolError):
        core.pin(client.connection, Pin(hashes=ask.hashes, tokens=tokens, pinned=True, ttl_s=float("nan")))
    core.check()


def test_a_block_cannot_take_the_place_of_another_namespaces_root() -> None:
    core = make_core()
    forger = Client(core, {}, b"f" * 16, hash_block)
    chain = Chain(NAMESPACE, as_bytes([1, 2]), array("I", [0]).tobytes())
    (answer,) = core.reservations.reserve(forger.connection, Reserve(chains=[chain])).chains
    core.publish(forger.connection, answer.slots)
    honest = Client(core, {}, NAMESPACE, hash_block)
    honest.reserve(as_bytes([1, 2, 3, 4]), [0, 1])
    assert len(honest.reserved) == 2
    honest.publish(2)
    assert len(honest.match(as_bytes([1, 2, 3, 4])).slots) == 8
    core.check()


def test_pinning_a_stored_partial_block_pins_no_block_of_another_namespace_that_has_its_hash() -> None:
    store = DictStore()
    core = make_core(store=store)
    owner = Client(core, {}, NAMESPACE, hash_block)
    other = Client(core, {}, b"o" * 16, hash_block)
    other.reserve(as_bytes([7, 8]), [0])
    other.publish(1)
    (forged,) = other.chain(as_bytes([7, 8]))
    store.blocks[forged] = Stored(NAMESPACE, as_bytes([1]), b"", (b"", b""))
    core.pin(owner.connection, Pin(hashes=b"", tokens=as_bytes([1]), pinned=True))
    assert owner.connection.tenant and owner.connection.tenant.pinned_bytes == 0
    assert other.connection.tenant and not any(e.pinned for e in other.connection.tenant.size_class.index)


def test_a_refused_chain_leaves_no_root_behind() -> None:
    core = make_core()
    connection = connect(core)
    chain = Chain(bytes(16), as_bytes([1, 2]), array("I", [0]).tobytes())  # the hash that no block can have
    (answer,) = core.reservations.reserve(connection, Reserve(chains=[chain])).chains
    assert (answer.slots, answer.refusal) == (b"", "collision")
    assert connection.tenant and not list(connection.tenant.size_class.index)
    core.check()


def test_a_message_names_no_more_blocks_than_the_limits_allow() -> None:
    core = make_core(blocks_of_message=10, chains_of_message=3)
    connection = connect(core)
    matched(core, connection, 10)
    with pytest.raises(ProtocolError, match="a prompt of 11 blocks, 10 at most"):
        matched(core, connection, 11)
    with pytest.raises(ProtocolError, match="a prompt of 11 blocks"):
        core.pin(connection, Pin(hashes=bytes(16 * 11), tokens=bytes(8 * 11), pinned=True))
    chain = Chain(os.urandom(64), os.urandom(32), b"")
    core.reservations.reserve(connection, Reserve(chains=[chain, chain]))
    with pytest.raises(ProtocolError, match="chains of 12 blocks, 10 at most"):
        core.reservations.reserve(connection, Reserve(chains=[chain] * 3))
    with pytest.raises(ProtocolError, match="4 chains, 3 at most"):
        core.reservations.reserve(connection, Reserve(chains=[chain] * 4))


@pytest.mark.parametrize(
    "ask",
    [
        lambda core, it: matched(core, it, 2, min_partial_tokens=0),
        lambda core, it: matched(core, it, 2, min_partial_tokens=-(1 << 63)),
        lambda core, it: matched(core, it, 2, start=3),
        lambda core, it: core.evict(it, -2),
        lambda core, it: core.loads.begin_fetch(it, Fetch(cursor=0, first=0, count=1)),
        lambda core, it: core.reservations.abandon(it, [0]),
        lambda core, it: core.publish(it, array("I", [0, 0]).tobytes()),
        lambda core, it: core.release(it, Release(slots=array("I", [0, 0]).tobytes())),
        lambda core, it: core.release(it, Release(cursors=b"123")),
        lambda core, it: core.reservations.reserve(
            it, Reserve(chains=[Chain(bytes(32), bytes(16), array("I", [1, 1]).tobytes())])
        ),
    ],
)
def test_a_number_that_fits_nothing_is_refused_and_changes_nothing(ask: Any) -> None:
    core = make_core()
    connection = connect(core)
    with pytest.raises(ProtocolError):
        ask(core, connection)
    core.check()
    assert core.leases.count == len(core.reservations) == core.claims.num_blocks == 0


def test_releasing_a_slot_twice_in_one_message_ends_nothing() -> None:
    core = make_core()
    client = Client(core, {}, NAMESPACE, hash_block)
    client.reserve(as_bytes([1, 2]), [0])
    client.publish(1)
    (slot,) = split_numbers(client.match(as_bytes([1, 2])).slots)
    with pytest.raises(ProtocolError, match="not leased"):
        core.release(client.connection, Release(slots=array("I", [slot, slot]).tobytes()))
    assert client.connection.num_leases == 1
    core.check()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "many"])
def test_a_limit_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="requests_of_client must be a positive number"):
        Limits(requests_of_client=value)


def test_a_size_of_blocks_stays_as_long_as_an_evicted_block_of_it_is_in_use() -> None:
    core = make_core()
    client, prompt = Client(core, {}, NAMESPACE, hash_block), list(range(8))
    client.reserve(as_bytes(prompt), [0, 1, 2, 3])
    client.publish(4)
    (size_class,) = core.slab.classes.values()
    client.match(as_bytes(prompt))
    core.evict_chosen(b"", Choice())
    marked = len(size_class.chosen.marked)
    assert marked
    core.tenants.by_digest.clear()  # as if no client had it any more
    core.trim()
    assert list(core.slab.classes.values()) == [size_class] and len(size_class.chosen.marked) == marked


def test_what_was_evicted_while_leased_goes_with_the_client_and_its_size_of_blocks_too() -> None:
    core = make_core()
    client, prompt = Client(core, {}, NAMESPACE, hash_block), list(range(8))
    client.reserve(as_bytes(prompt), [0, 1, 2, 3])
    client.publish(4)
    client.match(as_bytes(prompt))
    core.evict_chosen(b"", Choice())
    core.trim()
    core.check()
    assert core.tenants.by_digest and core.count_marked() == {"warm, leased to clients": 4}
    core.disconnect(client.connection)
    core.trim()
    core.check()
    assert not core.tenants.by_digest and not core.slab.classes and not core.count_marked()
