"""The cold tier: blocks in one LMDB environment, bounded, shared by processes, surviving them.

One writer at a time among all processes; readers never wait for it. Damage is never raised at a reader: it is
a miss with a reason, and the damaged block leaves the store together with the blocks that follow it, when somebody
writes next. A block that another version of this code wrote is a miss too, and stays.
What is stored and why it stays consistent: cold_batch.py; what a crash leaves: lmdb_env.py and FORMAT.md.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tierkv.errors import CapacityError, ConfigError, CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold_batch import SPECS, get_entry, namespace_rows
from tierkv.storage.cold_check import VerifyReport, check_store, verify_block, verify_store
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.cold_eviction import EvictionReport, VictimOrder, VictimQueue, least_recently_used
from tierkv.storage.cold_namespaces import (
    FORMAT_KEY,
    QUOTA_KEY,
    STORE_VERSION,
    add_checksum,
    check_format,
    unpack_quota,
)
from tierkv.storage.cold_prompt import StoredPrompt
from tierkv.storage.cold_reader import ColdReader
from tierkv.storage.cold_salvage import ColdKeeper
from tierkv.storage.cold_stats import ColdStats, Counters
from tierkv.storage.cold_writer import ColdWriter, map_bytes_of
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import (
    BlockInfo,
    Buffer,
    EncodedRecord,
    parse_record,
)
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace, parse_description
from tierkv.values.units import format_bytes

__all__ = ["DEFAULT_QUOTA_BYTES", "ColdStore"]

DEFAULT_QUOTA_BYTES = 64 << 30

_logger = logging.getLogger(__name__)


class ColdStore(ColdReader):
    """An open cold store. Thread-safe; a context manager; `close()` may be called twice.

    quota_bytes: of a new store, 64 GiB if None: a bound on the live bytes, padding included; the file may be a tenth
        larger. It is stored, and holds for everybody who opens the store later: one who says another number is told
        so in the log, and the store's own holds. `set_quota` changes it.
    min_free_bytes: below so much free disk the store stops growing and evicts instead; None leaves 1 GiB free, or a
        20th of a volume that is smaller than 20 GiB. Not stored: each user of the store has its own.
    write_wait_s: how long whoever writes waits for others who do, here or in another process; then StoreBusyError is
        raised, or is an outcome. Who reads, or calls `touch`, never waits for them.
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
        victim_order: VictimOrder = least_recently_used,
        read_only: bool = False,
        write_wait_s: float = 30.0,
    ) -> None:
        first_quota = DEFAULT_QUOTA_BYTES if quota_bytes is None else quota_bytes
        if first_quota <= 0:
            raise ConfigError(f"quota_bytes must be positive, got {quota_bytes}")
        keeper = ColdKeeper(quota_bytes=first_quota, clock=clock)
        super().__init__(
            LmdbEnv(
                path,
                map_bytes=map_bytes_of(first_quota),
                specs=SPECS,
                read_only=read_only,
                keeper=keeper,
                write_wait_s=write_wait_s,
            )
        )
        self._counters = Counters()
        self._writer = ColdWriter(
            self._env,
            quota_bytes=first_quota,
            min_free_bytes=min_free_bytes,
            clock=clock,
            victims=VictimQueue(victim_order),
            counters=self._counters,
            write_wait_s=write_wait_s,
        )
        try:
            self._check_format()
            self._settle_quota(quota_bytes)
            if not self.read_only:
                self._warn_of_no_room()
        except BaseException:
            self._env.close()
            raise

    def __enter__(self) -> ColdStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is pending and close; waits for the reads in flight. What could not be written is logged."""
        try:
            if self._env.is_open and not self.read_only:
                for finish, what in (
                    (self.tend, "accesses were not noted"),
                    (self._env.sync, "the disk may lack some"),
                ):
                    try:
                        finish()
                    except StoreError as exc:
                        _logger.warning("cold store %s is closed, but %s: %s", self.path, what, exc)
        finally:
            self._env.close()

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written through this object."""
        return self._env.read_only

    @property
    def quota_bytes(self) -> int:
        """The store's quota, as it was when this object last wrote; `stats` has it as it is now."""
        return self._writer.quota_bytes

    @property
    def damaged(self) -> Path | None:
        """Where a data file that could not be used was set aside when this store was opened."""
        return self._env.damaged

    # -- reading ---------------------------------------------------------------------------------------

    def is_shared(self) -> bool:
        """Tell whether another process, or another object of this one, has the store open."""
        return self._env.is_shared()

    def contains(self, block_hash: BlockHash) -> bool:
        """Tell whether a block of this hash is stored."""
        return self.lookup(block_hash) is not None

    def lookup(self, block_hash: BlockHash) -> ColdEntry | None:
        """Return the small record of a block, or None. Does not look at parent or tokens."""
        return self.lookup_many([block_hash])[0]

    def lookup_many(self, block_hashes: Iterable[BlockHash]) -> list[ColdEntry | None]:
        """Return the small records of blocks, from one snapshot; None for each that is not stored or is damaged.

        A damaged one is made anew from its block when somebody writes next.
        """
        found: list[ColdEntry | None] = []
        with self._env.read() as txn:
            for block_hash in block_hashes:
                entry = None
                try:
                    if not self._writer.is_damaged(block_hash):
                        entry = get_entry(txn, self._databases, block_hash)
                except CorruptBlockError:
                    self.note_damaged(block_hash)
                found.append(entry)
        return found

    def read_into(
        self, expected: BlockInfo, out: Buffer, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None:
        """Decode a block into `out` as it is read; return None, or why it is a miss.

        out: writable, layout.block_bytes; contents undefined after a miss. Raises only for an `out` of the
        wrong shape and for a closed store. Many threads may read at once; the heavy parts release the GIL.
        coded: take frames that a GPU decodes as they are; see `decode_record`.
        """
        reason = self.decode_block(expected, out, layout=layout, coded=coded)
        if reason in (MissReason.CORRUPT, MissReason.TRUNCATED):
            self.note_damaged(expected.block_hash)
        if reason is MissReason.ABSENT and self.was_evicted(expected.block_hash):
            reason = MissReason.EVICTED
        self._counters.count_read(reason)
        return reason

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to fetch blocks that will be read soon; returns without them. Raises nothing."""
        with contextlib.suppress(StoreError):
            self._env.fetch_values(self._databases.blocks_name, block_hashes)

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Tell whether reading a block takes no disk; True of one that cannot be read. Raises nothing."""
        try:
            return self._env.is_in_memory(self._databases.blocks_name, block_hash)
        except StoreError:
            return True

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Tell whether this object evicted a block not long ago; it may have come back since."""
        return self._counters.was_evicted(block_hash)

    # -- writing ---------------------------------------------------------------------------------------

    def open_namespace(self, namespace: Namespace) -> None:
        """Register a namespace, so that `namespaces` can describe it, and note that it is in use.

        Where others write for too long that is left to the next put.
        """
        self._note_namespace(namespace.digest, namespace.describe())
        if not self.read_only:
            self.register_namespace(namespace.digest, namespace.describe())

    def register_namespace(self, digest: BlockHash, description: bytes) -> None:
        """Do as `open_namespace` for one that is known by its digest and its description alone.

        Raises ConfigError for a description that `parse_description` refuses, or that is another namespace's. A store
        that cannot be written to now, as on a full disk, is told of it later.
        """
        if parse_description(description).digest != digest:
            raise ConfigError(f"the description of namespace {digest.hex()} is that of another namespace")
        self._require_writable()
        self._note_namespace(digest, description)
        self._writer.note_namespace(digest, description)
        try:
            self._writer.tend()
        except StoreError as exc:
            _logger.warning("%s; the namespace is registered later", exc)

    def put(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store blocks, parents before children; evict to make room. Durable at the next `flush(sync=True)`.

        Raises nothing for a full or failing disk: the outcomes say so. A block, its entry and its place in
        the tree appear together or not at all.
        """
        self._require_writable()
        return self._writer.put(records)

    def put_record_bytes(self, record: Buffer, *, cost_s: float = 0.0) -> PutOutcome:
        """Store a record as `read_record` returned it. Raises CorruptBlockError if it is damaged."""
        return self.put([parse_record(record, cost_s=cost_s)])[0]

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Record accesses. Kept in memory and written with the next put, eviction, flush or close; waits for nobody."""
        if not self.read_only:
            self._writer.touch(block_hashes)

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Have a block mended, or removed with all that follow it, by whoever writes next; it is absent until then.

        Waits for nobody. One that turns out to be sound stays.
        """
        if not self.read_only:
            self._writer.note_damaged(block_hash)

    @property
    def is_due(self) -> bool:
        """Whether so much has been noted for the next write that somebody should `tend` the store."""
        return self._writer.is_due

    def tend(self) -> None:
        """Write what reads and touches have left to be written. Raises StoreError; then it is left for later."""
        self._require_writable()
        self._writer.tend()

    def set_pinned(self, block_hashes: Iterable[BlockHash], pinned: bool) -> None:
        """Pin or unpin blocks for good: eviction leaves pinned ones, in this process and all later ones."""
        self._require_writable()
        with self._writer.batch() as batch:
            for block_hash in block_hashes:
                batch.set_pinned(block_hash, pinned)

    def delete(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it, pinned or not; return how many blocks went."""
        self._require_writable()
        return self._writer.remove_subtree(block_hash)

    def evict(
        self,
        *,
        to_bytes: int | None = None,
        namespace: BlockHash | None = None,
        older_than_s: float | None = None,
        prompt: StoredPrompt | None = None,
    ) -> EvictionReport:
        """Remove unpinned blocks, leaf first: those that match namespace, prompt and age, where given; then as many
        as it takes to have at most `to_bytes` live. A parent stays as long as a child does.

        prompt: what begins with it goes, and those of its own blocks that nothing else continues.
        """
        self._require_writable()
        return self._writer.evict(to_bytes=to_bytes, namespace=namespace, older_than_s=older_than_s, prompt=prompt)

    def require_room(self, num_bytes: int = 0) -> None:
        """Raise CapacityError if blocks of so many bytes would find no room, evicting included."""
        self._require_writable()
        self._writer.require_room(num_bytes)

    def set_quota(self, quota_bytes: int, *, evict: bool = False) -> EvictionReport:
        """Change the store's quota, for everybody who has it open and opens it later; return what was evicted for it.

        Where more is live than the new quota, CapacityError says what would go, unless `evict`. Pinned blocks stay.
        """
        if quota_bytes <= 0:
            raise ConfigError(f"a quota must be positive, got {quota_bytes}")
        self._require_writable()
        if not evict:
            report = self._writer.would_evict(quota_bytes)
            if report.blocks:
                raise CapacityError(
                    f"a quota of {format_bytes(quota_bytes)} would evict {report.blocks:,} blocks, "
                    f"{format_bytes(report.freed_bytes)}, from cold store {self.path}",
                    hint="with evict=True, or --evict, it does",
                )
        self._writer.set_quota(quota_bytes)
        if not evict:
            return EvictionReport(blocks=0, freed_bytes=0)
        return self._writer.evict(to_bytes=quota_bytes, namespace=None, older_than_s=None)

    def flush(self, *, sync: bool = True) -> None:
        """Write pending accesses; with `sync`, return when all is on the disk. Raises StoreError."""
        if self.read_only:
            return
        self._writer.tend()
        if sync:
            self._env.sync()

    # -- upkeep ----------------------------------------------------------------------------------------

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
        """Read every record: checksum, sizes, chain. With `repair`, remove the bad ones; what another version of this
        code wrote stays.

        progress: called with (blocks done, blocks in all).
        """
        if repair:
            self._require_writable()
        report = verify_store(self._env, self._handles, progress)
        if report.is_sound or not repair:
            return report
        removed = sum(self._repair(block_hash) for block_hash in report.damaged)
        with self._writer.batch() as batch:
            batch.rebuild_tree()
        self._counters.count_damaged(removed)
        return report.after_repair(removed)

    def compact(self) -> None:
        """Give free space back to the disk. Raises StoreError if another process has the store open."""
        self._require_writable()
        self.flush(sync=False)
        self._writer.compact()

    # -- parts -----------------------------------------------------------------------------------------

    def _repair(self, block_hash: BlockHash) -> int:
        """Make a block whole again if only its entry was damaged; else remove it. Return how many blocks went."""
        try:
            self._writer.attempt(lambda batch: batch.mend_entry(block_hash))
            with self._env.read() as txn:
                verify_block(self._env, txn, self._databases, block_hash)
        except FormatVersionError:
            return 0
        except StoreError as exc:
            # Of another error, as a busy store's, the block is not guilty.
            if not isinstance(exc, CorruptBlockError) and not isinstance(exc.__cause__, OSError):
                raise
            return self._writer.remove_subtree(block_hash)
        return 0

    def _check_format(self) -> None:
        """Write the version of a new store; refuse the store of another version."""
        with self._env.read() as txn:
            packed = txn.get(FORMAT_KEY, db=self._databases.meta)
            version = None if packed is None else bytes(packed)
        if version is not None:
            check_format(version)
        elif not self.read_only:
            with self._writer.batch() as batch:
                batch.txn.put(FORMAT_KEY, add_checksum(STORE_VERSION), db=self._databases.meta)

    def _settle_quota(self, wanted: int | None) -> None:
        """Go by the quota that is stored; of a store that has none, store the one that is wanted.

        A store that an older version made may hold more than that: then so much is its quota.
        """
        stored = self._stored_quota()
        if stored is None and not self.read_only:
            with self._writer.batch() as batch:
                stored = max(self._writer.quota_bytes, batch.live_bytes)
                batch.set_quota(stored)
        elif stored not in (None, wanted) and wanted is not None:
            _logger.warning(
                "cold store %s has a quota of %s, which stays: %s were asked for (tierkv quota SIZE sets another)",
                self.path,
                format_bytes(stored or 0),
                format_bytes(wanted),
            )
        if stored is not None:
            self._writer.quota_bytes = stored
            self._env.set_map(map_bytes_of(stored))

    def _stored_quota(self) -> int | None:
        with self._env.read() as txn:
            return unpack_quota(txn.get(QUOTA_KEY, db=self._databases.meta))

    def _warn_of_no_room(self) -> None:
        try:
            self._writer.require_room(0)
        except (CapacityError, StoreError) as exc:
            _logger.warning("%s", exc)

    def _require_writable(self) -> None:
        if self.read_only:
            raise StoreError(f"cold store {self.path} was opened read-only")
        if not self._env.is_open:
            raise StoreError(f"cold store {self.path} is closed")
