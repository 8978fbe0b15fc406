"""Rows that an engine names by digests: a block store, and the rules that its secondary tiers need.

vLLM's offloading and SGLang's HiCache keep opaque rows of one size, page or chunk, in CPU memory of their own. They ask
for rows one by one or in batches, in threads of their own, and want an answer for each.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.placement import Placement
from tierkv.block_store.store import BlockStore
from tierkv.errors import ClosedError, ConfigError, StoreError
from tierkv.values.namespace import Namespace

__all__ = ["DigestRows", "RowCounts", "Slice", "store_config"]

_log = logging.getLogger(__name__)

_LEAST_ROWS = 32
_STORE_OPTIONS = {field.name for field in fields(BlockStoreConfig)} - {"cold_path"}

Slice = Callable[[int, int], Placement]
"""Returns the places of the rows from one position to another."""


@dataclass(slots=True)
class RowCounts:
    """Rows since the store was opened. refused: keys that are no digest of 32 bytes or more."""

    loaded: int = 0
    not_loaded: int = 0
    saved: int = 0
    not_saved: int = 0
    refused: int = 0


def store_config(options: Mapping[str, Any], *, row_bytes: int) -> BlockStoreConfig:
    """Return the configuration of the store from an engine's JSON options: `path` and the options of BlockStoreConfig.

    warm_bytes is raised to hold a few rows: rows pass through it, and the engine has a CPU tier of its own.
    Raises ConfigError without a path and for unknown options.
    """
    options = dict(options)
    path = options.pop("path", None)
    if not isinstance(path, str) or not path:
        raise ConfigError("the option path is missing: the directory of the store on disk")
    unknown = options.keys() - _STORE_OPTIONS
    if unknown:
        known = ", ".join(sorted({"path", *_STORE_OPTIONS}))
        raise ConfigError(f"unknown options: {', '.join(sorted(unknown))}", hint=f"the store's options are {known}")
    if str(options.get("codec", "")).startswith("lossy"):
        raise ConfigError("a lossy codec rounds numbers of K and V, and a row is bytes of an unknown order")
    warm_bytes = options.pop("warm_bytes", 256 << 20)
    if isinstance(warm_bytes, int) and not isinstance(warm_bytes, bool):
        warm_bytes = max(warm_bytes, _LEAST_ROWS * row_bytes)
    return BlockStoreConfig(cold_path=path, warm_bytes=warm_bytes, **options)  # type: ignore[arg-type]


class DigestRows:
    """The rows of one engine. Thread-safe. Every method answers "no" once the store is closed, and never raises.

    config: of the store. namespace: from `digest_namespace`. counts: what became of rows so far.
    """

    def __init__(self, config: BlockStoreConfig, namespace: Namespace) -> None:
        self.store: BlockStore = BlockStore(config, namespace=namespace)
        self.row_bytes: int = self.store.layout.block_bytes
        self.counts: RowCounts = RowCounts()
        self._lock = threading.Lock()

    def key(self, digest: bytes, group: int = 0) -> BlockKey | None:
        """Return the key of a row; None for what is no cryptographic digest, which is counted and logged once."""
        try:
            return self.store.key_of_digest(digest, group)
        except ConfigError as exc:
            if not self.counts.refused:
                _log.warning("a row is neither kept nor found: %s", exc)
            self._count(refused=1)
            return None

    def count(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading rows are there."""
        try:
            return self.store.contains(keys)
        except ClosedError:
            return 0

    def found(self, keys: Sequence[BlockKey | None]) -> list[bool]:
        """Return for each row whether it is there. Reads none of them."""
        answers: list[bool] = []
        while len(answers) < len(keys):
            run: list[BlockKey] = []
            for key in keys[len(answers) :]:
                if key is None:
                    break
                run.append(key)
            num_found = self.count(run) if run else 0
            answers += [True] * num_found
            if len(answers) < len(keys):
                answers.append(False)  # the row that ended the run
        return answers

    def load(self, keys: Sequence[BlockKey], places: Slice, *, stop_at_gap: bool = False) -> list[bool]:
        """Copy rows to their places and wait. Return for each whether it came: verified bytes, or an untouched place.

        stop_at_gap: rows after the first that did not come are not asked for.
        """
        came = [False] * len(keys)
        at = 0
        while at < len(keys):
            num_loaded = self._load_run(keys[at:], lambda end, at=at: places(at, at + end))  # type: ignore[misc]
            came[at : at + num_loaded] = [True] * num_loaded
            at += num_loaded + 1
            if stop_at_gap:
                break
        num_loaded = sum(came)
        self._count(loaded=num_loaded, not_loaded=len(keys) - num_loaded)
        return came

    def save(self, keys: Sequence[BlockKey], places: Slice) -> list[bool]:
        """Copy rows into the store and wait for the copies, not for the disk. Return for each whether it is there.

        Where the warm memory has no room, waits until rows before it lie on the disk.
        """
        kept = 0
        try:
            while kept < len(keys):
                self.store.save(keys[kept:], places(kept, len(keys))).synchronize()
                now = kept + self.store.contains(keys[kept:])
                if now < len(keys):
                    self.store.flush()
                    now = kept + self.store.contains(keys[kept:])
                if now == kept:
                    break
                kept = now
        except (ClosedError, StoreError) as exc:
            _log.warning("%d rows were not saved: %s", len(keys) - kept, exc)
        self._count(saved=kept, not_saved=len(keys) - kept)
        return [at < kept for at in range(len(keys))]

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Record a use of rows, so that they are evicted later."""
        try:
            self.store.touch(keys)
        except (ClosedError, StoreError):
            pass  # a use that is not recorded costs an earlier eviction at most

    def clear(self) -> int:
        """Evict all rows of the namespace. Return how many went. Raises StoreError, ClosedError."""
        return self.store.clear()

    def close(self) -> None:
        """Write what was saved and close the store. May be called twice."""
        self.store.close()

    def _load_run(self, keys: Sequence[BlockKey], places: Callable[[int], Placement]) -> int:
        try:
            reservation = self.store.reserve(keys)
            count = reservation.num_blocks
            if not count:
                reservation.release()
                return 0
            load = self.store.load(reservation, places(count))
            load.synchronize()
            return load.num_loaded
        except (ClosedError, StoreError) as exc:
            _log.warning("%d rows were not loaded: %s", len(keys), exc)
            return 0

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + count)
