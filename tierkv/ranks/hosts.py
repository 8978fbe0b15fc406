"""Which ranks share a machine, and which of them share a store."""

from __future__ import annotations

import platform
from pathlib import Path

from tierkv.ranks.group import RankGroup

__all__ = ["count_on_host", "host_name", "is_first_with", "place_of"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_name() -> str:
    """Return a name that only processes of this machine have, containers with names of their own included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def count_on_host(ranks: RankGroup) -> int:
    """Return how many ranks run on this machine, this one included. All ranks call this together."""
    names = ranks.gather(host_name().encode())
    return names.count(names[ranks.rank])


def place_of(path: Path) -> str:
    """Return a name for a folder or socket that two processes share only if it is the same one for both."""
    found = path.stat()
    return f"{host_name()} {found.st_dev} {found.st_ino}"


def is_first_with(ranks: RankGroup, place: str) -> bool:
    """Return whether no rank before this one has the same place. All ranks call this together."""
    return ranks.gather(place.encode()).index(place.encode()) == ranks.rank
