"""Leases without a question: what a client knows it leases by itself, and no byte changes while it does."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from core_model import BLOCK_SIZE, SLOT_BYTES, STEP, as_bytes, layout
from daemon_process import Start
from raw_client import LAYOUT, chain_of, connect, tokens_of, write_prompt

from tierkv.daemon import lease_flags
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.core import Core
from tierkv.daemon.lease_flags import LeaseFlags, map_flags, map_generations
from tierkv.daemon.limits import Limits
from tierkv.daemon.local_leases import LocalLeases
from tierkv.daemon.membarrier import order_all
from tierkv.daemon.messages import Chain, Found, Match, Release, Reserve, Status, StatusReport, Used
from tierkv.daemon.protocol import ProtocolError, frame, split_numbers
from tierkv.daemon.values import Connection
from tierkv.errors import StoreError
from tierkv.index.chosen_eviction import Choice
from tierkv.transfer.daemon_connection import DaemonConnection
from tierkv.values.block import iter_chain

ROOT = b"n" * 16
SLOTS = 16

pytestmark = pytest.mark.skipif(LeaseFlags.open(1) is None, reason="no barrier between processes here")


@dataclass
class Client:
    """A connection to a core in this process, with flags. `known`: what it leases without the core."""

    core: Core
    connection: Connection
    known: LocalLeases

    def question(self, tokens: bytes, *, start: int = 0) -> Match:
        hashes = b"".join(h for h, _ in iter_chain(ROOT, tokens, BLOCK_SIZE))
        return Match(hashes=hashes, tokens=tokens, start=start, lease=True)

    def ask(self, tokens: bytes) -> Found:
        """Ask the core, remember the answer, and end the lease that it gave."""
        asked = self.question(tokens)
        found = self.core.match(self.connection, asked)
        self.known.learn(asked, found)
        self.core.release(self.connection, Release(slots=found.slots))
        return found

    def lease(self, tokens: bytes, *, start: int = 0) -> list[int] | None:
        """Lease by flags alone."""
        found = self.known.match(self.question(tokens, start=start))
        return None if found is None else split_numbers(found.slots).tolist()

    def write(self, tokens: bytes) -> list[int]:
        count = len(tokens) // STEP
        hashes = self.question(tokens).hashes
        chain = Chain(hashes, tokens[: count * STEP], array("I", range(count)).tobytes())
        given = self.core.reservations.reserve(self.connection, Reserve(chains=[chain])).chains[0]
        self.core.publish(self.connection, given.slots)
        return split_numbers(given.slots).tolist()


@pytest.fixture
def core() -> Iterator[Core]:
    made = make_core()
    yield made
    made.check()


def make_core(**limits: float) -> Core:
    clock = itertools.count(1.0).__next__
    return Core(SLOTS * SLOT_BYTES, clock=clock, extent_bytes=SLOT_BYTES, limits=Limits(**limits))  # type: ignore[arg-type]


def client_of(core: Core) -> Client:
    connection = core.connect()
    core.open_tenant(connection, ROOT, b"", layout=layout())
    descriptors, num_slots, most = core.flag_leases.connect(connection)
    known = LocalLeases.open(descriptors, num_slots=num_slots, root=ROOT, block_size=BLOCK_SIZE, most=most)
    os.close(descriptors[1])
    assert known
    return Client(core, connection, known)


def prompt(start: int, blocks: int) -> bytes:
    return as_bytes(list(range(start, start + blocks * BLOCK_SIZE)))


def evict_all(core: Core) -> int:
    return sum(size_class.evict(SLOTS) for size_class in core.slab.classes.values())


def test_a_known_prompt_is_leased_by_flags_and_an_unknown_one_is_not(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    assert client.lease(tokens) is None
    client.ask(tokens)
    assert client.lease(tokens) == slots
    assert client.lease(tokens, start=2) == slots[2:]
    assert client.lease(tokens[:STEP]) == slots[:1]
    assert client.lease(prompt(50, 3)) is None
    assert client.lease(tokens + as_bytes([1])) is None, "only the daemon knows the partial blocks"
    assert client.lease(tokens + prompt(9, 1)) is None, "only the daemon knows who computes the rest"


def test_a_block_that_a_flag_leases_is_not_evicted_until_the_flag_is_cleared(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens) == slots
    assert evict_all(core) == 0
    assert core.flag_leases.count(client.connection) == 3
    core.check()
    assert not client.known.end(slots), "none of them was leased by a message"
    assert evict_all(core) == 3


def test_nothing_is_evicted_if_the_clients_cannot_be_ordered(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(core)
    client.write(prompt(0, 3))
    monkeypatch.setattr(lease_flags, "order_all", lambda: False)
    assert evict_all(core) == 0
    monkeypatch.undo()
    assert evict_all(core) == 3


def test_a_block_leased_twice_stays_until_both_leases_have_ended(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 1)
    client.write(tokens)
    client.ask(tokens)
    (slot,) = client.lease(tokens) or []
    assert client.lease(tokens) == [slot]
    client.known.end([slot])
    assert evict_all(core) == 0
    assert not client.known.end([slot])
    assert list(client.known.end([slot])) == [slot], "that one is the daemon's"
    assert evict_all(core) == 1


def test_what_was_evicted_is_asked_for_again(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    client.write(tokens)
    client.ask(tokens)
    assert evict_all(core) == 3
    assert client.lease(tokens) is None
    assert core.flag_leases.count(client.connection) == 0, "flags were left set"
    other = client.write(prompt(100, 3))
    assert client.lease(tokens) is None
    client.ask(prompt(100, 3))
    assert client.lease(prompt(100, 3)) == other


def test_other_blocks_go_in_place_of_those_that_flags_lease(core: Core) -> None:
    client = client_of(core)
    first, second = prompt(0, 4), prompt(100, 4)
    slots = client.write(first)
    client.ask(first)
    client.write(second)
    assert client.lease(first) == slots  # the older ones, which would go first
    (size_class,) = core.slab.classes.values()
    assert size_class.evict(2) == 2
    assert size_class.evict_some(2, lambda: lambda slot: True) == 2
    client.known.end(slots)


def test_blocks_whose_flags_are_cleared_go_at_once_where_tenants_have_shares(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 4)
    slots = client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens) == slots
    (size_class,) = core.slab.classes.values()
    assert size_class.evict_some(2, lambda: lambda slot: True) == 0
    client.known.end(slots)
    assert size_class.evict_some(2, lambda: lambda slot: True) == 2


def test_other_blocks_go_in_place_of_those_that_flags_lease_where_tenants_have_shares(core: Core) -> None:
    client = client_of(core)
    first, second = prompt(0, 4), prompt(100, 4)
    slots = client.write(first)
    client.ask(first)
    client.write(second)
    assert client.lease(first) == slots
    (size_class,) = core.slab.classes.values()
    assert size_class.evict_some(2, lambda: lambda slot: True) == 2
    client.known.end(slots)


class EvictsAfterTheRead:
    """Generations whose reader is stopped right after it has read one, while the daemon evicts."""

    def __init__(self, generations: memoryview, core: Core) -> None:
        self.generations, self.core, self.evicted = generations, core, 0

    def __getitem__(self, slot: int) -> int:
        generation = self.generations[slot]
        self.evicted += evict_all(self.core)
        return generation


def test_the_flag_is_set_before_the_generation_is_read(core: Core) -> None:
    """Else a daemon that evicts in between sees no flag, and the client uses a slot that holds another block."""
    client, tokens = client_of(core), prompt(0, 1)
    client.write(tokens)
    client.ask(tokens)
    stopped = EvictsAfterTheRead(client.known._generations, core)
    client.known._generations = stopped  # type: ignore[assignment]
    slots = client.lease(tokens)
    assert slots is not None and stopped.evicted == 0, "a block went after its reader had checked it"
    client.known.end(slots)


def test_a_block_evicted_on_demand_serves_no_new_lease_and_goes_after_the_last(core: Core) -> None:
    client, other, tokens = client_of(core), client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    client.ask(tokens)
    other.ask(tokens)
    assert client.lease(tokens) == slots
    assert not core.evict_chosen(ROOT, Choice()).blocks
    assert core.count_marked() == {"warm, leased to clients": 3}
    assert other.lease(tokens) is None
    assert not other.ask(tokens).slots
    core.trim()
    (size_class,) = core.slab.classes.values()
    assert all(size_class.index.warm.owners[slot] for slot in slots), "it went while it was leased"
    client.known.end(slots)
    core.trim()
    assert not size_class.chosen.marked
    assert not any(size_class.index.warm.owners[slot] for slot in slots)


def test_an_eviction_on_demand_orders_all_clients_once_and_not_for_each_block(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a barrier for each of a million blocks no client would get an answer for a minute."""
    client, calls = client_of(core), []
    for number in range(3):
        client.write(prompt(100 * number, 4))
    held = core.match(client.connection, client.question(prompt(0, 4)))

    def order() -> bool:
        calls.append(1)
        return order_all()

    monkeypatch.setattr(lease_flags, "order_all", order)
    assert core.evict_chosen(ROOT, Choice()).blocks.total() == 8
    assert len(calls) <= 2
    calls.clear()
    core.release(client.connection, Release(slots=held.slots))
    (size_class,) = core.slab.classes.values()
    assert not any(size_class.index.warm.owners) and len(calls) <= 2


def test_a_block_leased_by_a_message_and_evicted_on_demand_is_not_leased_by_a_flag(core: Core) -> None:
    client, other, tokens = client_of(core), client_of(core), prompt(0, 2)
    client.write(tokens)
    other.ask(tokens)
    held = core.match(client.connection, client.question(tokens))
    core.evict_chosen(ROOT, Choice(tokens=tokens[:STEP]))
    assert other.lease(tokens) is None and other.lease(tokens[:STEP]) is None
    core.release(client.connection, Release(slots=held.slots))


def test_flags_end_with_their_connection(core: Core) -> None:
    client, other, tokens = client_of(core), client_of(core), prompt(0, 3)
    client.write(tokens)
    other.ask(tokens)
    assert other.lease(tokens)
    assert evict_all(core) == 0
    core.disconnect(other.connection)
    assert evict_all(core) == 3


def test_a_client_leases_no_more_by_flags_than_its_share(core: Core) -> None:
    client = client_of(core)
    assert core.limits.flag_share_of_client * SLOTS == 4
    tokens = prompt(0, 5)
    client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens) is None
    assert client.lease(tokens[: 4 * STEP])
    assert not core.flag_leases.is_exceeded(client.connection)
    client.known._flags[:5] = b"\1" * 5
    assert core.flag_leases.is_exceeded(client.connection)
    core.disconnect(client.connection)


def test_the_slots_of_large_blocks_are_not_given_away_while_a_flag_leases_them(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens) == slots
    (size_class,) = core.slab.classes.values()
    assert not size_class.clear(slots)
    client.known.end(slots)
    assert size_class.clear(slots)
    size_class.add(slots)


def test_a_block_whose_child_a_flag_leases_is_not_given_away(core: Core) -> None:
    """A client with the first blocks in its own memory leases only those that follow."""
    client, tokens = client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens, start=2) == slots[2:]
    (size_class,) = core.slab.classes.values()
    assert not size_class.clear(slots[:1])
    core.check()
    client.known.end(slots[2:])
    assert size_class.clear(slots[:1])
    size_class.add(slots[:1])


def test_the_daemon_ends_no_connection_that_leases_by_a_flag(core: Core) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    slots = client.write(tokens)
    client.ask(tokens)
    assert client.lease(tokens) == slots
    assert not core.flag_leases.try_end(client.connection)
    assert evict_all(core) == 0
    client.known.end(slots)
    assert core.flag_leases.try_end(client.connection)
    assert client.lease(tokens) is None, "the client does not know yet that its flags are read no more"


def test_a_flag_that_is_set_while_the_daemon_ends_the_connection_keeps_it(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, tokens = client_of(core), prompt(0, 3)
    client.write(tokens)
    client.ask(tokens)

    def set_meanwhile() -> bool:
        client.known._flags[0] = 1
        return True

    monkeypatch.setattr(lease_flags, "order_all", set_meanwhile)
    assert not core.flag_leases.try_end(client.connection)
    assert core.flag_leases.count(client.connection) == 1


def test_uses_by_flags_are_reported_and_count(core: Core) -> None:
    client = client_of(core)
    old, new = prompt(0, 1), prompt(100, 1)
    client.write(old)
    (newer,) = client.write(new)
    client.ask(old)
    client.ask(new)
    slots = client.lease(old)
    client.known._reported_at -= 1.0
    assert slots and list(client.known.take_used()) == slots
    assert not client.known.take_used(), "reported once"
    hashes = [[block_hash for block_hash, _ in iter_chain(ROOT, old, BLOCK_SIZE)]]
    assert core.flag_leases.note_used(client.connection, Used(slots=array("I", slots).tobytes())) == hashes
    client.known.end(slots)
    (size_class,) = core.slab.classes.values()
    assert size_class.evict(1) == 1
    assert size_class.index.warm.owners[newer] is None, "the block that was used went first"
    with pytest.raises(ProtocolError, match="slots were used"):
        core.flag_leases.note_used(client.connection, Used(slots=array("I", [SLOTS]).tobytes()))


def test_a_use_by_a_flag_is_a_use_of_the_whole_chain_in_the_store_and_in_remote_tiers(core: Core) -> None:
    """The client has the first blocks in its own memory, and leases only those that follow."""
    client, first = client_of(core), prompt(0, 3)
    second = first[:STEP] + prompt(50, 1)
    slots = client.write(first)[1:] + client.write(second)
    chains = core.flag_leases.note_used(client.connection, Used(slots=array("I", slots).tobytes()))
    whole, other = ([block_hash for block_hash, _ in iter_chain(ROOT, each, BLOCK_SIZE)] for each in (first, second))
    assert chains == [whole, other[1:]], "each block once, whatever shares it"


def test_a_forked_process_ends_no_lease_of_its_parent(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    client, tokens = client_of(core), prompt(0, 1)
    client.write(tokens)
    client.ask(tokens)
    slots = client.lease(tokens)
    assert slots
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not client.known.end(slots)
    assert client.lease(tokens) is None
    monkeypatch.undo()
    assert evict_all(core) == 0
    client.known.end(slots)


def test_no_client_can_write_generations(core: Core) -> None:
    connection = core.connect()
    core.open_tenant(connection, ROOT, b"", layout=layout())
    (generations, own), num_slots, _ = core.flag_leases.connect(connection)
    os.close(own)
    with pytest.raises(PermissionError):
        mmap.mmap(generations, num_slots * 8)
    with pytest.raises(TypeError):
        map_generations(generations, num_slots)[0] = 1


def test_memory_of_another_size_or_without_a_seal_is_refused(core: Core) -> None:
    client = client_of(core)
    (size_class,) = core.slab.classes.values()
    assert size_class.flags
    with pytest.raises(StoreError, match="it has 128 bytes"):
        map_generations(size_class.flags.descriptor, SLOTS + 1)
    loose = os.memfd_create("loose")
    os.ftruncate(loose, SLOTS)
    try:
        with pytest.raises(StoreError, match="not sealed"):
            map_flags(loose, SLOTS)
    finally:
        os.close(loose)
    core.disconnect(client.connection)


@pytest.mark.parametrize("seed", range(8))
def test_no_slot_changes_while_anything_leases_it(seed: int) -> None:
    """Random writes, lookups, leases, evictions and ends of clients against what each leased slot must hold."""
    core = make_core(flag_share_of_client=0.75)
    chance = random.Random(seed)
    content: dict[int, bytes] = {}
    clients = [client_of(core) for _ in range(3)]
    held: list[tuple[Client, list[int], list[bytes]]] = []
    prompts = [prompt(100 * (number % 5), 1 + number % 4) for number in range(12)]
    num_leased = 0
    for _ in range(1500):
        client, tokens = chance.choice(clients), chance.choice(prompts)
        blocks = [tokens[: (at + 1) * STEP] for at in range(len(tokens) // STEP)]
        action = chance.random()
        if action < 0.2:
            chain = Chain(client.question(tokens).hashes, tokens, array("I", range(len(blocks))).tobytes())
            given = core.reservations.reserve(client.connection, Reserve(chains=[chain])).chains[0]
            for number, slot in zip(split_numbers(given.numbers), split_numbers(given.slots), strict=True):
                content[slot] = blocks[number]
            core.publish(client.connection, given.slots)
        elif action < 0.5:
            client.ask(tokens)
        elif action < 0.8:
            if slots := client.lease(tokens):
                held.append((client, slots, blocks))
                num_leased += 1
        elif action < 0.93 and held:
            owner, slots, _ = held.pop(chance.randrange(len(held)))
            assert not owner.known.end(slots)
        elif action < 0.97:
            evict_all(core) if chance.random() < 0.3 else core.trim()
        elif action < 0.985:
            core.evict_chosen(ROOT, Choice(tokens=tokens[:STEP]))
        else:
            core.disconnect(client.connection)
            held = [each for each in held if each[0] is not client]
            clients[clients.index(client)] = client_of(core)
        for _, slots, expected in held:
            assert [content[slot] for slot in slots] == expected, "a leased slot was given to another block"
        core.check()
    assert num_leased > 15
    assert sum(size_class.evictions for size_class in core.slab.classes.values()) > 15
    for client in clients:
        core.disconnect(client.connection)


class NoCopies:
    def close(self) -> None:
        """Nothing to wait for."""


def open_connection(socket: Path) -> DaemonConnection[NoCopies]:
    return DaemonConnection(connect(socket), LAYOUT.block_bytes, open_mover=lambda _: NoCopies(), lost=lambda *_: None)


def question(tokens: bytes) -> Match:
    return Match(hashes=chain_of(tokens), tokens=tokens, lease=True)


def test_a_second_lease_sends_no_message(start_daemon: Start, short_path: Path) -> None:
    start_daemon(slots=64)
    tokens = tokens_of(4 * LAYOUT.block_size)
    with connect(short_path / "d.sock") as writer:
        assert write_prompt(writer, tokens) == 4
    connection = open_connection(short_path / "d.sock")
    first = split_numbers(connection.match(question(tokens)).slots)
    sent = connection.client.bytes_sent
    second = split_numbers(connection.match(question(tokens)).slots)
    assert second == first and len(second) == 4
    assert connection.client.bytes_sent == sent
    for slots in (first, second):
        connection.lease(slots)
        connection.return_leases(slots)
    connection.send_returned()
    with connect(short_path / "d.sock") as client:
        assert _report(client) == 0
    connection.retire()


def test_the_daemon_ends_a_client_that_sets_more_flags_than_it_may(start_daemon: Start, short_path: Path) -> None:
    start_daemon(slots=64)
    connection = open_connection(short_path / "d.sock")
    local = connection._local
    assert local
    local._flags[:] = b"\1" * 64
    deadline = time.monotonic() + 10
    while not connection.client.has_hung_up() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert connection.client.has_hung_up()
    with connect(short_path / "d.sock") as client:
        assert _report(client) == 0
    connection.retire(is_idle=True)


@pytest.mark.parametrize("trouble", ["reads nothing", "message cut off"])
def test_a_client_in_trouble_keeps_its_connection_while_it_leases_by_flags(
    start_daemon: Start, short_path: Path, trouble: str
) -> None:
    """It may have been stopped in the middle of a copy: no other block may come into these slots."""
    start_daemon(slots=64, store=False, limits={"unread_s": 0.05, "message_s": 0.05})
    tokens = tokens_of(4 * LAYOUT.block_size)
    with connect(short_path / "d.sock") as writer:
        assert write_prompt(writer, tokens) == 4
    connection = open_connection(short_path / "d.sock")
    connection.match(question(tokens))
    first = split_numbers(connection.match(question(tokens)).slots)
    connection.client.post(Release(slots=first.tobytes()))
    client = connection.client
    if trouble == "reads nothing":
        client._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                client._socket.send(frame(Status(), number=1, boot=client.boot))
    else:
        client._socket.sendall(frame(Status(), number=9, boot=client.boot)[:-1])
    with connect(short_path / "d.sock") as other:
        assert _report(other) == 4
        time.sleep(1.2)  # two rounds of the daemon's maintenance
        assert not client.has_hung_up()
        assert _report(other) == 4
        local = connection._local
        assert local
        local.end(first)
        deadline = time.monotonic() + 10
        while not client.has_hung_up() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.has_hung_up()
        assert local.match(question(tokens)) is None
        assert _report(other) == 0
    connection.retire(is_idle=True)


def _report(client: DaemonClient) -> int:
    return client.call(Status(), StatusReport).leased_slots
