"""`tierkv quota`: how large a store may become, for everybody who uses it."""

from __future__ import annotations

import json
from pathlib import Path

from tierkv.storage.cold_eviction import EvictionReport
from tierkv.tools.options import parse_size
from tierkv.tools.render import format_bytes
from tierkv.tools.stores import open_existing

__all__ = ["quota"]


def quota(store_path: Path, *, size: str | None, evict: bool, as_json: bool) -> None:
    """Print the quota of a store and how much of it is used; set it first where a size is given.

    Raises CapacityError, which says what would go, for a size that is less than what the store holds, unless `evict`;
    ConfigError for what is no size, StoreError.
    """
    quota_bytes = None if size is None else parse_size(size)
    report = EvictionReport(blocks=0, freed_bytes=0)
    with open_existing(store_path, read_only=quota_bytes is None) as store:
        if quota_bytes is not None:
            report = store.set_quota(quota_bytes, evict=evict)
            store.flush()
        sizes = store.stats()
    if as_json:
        result = {"quota_bytes": sizes.quota_bytes, "bytes_live": sizes.live_bytes, "blocks": sizes.blocks}
        print(json.dumps({**result, "blocks_evicted": report.blocks, "bytes_freed": report.freed_bytes}))
        return
    if report.blocks:
        print(f"evicted {report.blocks:,} blocks, {format_bytes(report.freed_bytes)}")
    is_over = sizes.live_bytes > sizes.quota_bytes
    print(
        f"quota {format_bytes(sizes.quota_bytes)}, of which {sizes.blocks:,} blocks take "
        f"{format_bytes(sizes.live_bytes)}" + (" (pinned blocks and what they continue stay)" if is_over else "")
    )
