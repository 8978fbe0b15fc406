"""How much memory this process may still take: what the machine has left, and what its control groups allow.

A service's limit (systemd's MemoryMax, a container's --memory) stands in a control group, and every group above it may
have a lower one. Pages of files count as free: the kernel drops them before it ends a process. Source: the kernel's
documentation of cgroup v2 (memory.max, memory.high, memory.current, memory.stat) and v1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryRoom", "memory_room"]

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # v1 writes the largest number of pages where there is no limit


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Bytes of memory that are left, and what leaves no more: "this machine", or a control group and its setting."""

    free_bytes: int
    limited_by: str


def memory_room(*, proc: Path = _PROC, groups: Path = _GROUPS) -> MemoryRoom:
    """Return the smallest room of the machine and all control groups of this process, from its own up to the root."""
    return min(_rooms(proc, groups), key=lambda each: each.free_bytes)


def _rooms(proc: Path, groups: Path) -> Iterator[MemoryRoom]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield MemoryRoom(_numbers(proc / "meminfo")["MemAvailable:"] << 10, "this machine")
    for mount, group, limits, used in _hierarchies(proc, groups):
        for folder in (group, *group.parents):
            stat = _numbers(folder / "memory.stat")
            cached = sum(stat.get(name, 0) for name in _file_pages(stat))
            for limit in limits:
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    most = int((folder / limit).read_text())
                    left = most - max(0, int((folder / used).read_text()) - cached)
                    if most < _NO_LIMIT:
                        yield MemoryRoom(max(0, left), f"{limit} of control group /{folder.relative_to(mount)}")
            if folder == mount:
                break
    yield MemoryRoom(_NO_LIMIT, "nothing that is known")


def _hierarchies(proc: Path, groups: Path) -> Iterator[tuple[Path, Path, tuple[str, ...], str]]:
    """Yield mount, own group, names of the limits, and name of the use: of cgroup v2 and of v1 where it is."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    limits: tuple[str, ...]
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, limits, used = groups, ("memory.max", "memory.high"), "memory.current"
        elif "memory" in controllers.split(","):
            mount, limits, used = groups / "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        is_inside = ".." not in group.parts and group.is_dir()
        yield mount, group if is_inside else mount, limits, used  # in a container the path may be the host's


def _file_pages(stat: dict[str, int]) -> tuple[str, ...]:
    """Return the names of the counts of pages that belong to files; v1 has those of a whole tree by another name."""
    return (
        ("total_active_file", "total_inactive_file")
        if "total_active_file" in stat
        else (
            "active_file",
            "inactive_file",
        )
    )


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers behind the names of a file of lines."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[1].isdecimal():
                found[words[0]] = int(words[1])
    return found
