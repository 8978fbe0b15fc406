"""Connections: what comes over one is answered or ends it, and one that misbehaves costs the others nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from array import array
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from core_model import SLOT_BYTES, Client, as_bytes
from daemon_process import TIMEOUT_S, Start
from raw_client import NAMESPACE, chain_of, connect, hello, tokens_of, write_prompt
from test_life_and_death import eventually
from test_safety import assert_healthy, raw_socket

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.connection import ClientConnection
from tierkv.daemon.core import Core
from tierkv.daemon.host import connections_that_fit
from tierkv.daemon.limits import Limits
from tierkv.daemon.loader import Prefetcher
from tierkv.daemon.messages import (
    Abandon,
    Count,
    Done,
    EndClaim,
    Failure,
    Flush,
    Found,
    Hello,
    LoadState,
    Match,
    Message,
    Pin,
    Release,
    SaveState,
    Status,
    StatusReport,
    Wait,
    Waited,
)
from tierkv.daemon.protocol import HEADER, MAX_BODY_BYTES, PROTOCOL_VERSION, FrameReader, frame, parse_body
from tierkv.daemon.requests import Requests
from tierkv.daemon.values import Connection, FetchTask
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.tools import daemon as daemon_tool
from tierkv.tools.daemon_process import from_json, to_json
from tierkv.tools.logs import LogFormat
from tierkv.values.block import hash_block

TOKENS = tokens_of(16)


def held(report: StatusReport, name: str) -> int:
    return next(each.used for each in report.limits if each.name == name)


# --- one connection, without a process ---------------------------------------------------------------------------


class FakeTransport(asyncio.Transport):
    """A socket whose other end is this process."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs = socket.socketpair()
        self.sent = bytearray()
        self.is_reading = True
        self.is_closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.ours

    def write(self, data: Any) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self) -> None:
        assert not self.is_reading
        self.is_reading = True

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def answers(self) -> list[tuple[int, Message]]:
        reader, found = FrameReader(), []
        reader.feed(bytes(self.sent))
        while (cut := reader.next()) is not None:
            found.append((cut[0], parse_body(cut[2])))
        return found


class FakeHost:
    """Answers as the test says. Satisfies `Host`."""

    def __init__(self, answer: Callable[[Message], Any] = lambda message: Done(), **limits: Any) -> None:
        self.limits = Limits(**limits)
        self.core = Core(8 * SLOT_BYTES, clock=lambda: 0.0, limits=self.limits)
        self.boot, self.hello_s = 7, 5.0
        self.bytes_received = self.bytes_sent = self.incomplete_bytes = self.num_requests = 0
        self.clients: set[ClientConnection] = set()
        self.refusals: list[str] = []
        self._answer = answer

    def accept(self, client: ClientConnection, pid: int) -> None:
        assert pid == os.getpid()
        self.clients.add(client)

    def leave(self, client: ClientConnection) -> None:
        self.clients.discard(client)

    def unload_files(self, connection: Connection) -> None:
        assert connection.is_closed

    def answer(self, client: ClientConnection, message: Message) -> Any:
        return Count(count=0) if isinstance(message, Hello) else self._answer(message)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(work)

    @property
    def log_lines(self) -> Any:
        return self

    def refused(self, client: str, why: str, *, reason: str) -> None:
        self.refusals.append(why)

    def connect(self) -> tuple[ClientConnection, FakeTransport]:
        """Return a connection that has said hello."""
        client, transport = ClientConnection(self), FakeTransport()
        client.connection_made(transport)
        transport.ours.close()
        transport.theirs.close()
        client.data_received(bytes(frame(Hello(), number=1, boot=0)))
        assert transport.answers() == [(1, Count(count=0))]
        transport.sent.clear()
        return client, transport


def ask(message: Message, number: int = 2) -> bytes:
    return bytes(frame(message, number=number, boot=7))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def fails(message: Message) -> Message:
    raise ZeroDivisionError("a mistake of the daemon's own")


async def fails_later(message: Message) -> Message:
    await asyncio.sleep(0)
    return fails(message)


def cannot_be_sent(message: Message) -> Message:
    return Failure(message="\ud800", is_fatal=False)


@pytest.mark.parametrize("answer", [fails, fails_later, cannot_be_sent])
def test_a_mistake_of_the_daemon_is_told_to_the_client_and_the_next_request_served(answer: Any) -> None:
    async def go() -> None:
        host = FakeHost(lambda message: answer(message) if isinstance(message, Flush) else Done())
        client, transport = host.connect()
        client.data_received(ask(Flush(), 2) + ask(Status(), 3))
        await settled()
        said = dict(transport.answers())
        failure = said[2]
        assert isinstance(failure, Failure) and not failure.is_fatal
        assert "ZeroDivisionError" in failure.message or "cannot be sent" in failure.message
        assert said[3] == Done() and host.num_requests == client.num_requests == 0

    logging.disable(logging.ERROR)
    try:
        asyncio.run(go())
    finally:
        logging.disable(logging.NOTSET)


def test_a_message_without_an_answer_is_answered_if_it_has_a_number() -> None:
    async def go() -> None:
        client, transport = FakeHost(lambda message: None).connect()
        for number, message in enumerate((Release(), Abandon(slots=b""), EndClaim(claim=1)), 5):
            client.data_received(ask(message, number) + ask(message, 0))
        assert transport.answers() == [(5, Done()), (6, Done()), (7, Done())]

    asyncio.run(go())


def test_many_short_messages_let_the_others_have_their_turn() -> None:
    async def go() -> None:
        client, transport = FakeHost().connect()
        client.data_received(ask(Status()) * 200)
        assert len(transport.answers()) < 100 and not transport.is_reading, "what has come waits"
        await settled()
        assert len(transport.answers()) == 200 and transport.is_reading

    asyncio.run(go())


def test_messages_that_are_not_whole_are_bounded_in_time_and_in_bytes() -> None:
    async def go() -> None:
        host = FakeHost(message_s=0.001, incomplete_bytes=4000)
        first, first_transport = host.connect()
        first.data_received(ask(Match(hashes=b"", tokens=bytes(3000)))[:2500])
        assert host.incomplete_bytes == 2500
        second, second_transport = host.connect()
        second.data_received(ask(Match(hashes=b"", tokens=bytes(3000)))[:2500])
        assert [message for _, message in second_transport.answers()] == [
            Failure(message="too many incomplete messages", is_fatal=True)
        ]
        assert second_transport.is_closed and host.incomplete_bytes == 2500
        await asyncio.sleep(0.002)
        first.check_alive()
        ((_, failure),) = first_transport.answers()
        assert isinstance(failure, Failure) and "was not complete in 0.001 s" in failure.message
        assert first_transport.is_closed and host.incomplete_bytes == 0

    asyncio.run(go())


def test_a_message_that_comes_in_time_or_waits_for_its_turn_is_not_late() -> None:
    async def go() -> None:
        host = FakeHost(message_s=0.001)
        client, transport = host.connect()
        client.pause_writing()
        client.data_received(ask(Status())[:-1])
        await asyncio.sleep(0.002)
        client.check_alive()
        client.resume_writing()
        client.data_received(ask(Status())[-1:])
        await asyncio.sleep(0.002)
        client.check_alive()
        assert transport.answers() == [(2, Done())] and not transport.is_closed

    asyncio.run(go())


def test_requests_of_all_clients_have_a_limit_and_end_with_their_connections() -> None:
    async def never(message: Message) -> Message:
        await asyncio.sleep(1000)
        return Done()

    async def go() -> None:
        host = FakeHost(never, requests_of_client=3, requests=4)
        (first, one), (second, two) = host.connect(), host.connect()
        first.data_received(ask(Wait(block_hash=bytes(16), timeout_ms=1)) * 4)
        second.data_received(ask(Wait(block_hash=bytes(16), timeout_ms=1)) * 2)
        assert [type(message) for _, message in one.answers() + two.answers()] == [Failure, Failure]
        assert (first.num_requests, second.num_requests, host.num_requests) == (3, 1, 4)
        first.connection_lost(None)
        await settled()
        assert host.num_requests == 1
        second.data_received(ask(Wait(block_hash=bytes(16), timeout_ms=1)))
        second.connection_lost(None)  # one of them has not begun
        await settled()
        assert host.num_requests == 0 and not host.clients

    asyncio.run(go())


def test_slow_requests_of_one_client_leave_threads_to_the_others() -> None:
    running: list[int] = []
    most = [0]

    async def work(requests: Any, client: ClientConnection, message: Message) -> Message:
        running.append(client.host.boot)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0)
        running.pop()
        return Done()

    async def go() -> None:
        host = FakeHost(slow_requests_of_client=2)
        clients = [host.connect()[0] for _ in range(2)]
        in_turn = Requests._in_turn
        tasks = [in_turn(None, client, Flush(), work) for client in clients for _ in range(9)]  # type: ignore[arg-type]
        assert await asyncio.gather(*tasks) == [Done()] * 18
        assert most == [4], "two of each"
        client = clients[0]
        requests = Requests.__new__(Requests)
        client.connection.tenant = object()  # type: ignore[assignment]
        for message in (Flush(), Pin(hashes=b"", tokens=b"", pinned=True), SaveState(path=""), LoadState(path="")):
            answer = requests.answer(client, message)
            assert asyncio.iscoroutine(answer) and answer.__name__ == "_in_turn"
            answer.close()

    asyncio.run(go())


def test_a_long_message_leaves_no_memory_behind() -> None:
    reader = FrameReader()
    reader.feed(bytes(frame(Match(hashes=b"", tokens=bytes(1 << 20)), number=1, boot=7)))
    assert reader.num_bytes > 1 << 20 and reader.next() is not None and reader.next() is None
    assert reader.num_bytes == len(reader._buffer) == 0


def test_a_prompt_that_fails_does_not_end_the_prefetcher() -> None:
    class Loader:
        def __init__(self) -> None:
            self.num_loads = 0

        async def load(self, task: FetchTask) -> None:
            self.num_loads += 1
            if self.num_loads == 1:
                raise ZeroDivisionError

    async def go() -> None:
        core = Core(8 * SLOT_BYTES, clock=lambda: 0.0, limits=Limits(prompts=2, prompt_bytes_of_namespace=1500))
        client, loader = Client(core, {}, b"n" * 16, hash_block), Loader()
        tenant = client.connection.require_tenant()
        prefetcher = Prefetcher(core, loader)  # type: ignore[arg-type]
        assert not prefetcher.submit(tenant, bytes(16), bytes(1000)), "of one namespace that is too much"
        for is_taken in (True, True, False):
            assert prefetcher.submit(tenant, bytes(16), as_bytes([1, 2])) is is_taken
        assert [each.used for each in prefetcher.usage()] == [2, 2 * (512 + 24)]
        running = asyncio.get_running_loop().create_task(prefetcher.run())
        await settled()
        assert loader.num_loads == 2 and [each.used for each in prefetcher.usage()] == [0, 0]
        running.cancel()

    logging.disable(logging.ERROR)
    try:
        asyncio.run(go())
    finally:
        logging.disable(logging.NOTSET)


def test_a_prompt_of_a_namespace_that_was_forgotten_is_not_brought_up() -> None:
    core = Core(8 * SLOT_BYTES, clock=lambda: 0.0)
    client = Client(core, {}, b"n" * 16, hash_block)
    tenant = client.connection.require_tenant()
    core.disconnect(client.connection)
    core.trim()
    assert list(core.loads.begin_prefetches(tenant, [bytes(16)], as_bytes([1, 2]))) == []


def test_connections_fit_the_descriptors_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((1024, 256), (64, 10), (4, 1), (-1, 1 << 20)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections_that_fit() == most


def test_limits_survive_the_way_to_a_detached_daemon() -> None:
    config = DaemonConfig(socket=Path("/s"), store=None, warm_bytes=1, cold_bytes=1, limits=Limits(cursors_of_client=5))
    assert from_json(to_json(config, [], LogFormat.JSON)) == (config, [], LogFormat.JSON)


# --- a daemon and its clients ------------------------------------------------------------------------------------


def test_a_message_that_is_cut_off_is_refused_soon_and_who_holds_slots_keeps_them(start_daemon: Start) -> None:
    daemon = start_daemon(store=False, limits={"message_s": 0.05})
    with connect(daemon.socket) as holder, connect(daemon.socket) as other:
        write_prompt(holder, TOKENS)
        holder.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        for client in (holder, other):
            client._socket.sendall(frame(Flush(), number=9, boot=client.boot)[:-1])
            client._socket.settimeout(TIMEOUT_S)
            assert b"was not complete" in client._socket.recv(4096)
        assert other._socket.recv(1) == b""
        assert daemon.status().leased_slots == 4
    assert_healthy(daemon.socket)


def test_before_hello_only_a_short_message_is_taken(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as client:
        boot = client.boot
    with raw_socket(daemon.socket) as connection:
        connection.sendall(HEADER.pack(MAX_BODY_BYTES // 2, PROTOCOL_VERSION, 1, 0))
        assert b"is longer than" in connection.recv(4096) and connection.recv(1) == b""
    with raw_socket(daemon.socket) as connection:
        connection.sendall(frame(Status(), number=1, boot=boot))
        assert b"must be Hello" in connection.recv(4096)
        connection.sendall(frame(hello(), number=1, boot=0))
        assert connection.recv(4096)
        connection.sendall(frame(hello(), number=2, boot=boot))
        assert b"must be Hello" in connection.recv(4096)
        connection.sendall(frame(Match(hashes=b"", tokens=bytes(1 << 18)), number=3, boot=boot))
        assert b"of block hashes for 262144 bytes" in connection.recv(4096)
    assert_healthy(daemon.socket)


def test_a_client_that_reads_nothing_is_sent_away_unless_it_holds_slots(start_daemon: Start) -> None:
    daemon = start_daemon(store=False, limits={"unread_s": 0.05})
    with connect(daemon.socket) as holder, connect(daemon.socket) as deaf:
        write_prompt(holder, TOKENS)
        holder.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        for client in (holder, deaf):
            client._socket.setblocking(False)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                for _ in range(100_000):
                    client._socket.send(frame(Status(), number=1, boot=client.boot))
        eventually(lambda: daemon.status().clients == 2)  # the holder, and who asks
        assert daemon.status().leased_slots == 4
    eventually(lambda: daemon.status().clients == 1)


def test_one_process_has_no_more_connections_than_its_share(start_daemon: Start) -> None:
    daemon = start_daemon(store=False, limits={"connections_of_process": 3})
    clients = [connect(daemon.socket) for _ in range(3)]
    with pytest.raises(DaemonError, match=f"process {os.getpid()} has 3 connections already"):
        connect(daemon.socket)
    clients.pop().close()
    eventually(lambda: daemon.status().clients == 3)
    for client in clients:
        client.close()


def test_a_connection_that_only_asks_and_is_idle_makes_room_for_another(start_daemon: Start) -> None:
    daemon = start_daemon(store=False, limits={"connections": 3})
    idle = [DaemonClient(daemon.socket) for _ in range(3)]
    idle[0].call(Status(), StatusReport)
    served = [connect(daemon.socket) for _ in range(3)]
    for client in idle:
        with pytest.raises(DaemonGoneError):
            client.call(Status(), StatusReport)
    with pytest.raises(DaemonError, match="3 connections already"):
        connect(daemon.socket)
    assert served[0].call(Status(), StatusReport).clients == 3
    for client in idle + served:
        client.close()


def test_a_connection_that_another_thread_has_closed_is_gone_and_no_other_error(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    client = connect(daemon.socket)
    client._socket.close()  # between two steps of a call
    assert client.has_hung_up()
    with pytest.raises(DaemonGoneError):
        client._read_some(time.monotonic() + 1)
    client.close()


def test_waits_end_with_their_connection_and_are_no_more_than_a_client_may_have(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with connect(daemon.socket) as owner, connect(daemon.socket) as waiting:
        assert owner.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, wants_claim=True), Found).claim
        wait = Wait(block_hash=chain_of(TOKENS)[:16], timeout_ms=60_000)
        for _ in range(64):
            waiting._send(wait, wants_answer=True)
        with pytest.raises(DaemonError, match="more than 64 requests at once"):
            waiting.call(wait, Waited)
        report = owner.call(Status(), StatusReport)
        assert held(report, "waiting_requests") == held(report, "requests") == 64
        waiting.close()
        eventually(lambda: held(owner.call(Status(), StatusReport), "requests") == 0)
        assert held(owner.call(Status(), StatusReport), "waiting_requests") == 0
        for bad in (Wait(block_hash=b"short", timeout_ms=1), Wait(block_hash=bytes(16), timeout_ms=-1)):
            with pytest.raises(DaemonError, match=r"a block hash has|a wait of"):
                owner.call(bad, Waited)


def test_refusals_do_not_fill_the_log(start_daemon: Start) -> None:
    daemon = start_daemon(store=False, limits={"log_lines_per_minute": 5})
    with connect(daemon.socket) as client:
        for _ in range(50):
            with pytest.raises(DaemonError):
                client.call(Release(slots=b"123"), Done)
        assert client.call(Status(), StatusReport).counters["refused_messages"] == 50
    assert daemon.log.count("refused client=raw") == 5


def test_clients_that_end_before_they_are_welcomed_are_no_refusals(start_daemon: Start) -> None:
    daemon = start_daemon(slots=8)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket))
            client.sendall(frame(hello(), number=1, boot=0))
    eventually(lambda: daemon.status().clients == 1)
    assert daemon.status().counters.get("refused_messages", 0) == 0, daemon.log


def test_the_status_has_every_limit(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as client:
        write_prompt(client, TOKENS)
        client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
        report = client.call(Status(), StatusReport)
        by_name = {each.name: each for each in report.limits}
        assert by_name.keys() >= {
            *("connections", "requests", "waiting_requests", "incomplete_bytes", "unsent_bytes", "pending_writes"),
            *("prompts", "prompt_bytes", "leases", "reservations", "cursors", "cursor_bytes", "claimed_blocks"),
            *("namespaces", "description_bytes", "block_sizes", "slots", "pinned_bytes"),
        }
        assert all(0 <= each.used <= each.limit and each.largest <= each.limit_of_one for each in report.limits)
        assert (by_name["leases"].used, by_name["leases"].largest, by_name["leases"].limit_of_one) == (4, 4, 32)
        assert by_name["description_bytes"].used == len(NAMESPACE.describe())


def test_the_command_shows_every_limit(start_daemon: Start, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = start_daemon()
    daemon_tool.status(daemon.socket, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    daemon_tool.status(daemon.socket, as_json=False)
    text = capsys.readouterr().out
    for each in shown["limits"]:
        assert each["limit"] >= 0 and each["name"].removesuffix("_bytes").replace("_", " ") in text


def test_numbers_out_of_range_in_any_message_leave_the_daemon_as_it_was(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    huge = array("I", [0xFFFF_FFFF, 0, 1 << 31]).tobytes()
    with connect(daemon.socket) as client:
        for message in (
            Release(slots=huge, cursors=huge),
            Abandon(slots=huge),
            Match(hashes=chain_of(TOKENS), tokens=TOKENS, min_partial_tokens=-(1 << 63), lease=True),
            Match(hashes=chain_of(TOKENS), tokens=TOKENS, start=(1 << 64) - 1),
        ):
            with pytest.raises(DaemonError):
                client.call(message, Found)
        assert client.call(EndClaim(claim=(1 << 64) - 1), Done)
        assert client.call(Release(cursors=huge), Done)
    assert_healthy(daemon.socket)
