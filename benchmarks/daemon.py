"""What the daemon costs: round trips at 1, 8 and 32 clients, read bandwidth beside a memcpy, and Redis beside both.

Every client is a process. Redis is used as users do it today: one value a block, MGET, values copied out of the socket;
it is skipped where there is no `redis-server`. Ratios are of what the same run measured, so they carry over.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.redis_server import Resp, redis_server, wait_for
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.messages import (
    Chain,
    Hello,
    Match,
    Publish,
    Published,
    Reserve,
    Reserved,
    Status,
    StatusReport,
)
from tierkv.daemon.protocol import split_numbers
from tierkv.daemon.server import serve
from tierkv.storage.warm import Slab
from tierkv.transfer.daemon_connection import DaemonConnection
from tierkv.values.block import BlockHash, iter_chain
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

_PREFIX_BLOCKS = 32
_BLOCK_TOKENS = 256
_LAYOUT = BlockLayout.uniform(num_layers=8, block_size=_BLOCK_TOKENS, kv_heads=4, head_dim=64, dtype="bfloat16")
_LARGE_LAYOUT = BlockLayout.uniform(num_layers=32, block_size=_BLOCK_TOKENS, kv_heads=8, head_dim=64, dtype="bfloat16")
_ROUND_TRIPS = 2000
_READ_ROUNDS = 40
_CLIENTS = (1, 8, 32)
_TOKENS = np.arange(_PREFIX_BLOCKS * _BLOCK_TOKENS, dtype="<u4").tobytes()

Block = npt.NDArray[np.uint8]
_Connection: TypeAlias = "DaemonConnection[_NoCopies]"


@dataclass(slots=True)
class _Times:
    """Seconds of each round: of reading, and of memcpys of as much memory, by whose it is."""

    read: list[float] = field(default_factory=list)
    copies: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def main() -> None:
    """Run everything and print it; with a path, write it there too."""
    parser = argparse.ArgumentParser(prog="benchmarks.daemon", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="a file for the result as well")
    out = parser.parse_args().out
    lines = list(_report())
    if out:
        out.write_text("\n".join(lines) + "\n")


def _report() -> Iterator[str]:
    for line in itertools.chain(_machine(), _daemon_part(), _redis_part()):
        print(line, flush=True)
        yield line


def _machine() -> Iterator[str]:
    yield f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}"
    yield (
        f"prefix of {_PREFIX_BLOCKS} blocks of {_BLOCK_TOKENS} tokens; a block is "
        f"{_LAYOUT.block_bytes / 2**20:.1f} MiB, the prefix {_PREFIX_BLOCKS * _LAYOUT.block_bytes >> 20} MiB"
    )


# -- the daemon ------------------------------------------------------------------------------------------


def _daemon_part() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tkb") as folder, _daemon(Path(folder) / "d.sock", _LAYOUT) as path:
        yield ""
        yield "tierkv daemon: match and lease, in us (with hashing; released each time; the first asks the daemon)"
        for count in _CLIENTS:
            yield _latency_line(count, _times(count, _match_forever, path))
        yield ""
        with _connection(path, _LAYOUT) as connection:
            yield from _bandwidth_lines("tierkv daemon", _read_times(connection, _LAYOUT), _LAYOUT)
        with _connect(path, _LAYOUT) as client:
            report = client.call(Status(), StatusReport)
        yield f"{'bytes on the socket, all of the above':>44}: {report.bytes_received >> 20} MiB in, none of a block"
    with tempfile.TemporaryDirectory(prefix="tkb") as folder, _daemon(Path(folder) / "d.sock", _LARGE_LAYOUT) as path:
        yield f"the same with blocks of {_LARGE_LAYOUT.block_bytes >> 20} MiB: a prefix costs its round trip once"
        with _connection(path, _LARGE_LAYOUT) as connection:
            yield from _bandwidth_lines("tierkv daemon", _read_times(connection, _LARGE_LAYOUT), _LARGE_LAYOUT)


@contextmanager
def _daemon(path: Path, layout: BlockLayout) -> Iterator[Path]:
    """Run a daemon that has the prefix."""
    warm_bytes = 4 * _PREFIX_BLOCKS * layout.block_bytes
    config = DaemonConfig(socket=path, store=None, warm_bytes=warm_bytes, cold_bytes=1)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(config,), daemon=True)
    process.start()
    try:
        wait_for(lambda: _connect(path, layout).close())
        with _connect(path, layout) as client:
            _fill(client, layout)
        yield path
    finally:
        process.terminate()
        process.join()


def _connect(path: Path, layout: BlockLayout) -> DaemonClient:
    namespace = Namespace(weights="bench", layout=layout)
    hello = Hello(
        namespace=namespace.digest, description=namespace.describe(), block_bytes=layout.block_bytes, client="bench"
    )
    return DaemonClient(path, hello)


def _hashes(layout: BlockLayout) -> bytes:
    root = _root_of(layout)
    return b"".join([block_hash for block_hash, _ in iter_chain(root, _TOKENS, _BLOCK_TOKENS)])


@cache
def _root_of(layout: BlockLayout) -> BlockHash:
    return Namespace(weights="bench", layout=layout).digest


def _fill(client: DaemonClient, layout: BlockLayout) -> None:
    chain = Chain(_hashes(layout), _TOKENS, array("I", range(_PREFIX_BLOCKS)).tobytes())
    given = client.call(Reserve(chains=[chain]), Reserved).chains[0]
    slab = Slab.attach(client.take_descriptor(), client.welcome.slab_bytes)
    for number, slot in enumerate(split_numbers(given.slots)):
        slab.slots(layout.block_bytes)[slot] = number
    slab.close()
    assert client.call(Publish(slots=given.slots), Published).count == _PREFIX_BLOCKS


def _match_forever(path: Path, rounds: int) -> list[float]:
    times: list[float] = []
    with _connection(path, _LAYOUT) as connection:
        for _ in range(rounds):
            start = time.perf_counter()
            slots = _lease_prefix(connection, _LAYOUT)
            times.append(time.perf_counter() - start)
            _return(connection, slots)
            _let_it_work()
    return times


@contextmanager
def _connection(path: Path, layout: BlockLayout) -> Iterator[_Connection]:
    """Connect as a cache does, and map the slab."""
    connection = DaemonConnection(
        _connect(path, layout), layout.block_bytes, open_mover=lambda _: _NoCopies(), lost=lambda *_: None
    )
    try:
        yield connection
    finally:
        connection.retire(is_idle=True)


class _NoCopies:
    """Stands for what copies to a GPU."""

    def close(self) -> None:
        """Nothing to wait for."""


def _lease_prefix(connection: _Connection, layout: BlockLayout) -> array[int]:
    found = connection.match(Match(hashes=_hashes(layout), tokens=_TOKENS, lease=True))
    slots = split_numbers(found.slots)
    connection.lease(slots)
    assert len(slots) == _PREFIX_BLOCKS
    return slots


def _return(connection: _Connection, slots: array[int]) -> None:
    connection.return_leases(slots)
    connection.send_returned()


def _read_times(connection: _Connection, layout: BlockLayout) -> _Times:
    """Return how long it takes to bring the prefix into this process's own memory."""
    places = _lease_prefix(connection, layout)
    assert list(places) == list(range(places[0], places[0] + _PREFIX_BLOCKS)), (
        "a memcpy of the same bytes needs them in a row"
    )
    same = connection.slots[places[0] : places[0] + _PREFIX_BLOCKS]
    _return(connection, places)
    return _alternate(partial(_read_prefix, connection, layout), layout, {"the same bytes": same})


def _read_prefix(connection: _Connection, layout: BlockLayout, target: Block) -> None:
    places, slots = _lease_prefix(connection, layout), connection.slots
    for number, slot in enumerate(places):
        target[number] = slots[slot]
    _return(connection, places)


# -- Redis -----------------------------------------------------------------------------------------------


def _redis_part() -> Iterator[str]:
    yield ""
    server = shutil.which("redis-server")
    if server is None:
        yield "Redis: skipped, there is no redis-server here"
        return
    with redis_server(server) as port:
        _redis_fill(port)
        yield "Redis on loopback: does the prefix exist, round trip in us (EXISTS of all keys; it leases nothing)"
        for count in _CLIENTS:
            yield _latency_line(count, _times(count, _exists_forever, port))
        yield ""
        yield from _bandwidth_lines("Redis on loopback", _redis_read_times(port), _LAYOUT)


def _keys() -> list[bytes]:
    return [b"kv:" + h.hex().encode() for h, _ in iter_chain(_root_of(_LAYOUT), _TOKENS, _BLOCK_TOKENS)]


def _redis_fill(port: int) -> None:
    client = Resp(port)
    for number, key in enumerate(_keys()):
        client.send(b"SET", key, bytes([number]) * _LAYOUT.block_bytes)
        assert client.line() == b"+OK"
    client.close()


def _exists_forever(port: int, rounds: int) -> list[float]:
    client = Resp(port)
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        client.send(b"EXISTS", *_keys())
        assert client.line() == b":%d" % _PREFIX_BLOCKS
        times.append(time.perf_counter() - start)
        _let_it_work()
    client.close()
    return times


def _redis_read_times(port: int) -> _Times:
    client = Resp(port)
    times = _alternate(partial(_redis_read_prefix, client), _LAYOUT, {})
    client.close()
    return times


def _redis_read_prefix(client: Resp, target: Block) -> None:
    client.send(b"MGET", *_keys())
    assert client.line() == b"*%d" % _PREFIX_BLOCKS
    for number in range(_PREFIX_BLOCKS):
        client.value_into(target[number])


# -- what both have in common ----------------------------------------------------------------------------


def _let_it_work() -> None:
    """Stand for the request itself: without it the server would be asked by all clients all the time."""
    time.sleep(0.0005)


def _times(count: int, work: Callable[[Any, int], list[float]], where: Any) -> list[float]:
    """Run `count` client processes at once and return the times of all their round trips."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    rounds = max(_ROUND_TRIPS // count, 200)
    processes = [context.Process(target=_client, args=(work, where, rounds, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    times = [each for _ in processes for each in results.get(timeout=120)]
    for process in processes:
        process.join()
    return times


def _client(
    work: Callable[[Any, int], list[float]], where: Any, rounds: int, barrier: Barrier, results: Queue[list[float]]
) -> None:
    work(where, 20)
    barrier.wait(60)
    results.put(work(where, rounds))


def _latency_line(count: int, times: list[float]) -> str:
    p10, p50, p99 = np.percentile(np.array(times) * 1e6, [10, 50, 99])
    who = f"{count:>3} client{'s' if count > 1 else ' '}"
    return f"{who}  p10 {p10:8.1f}   p50 {p50:8.1f}   p99 {p99:8.1f}   ({len(times)} round trips)"


def _alternate(read: Callable[[Block], None], layout: BlockLayout, others: Mapping[str, Block]) -> _Times:
    """Time a read of the prefix and memcpys of as much, in turns, so that all meet the same neighbours.

    others: more memory to copy from. How fast memory is copied depends on where its pages lie: by a tenth, as seen.
    """
    target = np.zeros((_PREFIX_BLOCKS, layout.block_bytes), dtype=np.uint8)
    private = np.ones_like(target)
    own = Slab(target.size)
    shared = own.slots(layout.block_bytes)
    shared[:] = 1
    times = _Times()
    for _ in range(_READ_ROUNDS):
        start = time.perf_counter()
        read(target)
        times.read.append(time.perf_counter() - start)
        assert all(target[number, 0] == number for number in range(_PREFIX_BLOCKS))
        for what, source in {**others, "shared memory (memfd)": shared, "private memory, huge pages": private}.items():
            start = time.perf_counter()
            target[:] = source
            times.copies[what].append(time.perf_counter() - start)
    del shared
    own.close()
    return times


def _bandwidth_lines(name: str, times: _Times, layout: BlockLayout) -> Iterator[str]:
    """The best of all rounds: what else runs on the machine slows down any of them."""
    size = _PREFIX_BLOCKS * layout.block_bytes
    read = min(times.read)
    yield f"{name + ', prefix into own memory':>44}: {size / read / 1e9:6.2f} GB/s"
    for what, each in times.copies.items():
        copy = min(each)
        yield f"{'memcpy of ' + what:>44}: {size / copy / 1e9:6.2f} GB/s, ratio {copy / read:.2f}"


if __name__ == "__main__":
    main()
