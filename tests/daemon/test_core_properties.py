"""Random clients of the daemon's core, with hashes of four bits: no slot ever holds another block than it should."""

from __future__ import annotations

import pytest
from core_model import SLOT_BYTES, STEP, Client, DictStore, as_bytes, finish_load, finish_write, weak_hash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tierkv.daemon.core import Core
from tierkv.daemon.messages import Fetch, Pin
from tierkv.daemon.values import Write
from tierkv.errors import CapacityError, DaemonError
from tierkv.index.chosen_eviction import Choice
from tierkv.values.block import Tier, hash_block

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(as_bytes)
which = st.integers(0, 9)


class CoreMachine(RuleBasedStateMachine):
    """Clients come, borrow, write, die; loads and writes end late; the store loses blocks; the slab is too small."""

    @initialize(num_slots=st.integers(6, 20), has_store=st.booleans(), is_weak=st.booleans(), has_rows=st.booleans())
    def start(self, num_slots: int, has_store: bool, is_weak: bool, has_rows: bool) -> None:
        self.has_rows = has_rows
        self.store = DictStore() if has_store else None
        self.now = 0.0
        self.core = Core(
            num_slots * SLOT_BYTES, clock=lambda: self.now, store=self.store, extent_bytes=SLOT_BYTES, pin_share=0.5
        )
        self.slab: dict[int, tuple[bytes, bytes]] = {}
        self.hash_function = weak_hash if is_weak else hash_block
        self.clients: list[Client] = []
        self.writes: list[Write] = []
        self.firsts: dict[int, int] = {}

    def client(self, number: int) -> Client:
        if not self.clients or (number == 9 and len(self.clients) < 4):
            namespace = bytes([200 + len(self.clients) % 2]) * 16
            self.clients.append(Client(self.core, self.slab, namespace, self.hash_function, self.has_rows))
        return self.clients[number % len(self.clients)]

    @rule(number=which, tokens=prompts, start=st.integers(0, 2))
    def match(self, number: int, tokens: bytes, start: int) -> None:
        self.client(number).match(tokens, start)

    @rule(number=which, tokens=prompts, is_stored=st.booleans())
    def compute(self, number: int, tokens: bytes, is_stored: bool) -> None:
        """Do what a client does with a prompt that it has computed."""
        client = self.client(number)
        client.reserve(tokens, list(range(9)))
        self.writes += client.publish(len(client.reserved))
        while is_stored and self.writes:
            self.finish_write(0)

    @precondition(lambda self: self.store is not None)
    @rule(number=which, others=st.lists(prompts, min_size=1, max_size=4), read=which)
    def read_what_only_the_store_has(self, number: int, others: list[bytes], read: int) -> None:
        """Several prompts are computed, stored and evicted; then one of them comes in."""
        for tokens in others:
            self.compute(number, tokens, is_stored=True)
        self.core.evict(self.client(number).connection, -1)
        self.read(number, others[read % len(others)])

    @rule(number=which, tokens=prompts)
    def read(self, number: int, tokens: bytes) -> None:
        """Do what a client does with a prompt that comes in: all that is there is borrowed, then given back."""
        client = self.client(number)
        found = client.match(tokens)
        for first in range(len(found.slots) // 4 + (found.partial_block is not None)) if found.cursor else ():
            self.begin_fetch(number, first, 1)
        while client.tasks and all(load in client.tasks[-1][0].fresh for load in client.tasks[-1][0].loads.values()):
            finish_load(self.core, self.slab, client.tasks[-1][0])
            client.end_fetch(len(client.tasks) - 1, self.firsts)
        client.check()
        client.release(len(client.borrowed))

    @rule(number=which, first=st.integers(0, 4), count=st.integers(1, 5))
    def begin_fetch(self, number: int, first: int, count: int) -> None:
        client = self.client(number)
        if not client.cursors or client.cursors[-1][0] not in client.connection.cursors:
            return
        number_of_cursor, found, tokens = client.cursors[-1]
        cursor = client.connection.cursors[number_of_cursor]
        total = cursor.total + (found.partial_block is not None)
        first = min(first, total - 1)
        task = self.core.loads.begin_fetch(
            client.connection, Fetch(cursor=number_of_cursor, first=first, count=min(count, total - first))
        )
        whole = tokens[: cursor.total * 8] + (found.partial_block.tokens if found.partial_block else b"")
        client.tasks.append((task, whole))
        self.firsts[id(task)] = first

    @rule(number=which)
    def end_fetch(self, number: int) -> None:
        client = self.client(number)
        for position, (task, _) in enumerate(client.tasks):
            finish_load(self.core, self.slab, task)
            task.fresh = []
            if all(load.is_done for load in task.loads.values()):
                client.end_fetch(position, self.firsts)
                return

    @rule(number=which)
    def end_fetch_without_its_loads(self, number: int) -> None:
        """The client gets what has come by now; the loads go on, and end later."""
        client = self.client(number)
        if client.tasks:
            task = client.tasks[0][0]
            self.late = [*getattr(self, "late", []), task]
            client.end_fetch(0, self.firsts)

    @rule(number=which)
    def finish_late_loads(self, number: int) -> None:
        late = getattr(self, "late", [])
        if late:
            finish_load(self.core, self.slab, late.pop(number % len(late)))

    @rule(number=which, count=st.integers(1, 6))
    def release(self, number: int, count: int) -> None:
        self.client(number).release(count)

    @rule(number=which, tokens=prompts, offers=st.lists(st.integers(0, 9), min_size=1, max_size=6))
    def reserve(self, number: int, tokens: bytes, offers: list[int]) -> None:
        self.client(number).reserve(tokens, offers)

    @rule(number=which, count=st.integers(1, 6))
    def publish(self, number: int, count: int) -> None:
        self.writes += self.client(number).publish(count)

    @rule(number=which)
    def abandon(self, number: int) -> None:
        client = self.client(number)
        self.core.reservations.abandon(client.connection, [slot for slot, _ in client.reserved])
        client.reserved.clear()

    @precondition(lambda self: self.writes)
    @rule(number=which)
    def finish_write(self, number: int) -> None:
        assert self.store is not None
        finish_write(self.core, self.store, self.slab, self.writes.pop(number % len(self.writes)))

    @precondition(lambda self: self.store and self.store.blocks)
    @rule(number=which)
    def lose_from_the_store(self, number: int) -> None:
        assert self.store is not None
        self.store.remove(sorted(self.store.blocks)[number % len(self.store.blocks)])

    @rule(number=which, tokens=prompts, pinned=st.booleans())
    def pin(self, number: int, tokens: bytes, pinned: bool) -> None:
        client = self.client(number)
        tokens = client.prompt(tokens)
        message = Pin(hashes=b"".join(client.chain(tokens)), tokens=tokens, pinned=pinned)
        try:
            self.core.pin(client.connection, message)
        except DaemonError:
            assert pinned, "to unpin is never refused"

    @rule(number=which, count=st.integers(-1, 4))
    def evict(self, number: int, count: int) -> None:
        self.core.evict(self.client(number).connection, count)

    @rule(number=which, tokens=st.one_of(st.just(b""), prompts), is_everybodys=st.booleans())
    def evict_chosen(self, number: int, tokens: bytes, is_everybodys: bool) -> None:
        """No client finds blocks behind the prompt from then on, but blocks in use stay as they were. What is pinned
        stays, with what is before it.
        """
        client = self.client(number)
        namespace = b"" if is_everybodys else client.namespace
        self.core.evict_chosen(namespace, Choice(tokens=tokens))
        if self.store is None and tokens and not self.has_rows and not client.connection.require_tenant().pinned_bytes:
            found = client.match(tokens)
            whole = len(tokens) // STEP
            assert len(found.slots) < 4 * whole or len(tokens) % STEP, "the prompt's last block is gone"

    @rule()
    def trim(self) -> None:
        self.core.trim()

    @precondition(lambda self: self.clients)
    @rule(number=which)
    def die(self, number: int) -> None:
        """The client's fetches go on without it, as they do in the server."""
        client = self.clients.pop(number % len(self.clients))
        self.core.disconnect(client.connection)
        for position in range(len(client.tasks) - 1, -1, -1):
            task = client.tasks[position][0]
            finish_load(self.core, self.slab, task)
            task.fresh = []
        self.orphans = [*getattr(self, "orphans", []), client]

    @rule(seconds=st.floats(0, 100))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "core"):
            return
        for client in getattr(self, "orphans", []):
            for position in range(len(client.tasks) - 1, -1, -1):
                if all(load.is_done for load in client.tasks[position][0].loads.values()):
                    client.end_fetch(position, self.firsts)
        self.core.check()
        for client in self.clients:
            client.check()


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_classes_of_slots_of_different_sizes_share_the_slab() -> None:
    core = Core(64 * SLOT_BYTES, clock=lambda: 0.0, extent_bytes=4 * SLOT_BYTES)
    small, large = core.slab.class_of(SLOT_BYTES), core.slab.class_of(6 * SLOT_BYTES)
    taken = small.take(64)
    assert len(taken) == 64 and not core.slab.has_unassigned
    assert large.take(1) == [], "what is in use is not taken away"
    small.index.unpin_all(Tier.WARM, taken)
    got = large.take(64)
    assert 4 <= len(got) <= 5, "half of the extents are 32 small slots, or 5 large ones"
    used = {number for slot in got for number in range(slot * 6, slot * 6 + 6)}
    left = {slot for slot in range(64) if small.is_usable(slot)}
    assert used.isdisjoint(left) and len(left) == 32
    with pytest.raises(CapacityError, match="does not fit"):
        core.slab.class_of(65 * SLOT_BYTES)


def first_token_alone(parent: bytes, tokens: bytes) -> bytes:
    return hash_block(parent, tokens[:4])


def test_a_stored_block_behind_another_one_of_the_same_hash_is_a_collision() -> None:
    """All that the core compares is the same: hash, parent's hash, length. The source that reads it knows better."""
    store = DictStore()
    core = Core(16 * SLOT_BYTES, clock=lambda: 0.0, store=store, extent_bytes=SLOT_BYTES)
    slab: dict[int, tuple[bytes, bytes]] = {}
    client = Client(core, slab, b"n" * 16, first_token_alone)
    client.reserve(as_bytes([1, 6, 9, 9]), [0, 1])
    for write in client.publish(2):
        finish_write(core, store, slab, write)
    assert core.evict(client.connection, -1) == 2
    found = client.match(as_bytes([1, 2, 9, 9]))
    assert len(found.slots) == 8
    for first in (0, 1):
        task = core.loads.begin_fetch(client.connection, Fetch(cursor=found.cursor, first=first, count=1))
        finish_load(core, slab, task)
        fetched = core.loads.end_fetch(client.connection, task)
        assert (fetched.slots, fetched.miss) == (b"", "collision")
    core.check()
