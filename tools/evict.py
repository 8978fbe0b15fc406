"""`tierkv evict`: remove blocks from a store, by size, namespace or age."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.tools.options import parse_size
from tierkv.tools.render import format_bytes
from tierkv.tools.stores import find_namespace, open_existing

__all__ = ["evict", "parse_age"]

_UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def evict(
    store_path: Path,
    *,
    to: str | None,
    namespace: str | None,
    older_than: str | None,
    as_json: bool,
) -> None:
    """Remove unpinned blocks, leaves first: those of a namespace and of an age, where given; then the least
    recently used until at most `to` bytes are live. Raises ConfigError if nothing is given, StoreError.
    """
    if to is None and namespace is None and older_than is None:
        raise ConfigError("nothing to evict: say --to SIZE, --namespace N or --older-than T")
    to_bytes = None if to is None else 0 if to.strip() == "0" else parse_size(to)
    older_than_s = None if older_than is None else parse_age(older_than)
    with open_existing(store_path, read_only=False) as store:
        digest = None if namespace is None else find_namespace(store, namespace).digest
        report = store.evict(to_bytes=to_bytes, namespace=digest, older_than_s=older_than_s)
        left = store.stats()
    if as_json:
        result = {"blocks_evicted": report.blocks, "bytes_freed": report.freed_bytes, "blocks_left": left.blocks}
        print(json.dumps({**result, "bytes_live": left.live_bytes}))
        return
    print(
        f"evicted {report.blocks} blocks, {format_bytes(report.freed_bytes)}; "
        f"{left.blocks} blocks, {format_bytes(left.live_bytes)}, are left"
        + (
            " (pinned blocks and what they continue stay)"
            if to_bytes is not None and left.live_bytes > to_bytes
            else ""
        )
    )


def parse_age(text: str) -> float:
    """Return the seconds of an age such as 90s, 30min, 12h, 7d or 2w. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in _UNITS_S:
        raise ConfigError(f"{text!r} is not an age: say 90s, 30min, 12h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]
