"""RemoteSource: the records of one namespace in remote tiers, as a source below the store and the state files."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.remote_tiers.guard import GuardedRemote
from tierkv.remote_tiers.local_copies import LocalCopies
from tierkv.remote_tiers.protocol import RemoteKey
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import (
    BlockInfo,
    EncodedRecord,
    damage_reason,
    decode_record,
    max_record_bytes,
    parse_record,
)
from tierkv.values.block import TOKEN_BYTES, BlockHash
from tierkv.values.events import NamedBlock
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import parse_description

__all__ = ["RemoteSource"]

_MOST_FOUND = 1 << 16
_FRESH_S = 10.0  # so long it is believed that a remote tier still has a block
_ABSENT_S = 1.0  # and so long that it has none: an engine may ask for a waiting request at each step
_MOST_TOUCHED = 4096
_TOUCH_AGAIN_S = 30.0


class _Found(NamedTuple):
    """A block that a remote tier had when it was last asked."""

    parent: BlockHash
    num_tokens: int
    remote: GuardedRemote
    position: int
    found_at: float


class RemoteSource:
    """What remote tiers have of one namespace. Satisfies `ColdSource`. Thread-safe.

    `find` asks the remote tiers, in their order, which leading blocks of a chain they have; the caller holds no lock
    then. What they had is remembered, so that `lookup` answers without a call. A block may be gone when it is read: a
    miss. Partial blocks stay local.

    description: of the namespace; it has the lossy codec, and lies beside the records where the engine has folders.
    copies: keeps what was read in the store on this machine. read_record: of that store, whose blocks are written to a
    remote tier that lacks them when they are used.
    """

    is_remote = True

    def __init__(
        self,
        remotes: Sequence[GuardedRemote],
        description: bytes,
        *,
        copies: LocalCopies | None = None,
        read_record: Callable[[BlockHash], bytes | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        described = parse_description(description)
        self._remotes = tuple(remotes)
        self._namespace = described.digest
        self._lossy_codec = described.lossy_codec
        self._description = description
        self._block_tokens = described.layout.block_size
        self._copies = copies
        self._read_record = read_record
        self._clock = clock
        self._absent: OrderedDict[BlockHash, float] = OrderedDict()
        self._touched: OrderedDict[BlockHash, float] = OrderedDict()
        self._lock = threading.Lock()
        self._found: OrderedDict[BlockHash, _Found] = OrderedDict()

    def may_answer(self, num_blocks: int) -> bool:
        """Return whether it is worth asking for so many blocks: whether a remote tier is up that they are enough for.

        Costs a microsecond; the blocks that the local tiers lack need not be hashed where it returns False.
        """
        return any(remote.is_up and num_blocks >= remote.least_blocks for remote in self._remotes)

    def find(self, chain: Sequence[NamedBlock], *, first: int = 0) -> int:
        """Return how many leading blocks of a chain the remote tiers have; ask for those that nothing is known of.

        first: position of the first block in the prompt.
        """
        now = self._clock()
        at = next((n for n, block in enumerate(chain) if self.lookup(block.block_hash) is None), len(chain))
        if at == len(chain) or now - self._absent.get(chain[at].block_hash, -_ABSENT_S) < _ABSENT_S:
            return at
        keys = [RemoteKey(self._namespace, block.block_hash) for block in chain]
        was_asked = False
        for remote in self._remotes:
            if len(keys) - at < remote.least_blocks:
                continue
            count = remote.prefix(keys[at:])
            self._note_found(chain[at : at + count], remote, first + at, now)
            at += count
            was_asked = True
        if was_asked:
            self._note_absent(chain[at:], now)
        return at

    def lookup(self, block_hash: BlockHash) -> _Found | None:
        """Return what is known of a block, without a call."""
        found = self._found.get(block_hash)
        if found is None or not found.remote.is_up or self._clock() - found.found_at > _FRESH_S:
            return None
        return found

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return None: a remote tier cannot be asked for children."""

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return None: no part of a remote record is of use before all of it is checked."""

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Do nothing: the threads that read have a connection each, so several records are on their way at a time."""

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Return False."""
        return False

    def read_into(
        self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None:
        """Decode a block into `out`, one block of `layout`. Return None, or why it is a miss. coded: as ColdStore's.

        A record that is not the expected one is damage, whatever it is: its key names format, namespace and block.
        """
        found = self._found.get(expected.block_hash)
        if found is None:
            return MissReason.ABSENT
        remote, key = found.remote, RemoteKey(self._namespace, expected.block_hash)
        record = remote.read(key, most_bytes=max_record_bytes(layout))
        if isinstance(record, MissReason):
            return self._miss(remote, expected.block_hash, record)
        reason = self._decode(record, expected, out, layout, coded)
        if reason is not None:
            remote.note_damaged(key)
            return self._miss(remote, expected.block_hash, reason)
        remote.count("read_hits")
        if self._copies:
            self._copies.keep(record, position=found.position, count=remote.count)
        return None

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Forget a block; `read_into` has noted the damage."""
        with self._lock:
            self._found.pop(block_hash, None)

    def write(self, record: EncodedRecord) -> None:
        """Queue a whole block's record for all remote tiers; parents come first. A partial block stays local.

        Returns at once. The record's memory must not change.
        """
        if record.info.num_tokens < self._block_tokens:
            return
        key, parent = self._keys_of(record.info)
        for remote in self._remotes:
            remote.describe_later(self._namespace, self._description)
            remote.write_later(key, parent, record.data, held_bytes=record.buffer.size)

    def touch(self, chain: Sequence[BlockHash]) -> None:
        """Have remote tiers keep a prompt's blocks longer, and get those that they lack and the store has.

        chain: from the first block on, or what follows a chain touched before. Returns at once; a chain that was
        touched a moment ago is not touched again.
        """
        now = self._clock()
        with self._lock:
            if not chain or now - self._touched.get(chain[-1], -_TOUCH_AGAIN_S) < _TOUCH_AGAIN_S:
                return
            self._touched[chain[-1]] = now
            self._touched.move_to_end(chain[-1])
            if len(self._touched) > _MOST_TOUCHED:
                self._touched.popitem(last=False)
        keys = [RemoteKey(self._namespace, block_hash) for block_hash in chain]
        for remote in self._remotes:
            remote.touch_later(keys, lambda at: self._stored(chain[at]))

    def _note_found(self, blocks: Sequence[NamedBlock], remote: GuardedRemote, first: int, now: float) -> None:
        with self._lock:
            for position, block in enumerate(blocks, first):
                num_tokens = len(block.token_bytes) // TOKEN_BYTES
                self._found[block.block_hash] = _Found(block.parent_hash, num_tokens, remote, position, now)
                self._found.move_to_end(block.block_hash)
            while len(self._found) > _MOST_FOUND:
                self._found.popitem(last=False)

    def _note_absent(self, blocks: Sequence[NamedBlock], now: float) -> None:
        """Forget blocks behind the end of a prefix, and remember the first of them."""
        with self._lock:
            for block in blocks:
                self._found.pop(block.block_hash, None)
            for block in blocks[:1]:
                self._absent[block.block_hash] = now
                self._absent.move_to_end(block.block_hash)
            if len(self._absent) > _MOST_TOUCHED:
                self._absent.popitem(last=False)

    def _stored(self, block_hash: BlockHash) -> tuple[RemoteKey | None, Bytes] | None:
        """Return the parent's key and the record of a block in the store; None where it has no sound one."""
        try:
            data = self._read_record(block_hash)
            record = None if data is None else parse_record(data, lossy_codec=self._lossy_codec)
        except StoreError:
            return None
        if record is None or record.info.namespace != self._namespace or record.info.num_tokens < self._block_tokens:
            return None
        return self._keys_of(record.info)[1], record.data

    def _keys_of(self, info: BlockInfo) -> tuple[RemoteKey, RemoteKey | None]:
        """Return the keys of a block and of its parent; None for the parent of a first block."""
        parent = None if info.parent == self._namespace else RemoteKey(self._namespace, info.parent)
        return RemoteKey(self._namespace, info.block_hash), parent

    def _decode(
        self, record: Bytes, expected: BlockInfo, out: Bytes, layout: BlockLayout, coded: CodedBlock | None
    ) -> MissReason | None:
        try:
            return decode_record(
                record, out, expected=expected, layout=layout, lossy_codec=self._lossy_codec, coded=coded
            )
        except (CorruptBlockError, FormatVersionError) as exc:
            return damage_reason(exc)

    def _miss(self, remote: GuardedRemote, block_hash: BlockHash, reason: MissReason) -> MissReason:
        remote.count(f"miss_{reason.value}")
        self.note_damaged(block_hash)
        return reason
