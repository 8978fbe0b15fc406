"""Nonsense on the socket is answered with an error and costs nobody else anything."""

from __future__ import annotations

import contextlib
import random
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import TIMEOUT_S, Start
from raw_client import NAMESPACE, chain_of, connect, hello, tokens_of, write_prompt

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.messages import (
    NO_SLOT,
    Abandon,
    Chain,
    Count,
    Done,
    Evict,
    Fetch,
    Fetched,
    Flush,
    Found,
    Hello,
    LoadState,
    Match,
    Message,
    Pin,
    Publish,
    Published,
    Release,
    Reserve,
    Reserved,
    SaveState,
    Status,
    StatusReport,
    Wait,
    Waited,
)
from tierkv.daemon.protocol import (
    HEADER,
    MAX_BODY_BYTES,
    PROTOCOL_VERSION,
    FrameReader,
    ProtocolError,
    frame,
    parse_body,
)
from tierkv.errors import DaemonError
from tierkv.values.block import hash_block
from tierkv.values.namespace import Namespace

TOKENS = tokens_of(16)


def numbers(*values: int) -> bytes:
    return array("I", values).tobytes()


@contextlib.contextmanager
def raw_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        yield connection


def assert_healthy(path: Path) -> None:
    """A decent client is served as ever, and nothing is lent to anybody."""
    with connect(path) as client:
        write_prompt(client, TOKENS)
        found = client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        assert len(found.slots) == 16
        client.post(Release(slots=found.slots))
        report = client.call(Status(), StatusReport)
        assert (report.leased_slots, report.reserved_slots) == (0, 0)


BAD = [
    Match(hashes=b"short", tokens=TOKENS),
    Match(hashes=chain_of(TOKENS), tokens=TOKENS[:-1]),
    Match(hashes=b"", tokens=TOKENS),
    Match(hashes=chain_of(TOKENS), tokens=TOKENS, start=5),
    Match(hashes=chain_of(TOKENS), tokens=TOKENS, start=-1),
    Fetch(cursor=77, first=0, count=1),
    Fetch(cursor=0, first=-1, count=1 << 62),
    Reserve(chains=[Chain(b"", b"", b"")]),
    Reserve(chains=[Chain(chain_of(TOKENS), TOKENS, numbers(4))]),
    Reserve(chains=[Chain(chain_of(TOKENS), TOKENS[:-4], numbers(0) + b"x")]),
    Publish(slots=numbers(0)),
    Publish(slots=numbers(NO_SLOT)),
    Publish(slots=b"123"),
    Release(slots=numbers(0)),
    Release(slots=numbers(1 << 31)),
    Abandon(slots=numbers(3)),
    Pin(hashes=b"x" * 15, tokens=TOKENS, pinned=True),
    SaveState(path="relative"),
    SaveState(path="/nowhere/at/all"),
    LoadState(path="/dev/null"),
    LoadState(path="/tmp/\0"),
    hello(),
    Done(),
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: type(message).__name__)
def test_a_bad_request_is_refused_and_the_next_one_served(start_daemon: Start, message: Message) -> None:
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as client:
        with pytest.raises(DaemonError) as refusal:
            client.call(message, Done)
        assert "gone" not in str(refusal.value)
        assert client.call(Flush(), Done)
    assert_healthy(daemon.socket)


def test_a_slot_that_is_leased_to_another_cannot_be_named(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as owner, connect(daemon.socket) as thief:
        write_prompt(owner, TOKENS)
        lent = owner.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found).slots
        other = tokens_of(16, start=50)
        chain = Chain(chain_of(other), other, numbers(0, 1, 2, 3))
        reserved = owner.call(Reserve(chains=[chain]), Reserved).chains[0].slots
        for message in (Release(slots=lent), Publish(slots=reserved), Abandon(slots=reserved), Publish(slots=lent)):
            with pytest.raises(DaemonError, match="by this connection"):
                thief.call(message, Done)
        assert owner.call(Publish(slots=reserved), Published).count == 4
        with pytest.raises(DaemonError, match="by this connection"):
            owner.call(Publish(slots=reserved), Published)
        owner.post(Release(slots=lent))
    assert_healthy(daemon.socket)


def test_requests_before_hello_and_by_a_client_without_namespace_are_refused(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with DaemonClient(daemon.socket) as nobody:
        assert nobody.descriptor is None, "who names no namespace gets no memory"
        for message in (Match(hashes=b"", tokens=b""), Evict(count=-1), Release(), Wait(block_hash=b"", timeout_ms=1)):
            with pytest.raises(DaemonError, match="Hello, with a namespace"):
                nobody.call(message, Done)
    with raw_socket(daemon.socket) as connection:
        connection.sendall(frame(Flush(), number=1, boot=0))
        assert b"has ended" in connection.recv(4096) and connection.recv(1) == b""


def test_a_message_for_an_earlier_daemon_ends_the_connection(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as client:
        client.boot += 1
        with pytest.raises(DaemonError, match=r"has ended|another daemon"):
            client.call(Flush(), Done)
        assert not client.is_alive
    assert_healthy(daemon.socket)


def test_an_endless_message_is_refused_before_it_is_read(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with raw_socket(daemon.socket) as connection:
        connection.sendall(HEADER.pack(MAX_BODY_BYTES + 1, PROTOCOL_VERSION, 1, 0))
        assert b"is longer than" in connection.recv(4096) and connection.recv(1) == b""
    assert_healthy(daemon.socket)


def test_who_breaks_the_stream_keeps_its_slots_until_it_ends(start_daemon: Start) -> None:
    """Nobody knows what it is copying: only its end makes them free."""
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as client:
        write_prompt(client, TOKENS)
        client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        client._socket.sendall(HEADER.pack(8, 99, 1, 0))
        client._socket.settimeout(TIMEOUT_S)
        assert b"version" in client._socket.recv(4096)
        with DaemonClient(daemon.socket) as observer:
            assert observer.call(Status(), StatusReport).leased_slots == 4
    assert_healthy(daemon.socket)


def test_tenants_never_meet(start_daemon: Start) -> None:
    """Another salt, another namespace: forged hashes of the other's blocks find nothing, and evict nothing."""
    daemon = start_daemon(store=False)
    stranger = Namespace(weights="raw", layout=NAMESPACE.layout, salt="stranger")
    with connect(daemon.socket) as owner, connect(daemon.socket, stranger) as spy:
        write_prompt(owner, TOKENS)
        assert spy.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found).slots == b""
        assert spy.call(Evict(count=-1), Count).count == 0
        chain = Chain(chain_of(TOKENS), TOKENS, numbers(0, 1, 2, 3))
        answer = spy.call(Reserve(chains=[chain]), Reserved).chains[0]
        assert answer.slots == b"" and answer.refusal == "collision"
        assert len(owner.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS), Found).slots) == 16
    assert_healthy(daemon.socket)


def test_a_forged_hash_is_a_miss_for_those_who_hash_rightly(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    honest = hash_block(NAMESPACE.digest, TOKENS[:16])
    with connect(daemon.socket) as forger, connect(daemon.socket) as client:
        evil = tokens_of(4, start=900)
        given = forger.call(Reserve(chains=[Chain(honest, evil, numbers(0))]), Reserved).chains[0]
        assert forger.call(Publish(slots=given.slots), Published).count == 1
        found = client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        assert found.slots == b"" and found.miss == "collision"


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_and_random_messages_leave_the_daemon_as_it_was(start_daemon: Start, seed: int) -> None:
    daemon = start_daemon(slots=32)
    dice = random.Random(seed)
    with connect(daemon.socket) as decent:
        for _ in range(60):
            with raw_socket(daemon.socket) as connection, contextlib.suppress(OSError):
                boot = 0
                if dice.random() < 0.7:
                    connection.sendall(frame(hello(), number=1, boot=0))
                    data = connection.recv(4096)
                    boot = HEADER.unpack_from(data)[3]
                for _ in range(dice.randrange(1, 8)):
                    connection.sendall(_nonsense(dice, boot))
            found = decent.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS), Found)
            assert len(found.slots) in (0, 16)
    assert_healthy(daemon.socket)
    assert daemon.process and daemon.process.poll() is None


def _nonsense(dice: random.Random, boot: int) -> bytes:
    """Return random bytes, a damaged message, or a whole one with random contents."""
    kind = dice.random()
    if kind < 0.2:
        return dice.randbytes(dice.randrange(1, 300))
    message = dice.choice([*BAD, Wait(block_hash=dice.randbytes(16), timeout_ms=dice.randrange(-5, 50)), _random(dice)])
    data = frame(message, number=dice.randrange(1 << 16), boot=boot)
    if kind < 0.5:
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(HEADER.size, len(data))] = dice.randrange(256)
    return bytes(data[: dice.randrange(1, len(data) + 1)]) if kind < 0.6 else bytes(data)


def _random(dice: random.Random) -> Message:
    tokens = dice.randbytes(4 * dice.randrange(0, 40))
    hashes = dice.randbytes(16 * (len(tokens) // 16))
    chosen = numbers(*(dice.randrange(10) for _ in range(3)))
    return dice.choice(
        [
            Match(hashes=hashes, tokens=tokens, lease=True, wants_claim=True),
            Reserve(chains=[Chain(hashes, tokens[: len(hashes)], chosen)]),
            Publish(slots=chosen),
            Release(slots=chosen, cursors=chosen),
            Fetch(cursor=dice.randrange(5), first=dice.randrange(5), count=dice.randrange(70)),
            Pin(hashes=hashes, tokens=tokens, pinned=dice.random() < 0.1),
            Hello(namespace=dice.randbytes(16), description=b"{}", block_bytes=dice.randrange(1 << 40)),
        ]
    )


def test_frames_are_read_whatever_pieces_they_come_in() -> None:
    messages = [
        Status(),
        Match(hashes=b"h" * 32, tokens=b"t" * 640),
        Waited(is_over=True),
        Fetched(slots=b"", miss="x"),
    ]
    stream = b"".join(frame(message, number=at, boot=5) for at, message in enumerate(messages))
    for size in (1, 3, 17, 1000, len(stream)):
        reader, seen = FrameReader(), []
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size])
            while (cut := reader.next()) is not None:
                seen.append((cut[0], cut[1], parse_body(cut[2])))
        assert seen == [(at, 5, message) for at, message in enumerate(messages)]


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", b"\x91\x63", b"\x92\x03\x01", b"\x81\xa1a\x01", b"\xff" * 40])
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        parse_body(body)
