"""A store of plain dictionaries and clients of plain lists: the daemon's core without sockets, threads and bytes."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tierkv.daemon.core import Core
from tierkv.daemon.messages import NO_SLOT, Chain, Found, Match, Release, Reserve
from tierkv.daemon.protocol import split_numbers
from tierkv.daemon.values import BlockIdentifier, Connection, FetchTask, Write
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.values.block import TOKEN_BYTES, HashFunction, common_run, hash_block, iter_chain
from tierkv.values.layout import BlockLayout

BLOCK_SIZE = 2
STEP = BLOCK_SIZE * TOKEN_BYTES
SLOT_BYTES = 4096


def layout(num_layers: int = 1) -> BlockLayout:
    return BlockLayout.uniform(num_layers=num_layers, block_size=BLOCK_SIZE, kv_heads=1, head_dim=4, dtype="float32")


def weak_hash(parent: bytes, tokens: bytes) -> bytes:
    """A hash of 4 bits: collisions happen all the time."""
    return bytes([hash_block(parent, tokens)[0] & 15]) * 16


def as_bytes(token_ids: list[int]) -> bytes:
    return np.array(token_ids, dtype="<u4").tobytes()


@dataclass(frozen=True)
class Stored:
    parent: bytes
    tokens: bytes
    content_digest: bytes
    content: tuple[bytes, bytes]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES


class DictStore:
    """Blocks by hash; what is put must have its parent, as in the real one."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Stored] = {}

    def lookup(self, block_hash: bytes) -> Stored | None:
        return self.blocks.get(block_hash)

    def read_tokens(self, block_hash: bytes) -> bytes | None:
        stored = self.blocks.get(block_hash)
        return stored.tokens if stored else None

    def find_longest_run(self, parent: bytes, token_bytes: bytes) -> tuple[bytes, bytes, int] | None:
        children = [
            (h, s.tokens, common_run(s.tokens, token_bytes)) for h, s in self.blocks.items() if s.parent == parent
        ]
        return max((child for child in children if child[2]), key=lambda child: child[2], default=None)

    def put(self, info: BlockInfo, content: tuple[bytes, bytes]) -> bool:
        if info.block_hash in self.blocks or (info.parent != info.namespace and info.parent not in self.blocks):
            return False
        self.blocks[info.block_hash] = Stored(info.parent, info.token_bytes, info.content_digest, content)
        return True

    def remove(self, block_hash: bytes) -> None:
        """Remove a block and what follows it."""
        self.blocks.pop(block_hash, None)
        for child in [h for h, stored in self.blocks.items() if stored.parent == block_hash]:
            self.remove(child)


@dataclass(eq=False)
class Client:
    """One connection, what it borrowed and what each borrowed slot must hold."""

    core: Core
    slab: dict[int, tuple[bytes, bytes]]
    namespace: bytes
    hash_function: HashFunction
    has_rows: bool = False
    connection: Connection = field(init=False)
    borrowed: list[tuple[int, tuple[bytes, bytes]]] = field(default_factory=list)
    reserved: list[tuple[int, tuple[bytes, bytes]]] = field(default_factory=list)
    cursors: list[tuple[int, Found, bytes]] = field(default_factory=list)
    tasks: list[tuple[FetchTask, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = self.core.connect()
        self.core.open_tenant(self.connection, self.namespace, b"", layout=layout(), has_rows=self.has_rows)

    def prompt(self, tokens: bytes) -> bytes:
        """Return what this client can ask for: of rows, whole ones that differ."""
        if not self.has_rows:
            return tokens
        return b"".join(dict.fromkeys(tokens[at : at + STEP] for at in range(0, len(tokens) - STEP + 1, STEP)))

    def chain(self, tokens: bytes) -> list[bytes]:
        if self.has_rows:
            return [self.hash_function(self.namespace, tokens[at : at + STEP]) for at in range(0, len(tokens), STEP)]
        return [h for h, _ in iter_chain(self.namespace, tokens, BLOCK_SIZE, self.hash_function)]

    def content(self, tokens: bytes, at: int) -> tuple[bytes, bytes]:
        """What block `at` of a prompt must hold: it depends on every token up to its end, a row on its own."""
        if self.has_rows:
            return self.namespace, tokens[at * STEP : (at + 1) * STEP]
        return self.namespace, tokens[: (at + 1) * STEP]

    def match(self, tokens: bytes, start: int = 0) -> Found:
        tokens = self.prompt(tokens)
        hashes = self.chain(tokens)
        start = min(start, len(hashes))
        found = self.core.match(
            self.connection, Match(hashes=b"".join(hashes), tokens=tokens, start=start, lease=True, wants_claim=True)
        )
        slots = split_numbers(found.slots)
        for at, slot in enumerate(slots, start):
            if slot != NO_SLOT:
                self.borrowed.append((slot, self.content(tokens, at)))
        if found.partial_block:
            end = start + len(slots)
            assert (
                found.partial_block.tokens[: found.partial_block.num_tokens * TOKEN_BYTES]
                == tokens[end * STEP :][: found.partial_block.num_tokens * TOKEN_BYTES]
            )
            if found.partial_block.slot != NO_SLOT:
                self.borrowed.append(
                    (found.partial_block.slot, (self.namespace, tokens[: end * STEP] + found.partial_block.tokens))
                )
        if found.cursor:
            self.cursors.append((found.cursor, found, tokens))
        return found

    def end_fetch(self, which: int, firsts: dict[int, int]) -> None:
        task, tokens = self.tasks.pop(which)
        fetched = self.core.loads.end_fetch(self.connection, task)
        if self.connection.is_closed:
            return
        for at, slot in enumerate(split_numbers(fetched.slots), firsts[id(task)]):
            self.borrowed.append((slot, self.content(tokens, at)))

    def check(self) -> None:
        """Every borrowed slot holds what it was borrowed for, and the core knows of each loan."""
        for slot, content in self.borrowed:
            assert self.slab[slot] == content, f"slot {slot} holds another block"
        if not self.connection.is_closed:
            assert Counter(slot for slot, _ in self.borrowed) == self.connection.leases

    def release(self, count: int) -> None:
        given, self.borrowed = self.borrowed[:count], self.borrowed[count:]
        self.core.release(self.connection, Release(slots=array("I", [slot for slot, _ in given]).tobytes()))

    def reserve(self, tokens: bytes, offers: list[int]) -> None:
        tokens = self.prompt(tokens)
        if not tokens:
            return
        hashes: list[bytes] = []
        parent = self.namespace
        for at in range(0, len(tokens), STEP):
            parent = self.hash_function(self.namespace if self.has_rows else parent, tokens[at : at + STEP])
            hashes.append(parent)
        chosen = array("I", sorted({offer % len(hashes) for offer in offers}))
        chain = Chain(b"".join(hashes), tokens, chosen.tobytes())
        (answer,) = self.core.reservations.reserve(self.connection, Reserve(chains=[chain])).chains
        for at, slot in zip(split_numbers(answer.numbers), split_numbers(answer.slots), strict=True):
            assert at in chosen
            self.reserved.append((slot, self.content(tokens, at)))

    def publish(self, count: int) -> list[Write]:
        given, self.reserved = self.reserved[:count], self.reserved[count:]
        for slot, content in given:
            self.slab[slot] = content
        return self.core.publish(self.connection, array("I", [slot for slot, _ in given]).tobytes())[1]


def finish_write(core: Core, store: DictStore, slab: dict[int, tuple[bytes, bytes]], write: Write) -> None:
    core.finish_write(
        write, is_stored=store.put(BlockIdentifier().identify(write.tenant, write.entry), slab[write.slot])
    )


def finish_load(core: Core, slab: dict[int, tuple[bytes, bytes]], task: FetchTask) -> None:
    """End a task's own loads as the real store would: identities are compared when the block is read."""
    for load in task.fresh:
        store = load.source
        assert isinstance(store, DictStore)
        info = BlockIdentifier().identify(load.tenant, load.entry)
        stored = store.lookup(info.block_hash)
        if stored is None:
            core.finish_load(load, MissReason.ABSENT)
        elif (stored.parent, stored.tokens, stored.content_digest) != (
            info.parent,
            info.token_bytes,
            info.content_digest,
        ):
            core.finish_load(load, MissReason.COLLISION)
        else:
            slab[load.slot] = stored.content
            core.finish_load(load, None)
