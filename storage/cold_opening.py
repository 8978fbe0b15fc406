"""What happens first with an open store: its version is checked, its quota is read, or both are written."""

from __future__ import annotations

import logging

from tierkv.storage.cold_rows import (
    FORMAT_KEY,
    QUOTA_KEY,
    STORE_VERSION,
    Databases,
    add_checksum,
    check_format,
    map_bytes_of,
    unpack_quota,
)
from tierkv.storage.cold_writer import ColdWriter
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.values.units import format_bytes

__all__ = ["adopt_format_and_quota"]

_logger = logging.getLogger(__name__)


def adopt_format_and_quota(env: LmdbEnv, writer: ColdWriter, wanted: int | None) -> None:
    """Refuse the store of another version, and use the stored quota; write both into a new store.

    A store that an older version made has no quota: it gets the wanted one, or its live bytes where those are more.
    """
    with env.read() as txn:
        meta = Databases(*env.handles).meta
        version = txn.get(FORMAT_KEY, db=meta)
        is_new = version is None
        if version is not None:
            check_format(bytes(version))
        quota_bytes = unpack_quota(txn.get(QUOTA_KEY, db=meta))
    if not env.read_only and (is_new or quota_bytes is None):
        with writer.batch() as batch:
            if is_new:
                batch.txn.put(FORMAT_KEY, add_checksum(STORE_VERSION), db=batch.databases.meta)
            if quota_bytes is None:
                quota_bytes = max(writer.quota_bytes, batch.live_bytes)
                batch.set_quota(quota_bytes)
    elif quota_bytes is not None and wanted not in (None, quota_bytes):
        _logger.warning(
            "cold store %s has a quota of %s, which stays: %s were asked for (tierkv quota SIZE sets another)",
            env.path,
            format_bytes(quota_bytes),
            format_bytes(wanted or 0),
        )
    if quota_bytes is not None:
        writer.quota_bytes = quota_bytes
        env.set_map(map_bytes_of(quota_bytes))
