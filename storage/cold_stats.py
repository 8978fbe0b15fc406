"""Counters and sizes of the cold store."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from tierkv.errors import ConfigError
from tierkv.storage.cold_rows import NO_DESCRIPTION, NamespaceRow
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.block import BlockHash
from tierkv.values.namespace import parse_description

__all__ = ["ColdStats", "Counters", "StoredNamespace"]

_MAX_REMEMBERED = 65_536
_MAX_NESTING = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNamespace:
    """A namespace as the store knows it.

    description: its fields; empty if only its blocks are known, or if it is unreadable, and `problem` says why then.
    raw_description: the bytes that are stored.
    """

    digest: BlockHash
    description: dict[str, Any]
    raw_description: bytes
    problem: str | None
    created: float
    last_used: float
    blocks: int
    raw_bytes: int
    stored_bytes: int
    value_bytes: int

    @classmethod
    def of(cls, digest: BlockHash, row: NamespaceRow) -> StoredNamespace:
        """Return the public form of a row. Raises nothing, whatever the description is."""
        description, problem = _read_description(digest, row.description)
        return cls(
            digest=digest,
            description=description,
            raw_description=row.description,
            problem=problem,
            created=row.created,
            last_used=row.last_used,
            blocks=row.blocks,
            raw_bytes=row.raw_bytes,
            stored_bytes=row.stored_bytes,
            value_bytes=row.value_bytes,
        )


def _read_description(digest: BlockHash, text: bytes) -> tuple[dict[str, Any], str | None]:
    """Return a description's fields, or its problem. Another version or another program may have written it.

    The values can be shown and written as JSON: characters of a name that cannot be printed are escaped, NaN is a text.
    """
    if text == NO_DESCRIPTION:
        return {}, None
    try:
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
            fields = json.loads(text)
            name = fields["name"].encode(errors="backslashreplace").decode()
            if name != fields["name"]:
                text = json.dumps({**fields, "name": name}).encode()
        description = parse_description(text)
        if description.digest != digest:
            return {}, "its description is that of another namespace"
        if not _is_flat(description.fields):
            return {}, "its description is unreadable: it is nested too deeply"
        shown: dict[str, Any] = json.loads(text, parse_constant=str)
        shown["name"] = "".join(map(_printable, description.name))
    except ConfigError as exc:
        return {}, f"its description is unreadable: {exc}"
    return shown, None


def _printable(character: str) -> str:
    """Return a character, or its escape in Python: a terminal would obey some control characters."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _is_flat(value: object) -> bool:
    """Return whether JSON values are nested no deeper than every function here can follow."""
    level: list[Any] = [value]
    for _ in range(_MAX_NESTING):
        level = [each for parent in level for each in (parent.values() if isinstance(parent, dict) else parent)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStats:
    """Sizes now, all processes together; counters since this process opened the store.

    live_bytes: values with their padding, which the quota bounds. file_bytes: with LMDB's free pages.
    """

    blocks: int
    raw_bytes: int
    stored_bytes: int
    live_bytes: int
    file_bytes: int
    quota_bytes: int
    hits: int
    misses: dict[MissReason, int]
    puts: dict[PutOutcome, int]
    evicted_blocks: int
    evicted_bytes: int
    damaged_blocks: int


class Counters:
    """Counts of events since the store was opened, and the latest evicted blocks. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = 0
        self._misses: Counter[MissReason] = Counter()
        self._puts: Counter[PutOutcome] = Counter()
        self._evicted_blocks = 0
        self._evicted_bytes = 0
        self._damaged_blocks = 0
        self._evicted: OrderedDict[BlockHash, None] = OrderedDict()

    def count_read(self, reason: MissReason | None) -> None:
        """Count a hit (None) or a miss."""
        with self._lock:
            if reason is None:
                self._hits += 1
            else:
                self._misses[reason] += 1

    def count_puts(self, outcomes: Iterable[PutOutcome]) -> None:
        """Count the outcomes of records."""
        with self._lock:
            self._puts.update(outcomes)

    def count_evicted(self, block_hashes: Iterable[BlockHash], freed_bytes: int) -> None:
        """Count evicted blocks, and remember the latest of them."""
        with self._lock:
            for block_hash in block_hashes:
                self._evicted[block_hash] = None
                self._evicted_blocks += 1
            self._evicted_bytes += freed_bytes
            while len(self._evicted) > _MAX_REMEMBERED:
                self._evicted.popitem(last=False)

    def count_damaged(self, blocks: int) -> None:
        """Count blocks removed because they, or a block before them, were damaged."""
        with self._lock:
            self._damaged_blocks += blocks

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Return whether this process evicted the block not long ago."""
        return block_hash in self._evicted

    def stats(self, rows: Collection[NamespaceRow], *, file_bytes: int, quota_bytes: int) -> ColdStats:
        """Return everything as one value. rows: the totals of all namespaces."""
        with self._lock:
            return ColdStats(
                blocks=sum(row.blocks for row in rows),
                raw_bytes=sum(row.raw_bytes for row in rows),
                stored_bytes=sum(row.stored_bytes for row in rows),
                live_bytes=sum(row.value_bytes for row in rows),
                file_bytes=file_bytes,
                quota_bytes=quota_bytes,
                hits=self._hits,
                misses={reason: self._misses[reason] for reason in MissReason},
                puts={outcome: self._puts[outcome] for outcome in PutOutcome},
                evicted_blocks=self._evicted_blocks,
                evicted_bytes=self._evicted_bytes,
                damaged_blocks=self._damaged_blocks,
            )
