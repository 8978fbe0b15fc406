"""Request traces: one JSON object per line, the blocks of a prompt by number, as Mooncake publishes them."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.values.files import read_text

__all__ = ["Request", "Trace", "belady_hits", "read_trace"]

_NEVER = 1 << 62
_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. blocks: numbers of its blocks, the same for the same tokens after the same blocks."""

    time_s: float
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their times. Blocks are numbered from 0 to num_unique - 1, each with one parent."""

    name: str
    block_size: int
    requests: tuple[Request, ...]
    num_unique: int

    @property
    def num_blocks(self) -> int:
        """Blocks of all prompts, repeated ones each time."""
        return sum(len(request.blocks) for request in self.requests)

    def capacity(self, text: str) -> int:
        """Return the blocks meant by `4000` or by `10%` of the unique ones, rounded down. Raises ConfigError."""
        number, is_share = text.strip().removesuffix("%"), text.strip().endswith("%")
        try:
            blocks = int(float(number) * self.num_unique / 100 + 1e-9) if is_share else int(number)
        except (ValueError, OverflowError):
            blocks = 0
        if blocks <= 0 or (is_share and float(number) > 100):
            raise ConfigError(f"{text!r} is not a capacity: say 4000, for blocks, or 10%, of the unique ones")
        return blocks


def read_trace(path: Path, *, block_size: int = 512) -> Trace:
    """Return the trace in a file of JSON lines: `timestamp` in ms, `hash_ids`, and `input_length` if there.

    A number that appears after different blocks stands for different blocks: the prefix is what is cached.
    Raises ConfigError that names the line.
    """
    lines = read_text(path, limit_bytes=_LIMIT_BYTES).split("\n")  # JSON texts may contain other line ends
    numbers: dict[tuple[int, int], int] = {}
    requests = [
        _parse(line, f"{path}, line {at}", numbers, block_size)
        for at, line in enumerate(lines, 1)
        if line.strip(" \t\r")
    ]
    if not any(request.blocks for request in requests):
        raise ConfigError(f"{path} holds no request with blocks")
    requests.sort(key=lambda request: request.time_s)
    return Trace(path.name, block_size, tuple(requests), len(numbers))


def _parse(line: str, where: str, numbers: dict[tuple[int, int], int], block_size: int) -> Request:
    try:
        fields: Any = json.loads(line)
        ids, time_ms = fields["hash_ids"], float(fields.get("timestamp", 0))
        num_tokens = int(fields.get("input_length") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise ConfigError(f'{where}: not a request such as {{"timestamp": 0, "hash_ids": [1, 2]}}') from exc
    if not math.isfinite(time_ms):
        raise ConfigError(f"{where}: the timestamp must be a finite number")
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"{where}: hash_ids must be a list of integers")
    blocks: list[int] = []
    for number in ids:
        parent = blocks[-1] if blocks else -1
        blocks.append(numbers.setdefault((parent, number), len(numbers)))
    whole = len(blocks) * block_size
    return Request(time_ms / 1000, num_tokens if whole - block_size < num_tokens <= whole else whole, tuple(blocks))


def belady_hits(requests: Sequence[Request], capacity: int) -> int:
    """Return the most block hits that any policy can have, if it may also decline to keep a block.

    Belady's rule: evict the block that is needed furthest in the future. A block is needed no later than its
    children, so the rule keeps whole prefixes by itself. Source: Belady, "A study of replacement algorithms", 1966.
    """
    uses = [block for request in requests for block in request.blocks]
    next_use = [_NEVER] * len(uses)
    seen: dict[int, int] = {}
    for at in range(len(uses) - 1, -1, -1):
        next_use[at] = seen.get(uses[at], _NEVER)
        seen[uses[at]] = at
    cached: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hits = 0
    for at, block in enumerate(uses):
        hits += block in cached
        if next_use[at] == _NEVER:
            cached.pop(block, None)
            continue
        cached[block] = next_use[at]
        heapq.heappush(furthest, (-next_use[at], block))
        while len(cached) > capacity:
            negated, furthest_block = heapq.heappop(furthest)
            if cached.get(furthest_block) == -negated:
                del cached[furthest_block]
    return hits
