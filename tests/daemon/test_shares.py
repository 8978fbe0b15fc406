"""Shares and limits of tenants in the warm tier of a daemon."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from core_model import SLOT_BYTES, Client, DictStore, Stored, as_bytes, finish_load, layout
from daemon_process import Start
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.core import Core
from tierkv.daemon.messages import Fetch, Status, StatusReport
from tierkv.daemon.status import share_statuses
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_tenants import TenantSettings
from tierkv.values.block import hash_block

SLOTS = 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Room:
    """A core with clients of several tenants."""

    def __init__(self, store: DictStore | None = None, slots: int = SLOTS, **shares: tuple[int, int | None]) -> None:
        self.core = Core(slots * SLOT_BYTES, clock=Clock(), store=store, extent_bytes=SLOT_BYTES)
        self.core.tenants.shares.settings = {
            owner: TenantSettings(
                name=owner,
                warm_share=share * SLOT_BYTES,
                warm_limit=None if limit is None else limit * SLOT_BYTES,
            )
            for owner, (share, limit) in shares.items()
        }
        self.slab: dict[int, tuple[bytes, bytes]] = {}
        self.clients: dict[str, Client] = {}

    def client(self, owner: str, digest: bytes | None = None) -> Client:
        digest = digest or owner.encode().ljust(16, b".")
        client = Client(self.core, self.slab, digest, hash_block)
        assert client.connection.tenant
        client.connection.tenant.owner = owner
        return client

    def put(self, client: Client, count: int, first: int = 0) -> int:
        """Publish blocks that follow no other; return how many got a slot."""
        done = 0
        for number in range(first, first + count):
            client.reserve(as_bytes([number, number]), [0])
            done += len(client.reserved)
            for write in client.publish(len(client.reserved)):
                self.core.finish_write(write, is_stored=False)
            self.core.check()
        return done

    def blocks(self, owner: str) -> int:
        return self.core.tenants.shares.used_bytes(owner) // SLOT_BYTES


def test_a_tenant_at_its_limit_replaces_its_own_blocks_only() -> None:
    room = Room(a=(0, 4))
    a, other_model, b = room.client("a"), room.client("a", b"2" * 16), room.client("b")
    assert room.put(b, 8) == 8 and room.put(a, 6) == 6
    assert (room.blocks("a"), room.blocks("b")) == (4, 8)
    assert room.put(other_model, 3, first=100) == 3  # another model of the same tenant
    assert (room.blocks("a"), room.blocks("b")) == (4, 8)


def test_a_limit_of_zero_refuses_every_slot() -> None:
    room = Room(a=(0, 0))
    assert room.put(room.client("a"), 3) == 0
    assert room.put(room.client("b"), 3) == 3


def test_a_chain_longer_than_the_limit_gets_as_many_slots_as_that() -> None:
    room = Room(a=(0, 3))
    client = room.client("a")
    client.reserve(as_bytes(list(range(12))), list(range(6)))
    assert len(client.reserved) == 3 and room.blocks("a") == 3
    room.core.check()


def test_a_loaded_block_counts_to_the_limit() -> None:
    store = DictStore()
    room = Room(store, a=(0, 3))
    client = room.client("a")
    tokens = as_bytes(list(range(12)))
    client.reserve(tokens, list(range(6)))
    for write in client.publish(3):
        finish = write.entry
        room.core.finish_write(write, is_stored=False)
        assert finish.warm_slot is not None
    room.core.evict(client.connection, -1)
    for number, block_hash in enumerate(client.chain(tokens)):  # all six lie in the store
        parent = client.chain(tokens)[number - 1] if number else client.namespace
        store.blocks[block_hash] = Stored(parent, tokens[number * 8 :][:8], b"", (b"", b""))
    found = client.match(tokens)
    task = room.core.loads.begin_fetch(client.connection, Fetch(cursor=found.cursor, first=0, count=6))
    assert len(task.fresh) == 3 and room.blocks("a") == 3
    finish_load(room.core, room.slab, task)
    room.core.loads.end_fetch(client.connection, task)
    room.core.check()


def test_eviction_takes_from_tenants_above_their_share_first() -> None:
    room = Room(a=(5, None))
    a, b = room.client("a"), room.client("b")
    room.put(a, 5)  # the oldest
    room.put(b, 30)
    assert (room.blocks("a"), room.blocks("b")) == (5, 11)
    room.put(a, 1, first=100)  # beyond its share: its own oldest goes, for it is the oldest of all that may
    assert (room.blocks("a"), room.blocks("b")) == (5, 11)


def test_a_tenant_without_a_share_takes_nothing_from_the_shares_of_others() -> None:
    room = Room(a=(8, None), b=(8, None))
    a, b, c = room.client("a"), room.client("b"), room.client("c")
    assert room.put(a, 8) == room.put(b, 8) == 8
    assert room.put(c, 2) == 0
    assert room.put(a, 3, first=100) == 3, "a tenant at its share replaces its own"
    assert (room.blocks("a"), room.blocks("b"), room.blocks("c")) == (8, 8, 0)


def test_nothing_within_a_share_is_evicted_ahead_of_need() -> None:
    room = Room(slots=60, a=(30, None))
    a, b = room.client("a"), room.client("b")
    room.put(a, 30)
    room.put(b, 30)
    assert room.core.trim() == 3, "a twentieth"
    assert (room.blocks("a"), room.blocks("b")) == (30, 27)


def test_a_tenant_within_its_share_gets_room_at_the_cost_of_others() -> None:
    room = Room(a=(12, None), b=(12, None))  # more than there is
    a, b = room.client("a"), room.client("b")
    room.put(a, 12)
    assert room.put(b, 8) == 8
    assert room.blocks("a") + room.blocks("b") == SLOTS


def test_a_limit_that_is_lowered_takes_effect_at_the_next_tick() -> None:
    room = Room(a=(0, None))
    room.put(room.client("a"), 10)
    room.core.tenants.shares.settings = {"a": TenantSettings(name="a", warm_limit=3 * SLOT_BYTES)}
    room.core.trim()
    assert room.blocks("a") == 3
    room.core.check()


def test_another_size_of_blocks_takes_no_memory_within_a_share() -> None:
    room = Room(a=(SLOTS, None))
    room.put(room.client("a"), SLOTS)
    connection = room.core.connect()
    room.core.open_tenant(
        connection, b"l" * 16, b"", layout=layout(3 * SLOT_BYTES // layout().block_bytes), owner="large"
    )
    assert connection.tenant
    assert room.core.tenants.shares.take(connection.tenant, 1) == []
    assert room.blocks("a") == SLOTS
    room.core.tenants.shares.settings = {}
    slots = room.core.tenants.shares.take(connection.tenant, 1)
    assert len(slots) == 1 and room.blocks("a") < SLOTS


@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12), st.integers(1, 3)), max_size=60),
    shares=st.tuples(*[st.integers(0, 5)] * 3),
    limits=st.tuples(*[st.one_of(st.none(), st.integers(0, 9))] * 3),
)
@settings(max_examples=60, deadline=None)
def test_whatever_tenants_do_limits_and_shares_hold(
    steps: list[tuple[str, int, int]], shares: tuple[int, ...], limits: tuple[int | None, ...]
) -> None:
    bounds = {
        owner: (share if limit is None else min(share, limit), limit)
        for owner, share, limit in zip("abc", shares, limits, strict=True)
    }
    room = Room(**bounds)
    clients = {owner: room.client(owner) for owner in "abc"}
    for owner, first, count in steps:
        before = {each: room.blocks(each) for each in "abc"}
        room.put(clients[owner], count, first)
        room.core.trim()
        for each, (share, limit) in bounds.items():
            assert limit is None or room.blocks(each) <= limit
            if each != owner:
                assert room.blocks(each) >= min(share, before[each])


def test_a_tenant_is_reported_while_it_has_settings_clients_or_blocks() -> None:
    room = Room(a=(0, 4))
    b, c = room.client("b"), room.client("c")
    room.put(c, 1)
    for each in (b, c):
        room.core.disconnect(each.connection)

    def reported() -> set[str]:
        return {each.owner for each in share_statuses(room.core, {"d": 4096, "e": 0, None: 4096})}

    assert reported() == {"a", "c", "d"}, "of b a namespace is remembered, and of e one in the store"
    room.core.tenants.shares.settings = {}
    assert reported() == {"c", "d"}


def test_a_daemon_reads_the_settings_of_its_store(start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon()
    salt = hashlib.sha256(b"team").hexdigest()
    with ColdStore(short_path / "store", min_free_bytes=0) as store:
        store.set_tenants({salt: TenantSettings(name="team", warm_share=4096, warm_limit=1 << 20, cold_limit=1 << 30)})
    deadline = time.monotonic() + 20
    with DaemonClient(daemon.socket) as client:
        while True:
            (share,) = client.call(Status(), StatusReport).shares or [None]
            if share is not None or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    assert share is not None and (share.name, share.warm_limit, share.cold_limit) == ("team", 1 << 20, 1 << 30)
