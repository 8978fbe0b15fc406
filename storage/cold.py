"""The cold tier: blocks in one LMDB environment, bounded, shared by processes, kept when they end.

One writer at a time among all processes; readers never wait for it. Damage is never raised to a reader: it is a miss
with a reason, and the next write removes the damaged block together with the blocks that follow it. A block that
another version of this code wrote is a miss too, and stays.
Why the store stays consistent: cold_batch.py. What a crash leaves: lmdb_env.py, FORMAT.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tierkv.errors import CapacityError, ConfigError, CorruptBlockError, StoreError
from tierkv.storage import cold_reader
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold_check import VerifyReport, check_store, repair_store, verify_store
from tierkv.storage.cold_eviction import (
    EvictionCandidates,
    EvictionReport,
    EvictionScore,
    StoredPrompt,
    least_recently_used,
)
from tierkv.storage.cold_notes import ColdStats, Counters, PendingNotes
from tierkv.storage.cold_opening import adopt_format_and_quota
from tierkv.storage.cold_rows import (
    NAMES,
    QUOTA_KEY,
    ColdEntry,
    Databases,
    EntryParent,
    get_entry,
    get_parent,
    map_bytes_of,
    namespace_rows,
    unpack_quota,
    with_history,
)
from tierkv.storage.cold_salvage import ColdSalvager
from tierkv.storage.cold_tenants import TenantSettings
from tierkv.storage.cold_writer import ColdWriter
from tierkv.storage.lmdb_env import LmdbEnv, ReadTransaction
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import BlockInfo, Buffer, EncodedRecord
from tierkv.storage.record_decoders import RecordDecoders
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace, parse_description
from tierkv.values.units import format_bytes

__all__ = ["DEFAULT_QUOTA_BYTES", "ColdStore"]

DEFAULT_QUOTA_BYTES = 64 << 30
_logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")


class ColdStore(cold_reader.ColdReader):  # by the module's name: pyright's report of known types finds it so only
    """An open cold store. Thread-safe; a context manager; `close()` may be called twice.

    quota_bytes: of a new store, 64 GiB if None: a bound on the live bytes, padding included; the file may be a tenth
        larger. It is stored, and holds for every process that opens the store later; another number is then logged and
        ignored. `set_quota` changes it.
    min_free_bytes: with less free disk the store stops growing and evicts instead; None leaves 1 GiB free, or a 20th
        of a volume that is smaller than 20 GiB. Not stored: each process has its own.
    write_wait_s: how long a writer waits for other writers, here or in another process; then StoreBusyError is
        raised, or is an outcome. Readers never wait for them.
    notes: what reads leave for the next write, such as `notes.touch`; `maintain` writes them when `notes.are_due`.
    Raises StoreError if the path cannot be used, FormatVersionError if another version wrote it.
    A data file that cannot be used is set aside (`damaged`) and a fresh one begun.

    >>> with ColdStore(Path("shared")) as cold, TierCache(config, namespace=namespace, cold=cold) as cache:
    ...     cold.quota_bytes >> 30
    64
    """

    def __init__(
        self,
        path: Path,
        *,
        quota_bytes: int | None = None,
        min_free_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
        eviction_score: EvictionScore = least_recently_used,
        read_only: bool = False,
        write_wait_s: float = 30.0,
    ) -> None:
        first_quota = DEFAULT_QUOTA_BYTES if quota_bytes is None else quota_bytes
        if first_quota <= 0:
            raise ConfigError(f"quota_bytes must be positive, got {quota_bytes}")
        super().__init__(
            LmdbEnv(
                path,
                map_bytes=map_bytes_of(first_quota),
                names=NAMES,
                read_only=read_only,
                salvager=ColdSalvager(quota_bytes=first_quota, clock=clock),
                write_wait_s=write_wait_s,
            )
        )
        self._counters = Counters()
        self._writer = ColdWriter(
            self._env,
            quota_bytes=first_quota,
            min_free_bytes=min_free_bytes,
            clock=clock,
            candidates=EvictionCandidates(eviction_score),
            counters=self._counters,
            write_wait_s=write_wait_s,
        )
        self.notes: PendingNotes = self._writer.notes
        try:
            adopt_format_and_quota(self._env, self._writer, quota_bytes)
            if not self.read_only:
                try:
                    self._writer.require_room(0)
                except (CapacityError, StoreError) as exc:
                    _logger.warning("%s", exc)
        except BaseException:
            self._env.close()
            raise

    def __enter__(self) -> ColdStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write pending notes and close; waits for the reads in flight. Failed writes are logged."""
        try:
            if self._env.is_open and not self.read_only:
                steps = (self.maintain, "accesses were not noted"), (self._env.sync, "the disk may lack some")
                for finish, what in steps:
                    try:
                        finish()
                    except StoreError as exc:
                        _logger.warning("cold store %s is closed, but %s: %s", self.path, what, exc)
        finally:
            self._env.close()

    @property
    def quota_bytes(self) -> int:
        """The store's quota, as it was when this object last wrote; `stats` has it as it is now."""
        return self._writer.quota_bytes

    def contains(self, block_hash: BlockHash) -> bool:
        """Return whether a block of this hash is stored."""
        return self.lookup(block_hash) is not None

    def lookup(self, block_hash: BlockHash) -> ColdEntry | None:
        """Return the small record of a block, or None. Does not look at parent or tokens."""
        return self.lookup_many([block_hash])[0]

    def lookup_many(self, block_hashes: Iterable[BlockHash]) -> list[ColdEntry | None]:
        """Return the small records of blocks, from one snapshot; None for each that is not stored or is damaged.

        The next write makes a damaged record anew from its block.
        """
        with self._env.read() as txn:
            databases = Databases(*self._env.handles)
            return [self._sound(get_entry, txn, databases, block_hash) for block_hash in block_hashes]

    def lookup_run(self, block_hashes: Iterable[BlockHash]) -> list[EntryParent | None]:
        """Return two fields of each leading block that `lookup_many` finds, and None for the block after them.

        It takes no hash after that one, so the caller can compute the hashes as they are asked for.
        """
        found: list[EntryParent | None] = []
        with self._env.read() as txn:
            databases = Databases(*self._env.handles)
            for block_hash in block_hashes:
                found.append(self._sound(get_parent, txn, databases, block_hash))
                if found[-1] is None:
                    break
        return found

    def read_into(
        self,
        expected: BlockInfo,
        out: Buffer,
        *,
        layout: BlockLayout,
        coded: CodedBlock | None = None,
        decoders: RecordDecoders | None = None,
    ) -> MissReason | None:
        """Decode a block into `out` as it is read; return None, or why it is a miss.

        out: writable, layout.block_bytes; contents undefined after a miss. Raises only for an `out` of the
        wrong shape and for a closed store. Many threads may read at once; the heavy parts release the GIL.
        coded: take frames that a GPU decodes as they are; see `decode_record`. decoders: processes that decode in place
        of this thread, where they can.
        """
        return self.read_many_into([expected], [out], layout=layout, coded=[coded], decoders=decoders)[0]

    def read_many_into(
        self,
        expected: Sequence[BlockInfo],
        outs: Sequence[Buffer],
        *,
        layout: BlockLayout,
        coded: Sequence[CodedBlock | None] | None = None,
        decoders: RecordDecoders | None = None,
    ) -> list[MissReason | None]:
        """Decode blocks of one namespace, one after another, as `read_into` does; all are found in one snapshot.

        Many small blocks cost a thread less so. The snapshot keeps their pages from being used again meanwhile.
        """
        reasons = self.decode_blocks(expected, outs, layout=layout, coded=coded, decoders=decoders)
        for at, (info, reason) in enumerate(zip(expected, reasons, strict=True)):
            if reason in (MissReason.CORRUPT, MissReason.TRUNCATED):
                self.note_damaged(info.block_hash)
            elif reason is MissReason.ABSENT and self.was_evicted(info.block_hash):
                reasons[at] = MissReason.EVICTED
        self._counters.count_reads(reasons)
        return reasons

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Return whether this object evicted a block not long ago; it may be stored again."""
        return self._counters.was_evicted(block_hash)

    @property
    def has_evicted(self) -> bool:
        """Whether `was_evicted` may return True for any block."""
        return self._counters.has_evicted

    def open_namespace(self, namespace: Namespace) -> None:
        """Register a namespace, so that `namespaces` can describe it, and note that it is in use.

        Where other writers take too long, the next put does it.
        """
        self._note_namespace(namespace.digest, namespace.describe())
        if not self.read_only:
            self.register_namespace(namespace.digest, namespace.describe())

    def register_namespace(self, digest: BlockHash, description: bytes) -> None:
        """Do as `open_namespace` for a namespace that is known by its digest and its description alone.

        Raises ConfigError for a description that `parse_description` refuses, or that is another namespace's. Where the
        store cannot be written to now, as on a full disk, a later write registers it.
        """
        if parse_description(description).digest != digest:
            raise ConfigError(f"the description of namespace {digest.hex()} is that of another namespace")
        self._require_writable()
        self._note_namespace(digest, description)
        self.notes.note_namespace(digest, description)
        try:
            self._writer.maintain()
        except StoreError as exc:
            _logger.warning("%s; the namespace is registered later", exc)

    def put(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store blocks, parents before children; evict to make room. Durable at the next `flush(sync=True)`.

        Raises nothing for a full or failing disk: that is an outcome. A block, its entry and its place in
        the tree appear together or not at all.
        """
        self._require_writable()
        return self._writer.put(records)

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Let the next write repair a block, or remove it with all that follow it; it is absent until then.

        Never waits for writers. A block that turns out to be sound stays.
        """
        self.notes.note_damaged(block_hash)

    def maintain(self) -> None:
        """Write the notes of reads and touches. Raises StoreError; they are then kept for later."""
        self._require_writable()
        self._writer.maintain()

    def set_pinned(self, block_hashes: Iterable[BlockHash], pinned: bool, *, ttl_s: float | None = None) -> None:
        """Pin or unpin blocks: no process evicts a pinned block. ttl_s: how long the pin holds; None for good."""
        self._require_writable()
        with self._writer.batch() as batch:
            until = None if ttl_s is None else batch.now + ttl_s
            for block_hash in block_hashes:
                batch.set_pinned(block_hash, pinned, until=until)

    def set_history(self, blocks: Mapping[BlockHash, tuple[ColdEntry, float | None]]) -> None:
        """Give stored blocks the times, counts and pins of entries elsewhere, and the ends of these pins."""
        self._require_writable()
        with self._writer.batch() as batch:
            for block_hash, (old, pin_end) in blocks.items():
                entry = batch.entry(block_hash)
                if entry is not None:
                    batch.write_entry(block_hash, with_history(entry, old))
                    batch.set_pinned(block_hash, old.pinned, until=pin_end)

    def set_tenants(
        self, changes: Mapping[str, TenantSettings | None], *, evict: bool = False, may_exceed: bool = False
    ) -> EvictionReport:
        """Store settings of tenants for all processes that use the store, and remove those that are None.

        Where a tenant has more than its new limit, raises CapacityError unless `evict`. Raises ConfigError for settings
        that do not agree, CapacityError if it makes all cold shares together exceed the quota.
        may_exceed: the settings are those of another store whose blocks this one gets. No size is compared.
        """
        self._require_writable()
        return self._writer.set_tenants(changes, evict=evict, may_exceed=may_exceed)

    def delete(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it, pinned or not; return how many were removed."""
        self._require_writable()
        return self._writer.attempt(lambda batch: batch.remove_subtree(block_hash))

    def evict(
        self,
        *,
        to_bytes: int | None = None,
        namespace: BlockHash | None = None,
        older_than_s: float | None = None,
        prompt: StoredPrompt | None = None,
        dry_run: bool = False,
    ) -> EvictionReport:
        """Remove unpinned blocks, leaf first: those that match namespace, prompt and age, where given; then more, until
        at most `to_bytes` are live. A parent stays as long as a child does.

        prompt: the blocks that begin with it are removed, and those of its own blocks that no other block continues.
        dry_run: change nothing, and return what would be removed.
        """
        self._require_writable()
        return self._writer.evict(to_bytes, namespace, older_than_s, prompt, dry_run=dry_run)

    def require_room(self, num_bytes: int = 0) -> None:
        """Raise CapacityError if blocks of so many bytes would find no room, evicting included."""
        self._require_writable()
        self._writer.require_room(num_bytes)

    def set_quota(self, quota_bytes: int, *, evict: bool = False) -> EvictionReport:
        """Change the store's quota, for all processes that have it open or open it later; return what was evicted.

        Where more is live than the new quota, raises CapacityError unless `evict`. Pinned blocks stay.
        """
        if quota_bytes <= 0:
            raise ConfigError(f"a quota must be positive, got {quota_bytes}")
        self._require_writable()
        report = None if evict else self.evict(to_bytes=quota_bytes, dry_run=True)
        if report and report.blocks:
            raise CapacityError(
                f"a quota of {format_bytes(quota_bytes)} would evict {report.blocks:,} blocks, "
                f"{format_bytes(report.freed_bytes)}, from cold store {self.path}",
                hint="with evict=True, or --evict, it does",
            )
        self._writer.set_quota(quota_bytes)
        return report or self._writer.evict(quota_bytes)

    def adopt_quota(self, quota_bytes: int) -> None:
        """Store the quota of another store whose blocks this one has, though there may be more: nothing is evicted."""
        self._require_writable()
        self._writer.set_quota(quota_bytes)

    def flush(self, *, sync: bool = True) -> None:
        """Write pending accesses; with `sync`, return when all is on the disk. Raises StoreError."""
        if self.read_only:
            return
        self._writer.maintain()
        if sync:
            self._env.sync()

    def stats(self) -> ColdStats:
        """Return sizes as they are now and counters since this object was made."""
        with self._env.read() as txn:
            rows = namespace_rows(txn, self._databases).values()
            quota_bytes = unpack_quota(txn.get(QUOTA_KEY, db=self._databases.meta))
        return self._counters.stats(
            rows, file_bytes=self._env.file_bytes, quota_bytes=quota_bytes or self._writer.quota_bytes
        )

    def check(self) -> None:
        """Raise StoreError if the databases do not agree with each other. Reads no payload."""
        self._env.check_trees()
        with self._env.read() as txn:
            check_store(txn, self._databases)

    def verify(self, *, repair: bool = False, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every record: checksum, sizes, chain. With `repair`, remove the bad ones, but none of another version.

        progress: called with (blocks done, blocks in all).
        """
        if repair:
            self._require_writable()
        report = verify_store(self._env, progress)
        if report.is_sound or not repair:
            return report
        removed = repair_store(self._env, self._writer, report)
        self._counters.count_damaged(removed)
        return replace(report, removed=removed)

    def compact(self) -> None:
        """Rewrite the file without its free pages. Raises StoreError if another process has the store open."""
        self._require_writable()
        self.flush(sync=False)
        self._writer.compact()

    def _sound(
        self,
        get: Callable[[ReadTransaction, Databases, BlockHash], _Found | None],
        txn: ReadTransaction,
        databases: Databases,
        block_hash: BlockHash,
    ) -> _Found | None:
        """Return what `get` finds of a block, or None if it is not stored or is damaged, which is noted."""
        try:
            return None if self.notes.is_damaged(block_hash) else get(txn, databases, block_hash)
        except CorruptBlockError:
            self.note_damaged(block_hash)
            return None

    def _require_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"cold store {self.path} was opened read-only")
        if not self._env.is_open:
            raise StoreError(f"cold store {self.path} is closed")
