"""Servers of Redis' protocol that lie: every lie costs an error within the deadline, and no memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator

import pytest
from remote_servers import HostileServer, wait_until
from test_remote_redis import KEYS, SECRET, client_of, deadline

from tierkv.errors import RemoteError
from tierkv.remote_tiers.redis_wire import refusal


def endless(_: list[bytes]) -> Iterator[bytes]:
    yield b"$1000\r\n"
    while True:
        yield bytes(1 << 16)


LIES = {
    "another kind": lambda _: b":1\r\n",
    "an array": lambda _: b"*1\r\n$1\r\na\r\n",
    "a negative length": lambda _: b"$-2\r\n",
    "no number": lambda _: b"$abc\r\n",
    "a huge number": lambda _: b"$" + b"9" * 400 + b"\r\n",
    "a line without end": lambda _: b"$" + b"1" * 100_000,
    "longer than announced": lambda _: b"$5\r\n" + bytes(50) + b"\r\n",
    "shorter than announced": lambda _: b"$50\r\n" + bytes(5) + b"\r\n",
    "no end": endless,
    "nothing": lambda _: b"",
    "noise": lambda _: bytes(range(256)) * 20,
    "more than any record": lambda _: b"$1000000000000\r\n" + bytes(1000),
    "an error with a secret": lambda _: b"-ERR " + SECRET.encode() + b"\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_server_costs_an_error_within_the_deadline_and_no_memory(lie: str) -> None:
    pytest.importorskip("redis")
    server = HostileServer({b"GET": LIES[lie], b"EXISTS": lambda _: b":1\r\n"})
    client = client_of(server.url)
    client.ping(deadline())
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        client.read(KEYS[0], deadline(0.3), most_bytes=2000)
    assert time.monotonic() - begin < 3.0
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert SECRET not in str(caught.value)
    client.close()
    server.close()


GREEDY = {
    "a long text": b"$1000000000\r\n" + bytes(8 << 20),
    "a long list": b"*1000000000\r\n" + b":1\r\n" * (2 << 20),
    "a list of long lists": b"*1000\r\n" + (b"*1000\r\n" + b":1\r\n" * 1000) * 1000,
    "deep lists": b"*1\r\n" * (1 << 20),
    "a line without end": b"+" + b"a" * (8 << 20),
}


@pytest.mark.parametrize("lie", GREEDY)
@pytest.mark.parametrize(
    ("command", "url"),
    [
        (b"AUTH", "redis://:word@{}"),
        (b"SELECT", "redis://{}/3"),
        (b"CLUSTER", "redis://{}?cluster=true"),
        (b"SENTINEL", "redis://{}?sentinel=cache"),
    ],
)
def test_a_server_that_lies_while_it_is_connected_costs_no_memory(command: bytes, url: str, lie: str) -> None:
    """redis-py would take as much as the server sends, on a thread that nothing waits for any more."""
    pytest.importorskip("redis")
    server = HostileServer({command: lambda _: GREEDY[lie]})
    client = client_of(url.format(f"127.0.0.1:{server.port}"))
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(RemoteError):
        client.ping(deadline(0.5))
    assert time.monotonic() - begin < 5.0
    wait_until(lambda: not client._servers._threads.num_busy)  # type: ignore[attr-defined]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    client.close()
    server.close()
    assert peak < 4 << 20


@pytest.mark.parametrize("port", [b"0", b"-1", b"65536", b"9223372036854775808"])
@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_a_server_at_an_impossible_port_is_an_error(kind: str, port: bytes) -> None:
    pytest.importorskip("redis")
    node = b"*2\r\n$9\r\n127.0.0.1\r\n"
    slots = b"*1\r\n*3\r\n:0\r\n:16383\r\n" + node + b":" + port + b"\r\n"
    master = node + b"$%d\r\n%s\r\n" % (len(port), port)
    server = HostileServer({b"CLUSTER": lambda _: slots, b"SENTINEL": lambda _: master})
    client = client_of(f"redis://127.0.0.1:{server.port}?" + ("cluster=true" if kind == "cluster" else "sentinel=m"))
    with pytest.raises(RemoteError):
        client.ping(deadline(0.5))
    client.close()
    server.close()


def test_only_codes_that_redis_has_are_shown_and_counted() -> None:
    """Each code is a counter: a server must not make them without end."""
    assert refusal("OOM command not allowed").code == "OOM"
    assert refusal("NOPERM no permissions").code == "NOPERM"
    assert {refusal(f"{first}{second} x").code for first in "ABCDE" for second in "VWXYZ"} == {"ERR"}


def test_the_password_is_the_first_thing_that_is_sent() -> None:
    pytest.importorskip("redis")
    seen: list[list[bytes]] = []
    server = HostileServer({name: lambda words: seen.append(words) or b"+OK\r\n" for name in (b"AUTH", b"SELECT")})
    client = client_of(f"redis://user:{SECRET}@127.0.0.1:{server.port}/3")
    with pytest.raises(RemoteError):  # of the question itself
        client.ping(deadline(0.5))
    assert seen == [[b"AUTH", b"user", SECRET.encode()], [b"SELECT", b"3"]]
    client.close()
    server.close()


@pytest.mark.parametrize("answer", [b":2\r\n", b":-1\r\n", b"+OK\r\n", b"$1\r\n1\r\n", b":1 \r\n", b"\r\n"])
def test_a_count_that_cannot_be_is_an_error(answer: bytes) -> None:
    pytest.importorskip("redis")
    server = HostileServer({b"EXISTS": lambda _: answer})
    client = client_of(server.url)
    with pytest.raises(RemoteError):
        client.prefix(KEYS[:1], deadline(0.5))
    client.close()
    server.close()
