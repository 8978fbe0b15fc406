"""The control plane with a million blocks: bytes a block, and what matching, acquiring and releasing cost.

Each figure stands beside its limit and beside a plain dict, which does less (no tree, no policy) and so is a lower
bound. Bytes of token ids are counted apart: they are needed to tell a hit from a collision, whatever the table.
Times are wall time of one thread, each request a different one from all over the table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from benchmarks.index_requests import Times, time_cache, time_table
from benchmarks.index_tables import BLOCK_SIZE, DictTable, IndexTable, Prompts, peers
from tierkv import __version__
from tierkv.index.index import Index
from tierkv.policies import DEFAULT_POLICY
from tierkv.values.block import TOKEN_BYTES, Tier, hash_block

__all__ = ["main"]

_STEP = BLOCK_SIZE * TOKEN_BYTES
_LIMIT_BYTES = 400
_LIMIT_MATCH_US = 150
_LIMIT_ACQUIRE_US = 300
_LIMIT_COMMIT_US = 500
_SHAPES = {
    "sessions": "sessions; all blocks warm, a quarter also hot",
    "sessions, both": "sessions; all blocks hot and warm, each used at a time of its own",
    "long": "chains of 128 blocks, hot",
    "single": "chains of one block, hot: all of them in the eviction order",
    "dict": "plain dict: chains of 128 blocks",
}


def main() -> None:
    """Run everything and print two tables; `--out FILE` keeps them."""
    parser = argparse.ArgumentParser(prog="benchmarks.index", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks in the index")
    parser.add_argument("--requests", type=int, default=400, help="requests of each kind")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--memory", choices=_SHAPES, help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory, arguments.blocks, traced=arguments.traced)))
        return
    console = Console(record=True, width=118)
    console.print(_machine(arguments.blocks), highlight=False)
    console.print(_memory_table(arguments.blocks))
    notes: list[str] = []
    console.print(_time_table(arguments.blocks, arguments.requests, notes))
    notes.append(f"load average of the machine when this ended: {os.getloadavg()[1]:.1f}; CPU time leaves others out")
    for note in notes:
        console.print(note, highlight=False)
    if arguments.out:
        arguments.out.write_text("\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes a block beside its token ids."""

    num_blocks: int
    bytes_each: float


def measure_memory(shape: str, num_blocks: int, *, traced: bool) -> dict[str, float]:
    """Fill a table in this process. Return how many blocks it has and its bytes a block beside the token ids.

    traced: count what Python asked for; otherwise what the process grew by, the allocators' rounding included.
    """
    prompts = Prompts()
    gc.collect()
    before = _resident_bytes()
    if traced:
        tracemalloc.start()
    table: DictTable | Index
    if shape == "dict":
        table = _filled_dict(prompts, num_blocks)
        count = len(table.blocks)
    else:
        table = _filled_index(prompts, shape, num_blocks)
        count = len(table)
    gc.collect()
    total = tracemalloc.get_traced_memory()[0] if traced else _resident_bytes() - before
    return {"num_blocks": count, "bytes_each": total / count - _STEP}


def _filled_index(prompts: Prompts, shape: str, num_blocks: int) -> Index:
    """Return an index of that many blocks; the pools are no larger than what lies in them."""
    kind, _, is_both = shape.partition(", ")
    is_warm = kind == "sessions"
    num_hot = num_blocks // 4 if is_warm and not is_both else num_blocks
    index = IndexTable(num_hot, num_blocks if is_warm else 1).index
    tiers = (Tier.WARM, Tier.HOT) if is_warm else (Tier.HOT,)
    for prompt in prompts.iter_chains(kind):
        if len(index) == num_blocks:
            break
        _store(index, prompt, tiers, num_blocks - len(index))
    if is_both:
        for entry in index:
            index.touch(entry)
    return index


def _store(index: Index, prompt: bytes, tiers: Sequence[Tier], count: int) -> None:
    """Put up to `count` blocks of a prompt, those that are new, into the tiers that have room."""
    known = index.walk(prompt, BLOCK_SIZE)
    parent = known[-1].block_hash if known else index.root
    end = min(len(prompt), (len(known) + count) * _STEP)
    slots: dict[Tier, list[int]] = {tier: [] for tier in tiers}
    for start in range(len(known) * _STEP, end, _STEP):
        tokens = prompt[start : start + _STEP]
        parent_hash, parent = parent, hash_block(parent, tokens)
        entry = index.insert(parent, parent_hash, tokens)
        assert entry
        if Tier.WARM in tiers:
            index.content_digest_of(entry)  # what is written down has a content digest, of which some are kept
        for tier in tiers:
            if index.pool(tier).free_count:
                (slot,) = index.pool(tier).allocate(1)
                index.attach(entry, tier, slot)
                slots[tier].append(slot)
    for tier in tiers:
        index.unpin_all(tier, slots[tier])


def _filled_dict(prompts: Prompts, num_blocks: int) -> DictTable:
    table = DictTable(num_blocks)
    for prompt in islice(prompts.iter_chains("long"), num_blocks // 128):
        request = table.acquire(prompt)
        table.commit(request)
        table.release(request)
    return table


def _resident_bytes() -> int:
    """Return what this process has in memory, after the allocator gave back what is free."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _in_child(shape: str, num_blocks: int, *, traced: bool) -> Memory:
    """Measure in a process of its own: nothing is left there from an earlier table."""
    command = [sys.executable, "-m", "benchmarks.index", "--memory", shape, "--blocks", str(num_blocks)]
    done = subprocess.run([*command, *(["--traced"] if traced else [])], check=True, capture_output=True, text=True)
    return Memory(**json.loads(done.stdout))


def _memory_table(num_blocks: int) -> Table:
    table = Table(title="bytes a block, beside the token ids", title_justify="left")
    table.add_column("shape")
    for column in ("blocks", "asked for", "resident", "limit", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for shape, name in _SHAPES.items():
        traced = _in_child(shape, num_blocks, traced=True)
        resident = _in_child(shape, num_blocks, traced=False)
        limit = ["", ""]
        if shape != "dict":
            limit = [f"< {_LIMIT_BYTES}", "yes" if resident.bytes_each < _LIMIT_BYTES else "no"]
        table.add_row(
            name, f"{resident.num_blocks:,}", f"{traced.bytes_each:.0f}", f"{resident.bytes_each:.0f}", *limit
        )
    table.add_row(f"token ids, {BLOCK_SIZE} x 4 bytes, counted apart", "", f"{_STEP:,}", f"{_STEP:,}", "", "")
    return table


def _time_table(num_blocks: int, num_requests: int, notes: list[str]) -> Table:
    """Return the table of times; what could not be measured, and what else was seen, goes to the notes."""
    table = Table(title="microseconds for a prompt of 128 blocks (32,768 tokens)", title_justify="left")
    table.add_column("operation")
    for column in ("median", "limit", "met", "plain dict", "p99", "p99, CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    before_s = _full_collection_s()
    filled = IndexTable(num_blocks)
    ours = {f"index, {DEFAULT_POLICY}": time_table(filled, num_blocks, num_requests)}
    notes.append(
        f"CPU time of a full garbage collection of Python's: {_full_collection_s() * 1e3:.0f} ms with that index, "
        f"{before_s * 1e3:.0f} ms before it was filled"
    )
    del filled
    ours["index, lru"] = time_table(IndexTable(num_blocks, policy="lru"), num_blocks, num_requests)
    bound = time_table(DictTable(num_blocks), num_blocks, num_requests)
    for name, rows in ours.items():
        for operation, times in rows.items():
            _add_times(table, f"{name}: {operation}", times, bound[operation])
    for name, peer in peers(num_blocks):
        if isinstance(peer, str):
            notes.append(f"{name}: {peer}")
            continue
        for operation, times in time_table(peer, num_blocks, num_requests).items():
            _add_times(table, f"{name}: {operation}", times, None)
    for name, times in time_cache(num_requests).items():
        _add_times(table, f"TierCache: {name}", times, None)
    return table


def _full_collection_s() -> float:
    """Return the CPU time of a full garbage collection, the least of three."""
    times: list[float] = []
    for _ in range(3):
        start = time.thread_time()
        gc.collect()
        times.append(time.thread_time() - start)
    return min(times)


def _add_times(table: Table, name: str, times: Times, bound: Times | None) -> None:
    limit = _LIMIT_MATCH_US if ": match" in name else _LIMIT_ACQUIRE_US if "acquire + release" in name else None
    if name == "TierCache: commit of 128":
        limit = _LIMIT_COMMIT_US
    met = "" if limit is None else "yes" if times.median_us < limit else "no"
    table.add_row(
        name,
        f"{times.median_us:.0f}",
        f"< {limit}" if limit else "",
        met,
        f"{bound.median_us:.0f}" if bound else "",
        f"{times.p99_us:.0f}",
        f"{times.cpu_p99_us:.0f}",
    )


def _machine(num_blocks: int) -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return (
        f"tierkv {__version__}; {os.cpu_count()} cores of {cpu}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, xxhash {xxhash.VERSION}; {num_blocks:,} blocks of {BLOCK_SIZE} tokens"
    )


if __name__ == "__main__":
    main()
