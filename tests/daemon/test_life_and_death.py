"""Clients and daemons are killed, stopped and started again: service comes back and nothing stays lent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT, command
from daemon_process import TIMEOUT_S, Daemon, OpenCache, Start
from daemon_process import WORKER as DAEMON_WORKER
from pattern_engine import PatternEngine, tiny_layout
from raw_client import NAMESPACE, chain_of, connect, hello, tokens_of, write_prompt

from tierkv.cache import TierCache
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.host import check_memory, listening_socket
from tierkv.daemon.messages import Found, Match, Publish, Welcome
from tierkv.daemon.protocol import HEADER, frame
from tierkv.errors import CapacityError, ConfigError, DaemonError, DaemonGoneError
from tierkv.movers.mover import Move, Ready
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

WORKER = Path(__file__).with_name("client_worker.py")
PROMPT = list(range(14))


@contextlib.contextmanager
def client_process(action: str, socket_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a client until it says that it is where it should be."""
    line = command(WORKER, action, socket_path)
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what another process does in its own time; fail if it never does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def is_served(cache: TierCache, daemon: Daemon) -> bool:
    """Tell whether a cache works with the daemon that is running now."""
    with DaemonClient(daemon.socket) as client:
        tiers = cache._daemon
        return tiers is not None and tiers.connection is not None and tiers.boot == client.boot


def test_a_client_killed_while_reading_gives_its_slots_back(start_daemon: Start) -> None:
    daemon = start_daemon()
    with client_process("read", daemon.socket) as process:
        assert daemon.status().leased_slots == 4
        process.kill()
        eventually(lambda: daemon.status().leased_slots == 0)
    with connect(daemon.socket) as client:
        found = client.call(Match(hashes=chain_of(tokens_of(16)), tokens=tokens_of(16)), Found)
        assert len(found.slots) == 4 * 4, "what it had published stays"


def test_a_client_that_has_forked_and_is_killed_gives_its_slots_back_although_its_child_lives(
    start_daemon: Start,
) -> None:
    daemon = start_daemon()
    with client_process("fork", daemon.socket) as process:
        assert process.stdout is not None
        status = daemon.status()
        assert (status.leased_slots, status.reserved_slots, status.claims) == (4, 4, 4)
        process.kill()
        assert process.stdout.readline() == "closed\n", "the child cannot use the connection"
        status = daemon.status()
        assert (status.leased_slots, status.reserved_slots, status.claims, status.clients) == (0, 0, 0, 1)


def test_a_client_killed_while_writing_leaves_nothing_visible_and_no_slot(start_daemon: Start) -> None:
    daemon = start_daemon()
    tokens = tokens_of(16)
    with client_process("write", daemon.socket) as process, connect(daemon.socket) as client:
        assert daemon.status().reserved_slots == 4
        assert write_prompt(client, tokens) == 0, "the blocks are another client's to write"
        assert client.call(Match(hashes=chain_of(tokens), tokens=tokens), Found).slots == b""
        process.kill()
        eventually(lambda: daemon.status().reserved_slots == 0)
        assert client.call(Match(hashes=chain_of(tokens), tokens=tokens), Found).slots == b""
        assert write_prompt(client, tokens) == 4


def test_a_stopped_client_holds_what_it_has_and_nothing_else(start_daemon: Start) -> None:
    """It may wake up and go on copying: only its end takes the slots back. Meanwhile others are served."""
    daemon = start_daemon()
    with client_process("read", daemon.socket) as process, connect(daemon.socket) as client:
        process.send_signal(signal.SIGSTOP)
        assert write_prompt(client, tokens_of(32, start=100)) == 8
        assert daemon.status().leased_slots == 4
        process.send_signal(signal.SIGCONT)
        process.kill()
        eventually(lambda: daemon.status().leased_slots == 0)


def test_a_client_that_never_says_hello_is_sent_away(start_daemon: Start) -> None:
    daemon = start_daemon(hello_s=0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(TIMEOUT_S)
        silent.connect(str(daemon.socket))
        assert silent.recv(1) == b""
    assert daemon.status().clients == 1


def test_a_client_that_reads_no_answers_stops_being_served_and_costs_others_nothing(start_daemon: Start) -> None:
    daemon = start_daemon()
    with connect(daemon.socket) as deaf, connect(daemon.socket) as client:
        write_prompt(client, tokens_of(4096))
        question = frame(Match(hashes=chain_of(tokens_of(128)), tokens=tokens_of(128)), number=1, boot=deaf.boot)
        deaf._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                deaf._socket.send(question)
        assert client.call(Match(hashes=chain_of(tokens_of(16)), tokens=tokens_of(16)), Found)
        assert daemon.status().rss_bytes < 200 << 20
    eventually(lambda: daemon.status().clients == 1)


def test_a_cache_outlives_its_daemon_and_finds_the_next_one(start_daemon: Start, open_cache: OpenCache) -> None:
    daemon = start_daemon()
    cache = open_cache(daemon_timeout_s=0.5)
    engine = PatternEngine(cache)
    cache.release(engine.start(PROMPT, partial_block=True))
    cache.flush()
    daemon.kill()
    cache.evict(Tier.HOT)
    alone = engine.start([*PROMPT, 1])
    assert alone.num_cached_tokens == 0
    cache.release(alone)
    assert cache.stats().miss_reasons[MissReason.DAEMON.value] == 1
    assert cache.match([9, 9, 9, 9]).num_cached_tokens == 0
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    cache.flush()
    cache.evict(Tier.HOT)
    found = engine.start([*PROMPT, 2])
    assert found.num_cached_tokens >= 12, "the store has them, or they were written anew"
    cache.release(found)
    cache.check()


def test_a_run_is_reported_although_its_daemon_has_gone_or_another_has_come(
    start_daemon: Start, open_cache: OpenCache, tmp_path: Path
) -> None:
    """The tiers that there are change meanwhile: one daemon has no store, none is there, the next one has a store."""
    daemon = start_daemon(store=False)
    cache = open_cache()
    with MemoryProfiler(cache) as profiler:
        cache.release(PatternEngine(cache).start(PROMPT))
        daemon.kill()
        cache.release(PatternEngine(cache).start(PROMPT))
        eventually(lambda: set(cache.stats().tiers) == {Tier.HOT, Tier.WARM})
        profiler.generate_report()
        daemon = start_daemon()
        eventually(lambda: is_served(cache, daemon))
        cache.release(PatternEngine(cache).start(PROMPT))
        assert set(cache.stats().tiers) == set(Tier)
        report = profiler.generate_report()
        daemon.kill()
        cache.release(PatternEngine(cache).start(PROMPT[:9]))
        for each in (report, profiler.generate_report()):
            each.save_html(tmp_path / "page.html")
            each.export_trace(tmp_path / "trace.json")
            assert each.run.measured.hits[Tier.HOT] >= 3
            assert each.run.measured.room_bytes(Tier.COLD) >= 0
        snapshots = profiler.snapshots
        assert {len(each.stats.tiers) for each in snapshots} == {2, 3}


def test_a_daemon_without_a_store_gets_back_what_its_clients_still_have(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    daemon = start_daemon(store=False)
    cache = open_cache(daemon_timeout_s=0.5)
    engine = PatternEngine(cache)
    sequence = engine.start(list(range(8)))
    cache.flush()
    daemon.kill()
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    engine.decode(sequence, [50, 51, 52, 53])
    cache.flush()
    assert open_cache().match([*range(8), 50, 51, 52, 53]).tokens[Tier.WARM] == 12
    cache.release(sequence)


def test_what_only_an_earlier_daemon_had_is_written_again_before_it_is_evicted(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    daemon = start_daemon(store=False)
    cache = open_cache(hot=4, daemon_timeout_s=0.5)
    engine = PatternEngine(cache)
    cache.release(engine.start(list(range(8))))
    cache.flush()
    entries = list(cache._tiers.index)
    assert len(entries) == 2 and all(entry.in_cold for entry in entries)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_served(cache, daemon))
    assert not any(entry.in_cold for entry in entries), "the new daemon has nothing"
    cache.release(engine.start(list(range(100, 116))))  # fills the hot pool
    cache.flush()
    assert open_cache().match(list(range(8))).tokens[Tier.WARM] == 8


def test_an_answer_of_an_earlier_daemon_says_nothing_of_the_present_one(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(store=False)
    cache = open_cache(daemon_timeout_s=0.5)
    assert cache._daemon is not None and cache._daemon.connection is not None
    connection = cache._daemon.connection
    call = connection.call

    def then_restart(message: Any, *arguments: Any, **options: Any) -> Any:
        answer = call(message, *arguments, **options)
        if isinstance(message, Publish):
            daemon.kill()
            daemon.start()
            eventually(lambda: is_served(cache, daemon))
        return answer

    monkeypatch.setattr(connection, "call", then_restart)
    cache.release(PatternEngine(cache).start(list(range(4))))
    cache.flush()
    assert not any(entry.in_cold for entry in cache._tiers.index)


def test_a_cache_may_be_opened_before_its_daemon(start_daemon: Start, open_cache: OpenCache) -> None:
    cache = open_cache()
    cache.release(PatternEngine(cache).start(PROMPT))
    assert cache.stats().miss_reasons[MissReason.DAEMON.value] == 1
    daemon = start_daemon()
    eventually(lambda: is_served(cache, daemon))
    cache.release(PatternEngine(cache).start([70, 71, 72, 73, 74]))
    cache.flush()
    assert open_cache().match([70, 71, 72, 73]).tokens[Tier.WARM] == 4


def test_a_copy_from_a_leased_slot_outlives_the_connection(start_daemon: Start, open_cache: OpenCache) -> None:
    """The client gives its end up only when the slot is given back, so that nobody writes into it before."""
    daemon = start_daemon()
    writer, reader = open_cache(), open_cache()
    writer.release(PatternEngine(writer).start(list(range(8))))
    writer.flush()
    assert reader._daemon
    connection = reader._daemon.connection
    assert connection is not None
    pinned: dict[int, object] = {}
    with reader._tiers.changed:
        found = reader._tiers.find(b"".join(n.to_bytes(4, "little") for n in range(8)), 8)
    lookup, _ = reader._daemon.blocks.look_further(
        found,
        b"".join(n.to_bytes(4, "little") for n in range(8)),
        pinned,  # type: ignore[arg-type]
    )
    assert len(lookup.blocks) == 2 and daemon.status().leased_slots == 2
    connection.retire()
    assert daemon.status().leased_slots == 2, "the connection stays open while a copy may be under way"
    reader._tiers.unpin(pinned.values())  # type: ignore[arg-type]
    eventually(lambda: daemon.status().leased_slots == 0)


def run_worker(options: str) -> subprocess.CompletedProcess[str]:
    worker = DAEMON_WORKER
    return subprocess.run(
        command(worker, options), env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_living_one_is_not(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    daemon.kill()
    assert daemon.socket.is_socket()
    daemon.start()
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o600
    second = run_worker(f'{{"socket": "{daemon.socket}", "warm_bytes": 65536, "cold_bytes": 1}}')
    assert second.returncode and "belongs to another daemon, process" in second.stderr.splitlines()[-1]
    assert daemon.status().pid


def test_a_store_has_one_daemon(start_daemon: Start, short_path: Path) -> None:
    start_daemon()
    options = (
        f'{{"socket": "{short_path}/e.sock", "store": "{short_path}/store", "warm_bytes": 65536, "cold_bytes": 1}}'
    )
    second = run_worker(options)
    assert second.returncode and "store" in second.stderr.splitlines()[-1]
    assert "belongs to another daemon" in second.stderr.splitlines()[-1]
    assert not (short_path / "e.sock").exists()


def test_a_slab_larger_than_memory_is_refused_before_it_is_touched() -> None:
    with pytest.raises(CapacityError, match="does not fit"):
        check_memory(1 << 60)


def test_a_file_that_is_no_socket_is_left_alone(short_path: Path) -> None:
    (short_path / "d.sock").write_text("mine")
    ended = run_worker(f'{{"socket": "{short_path}/d.sock", "warm_bytes": 65536, "cold_bytes": 1}}')
    assert ended.returncode and "is no socket" in ended.stderr.splitlines()[-1]
    assert (short_path / "d.sock").read_text() == "mine"


def test_a_client_of_another_version_is_told_so(start_daemon: Start) -> None:
    daemon = start_daemon()
    data = frame(hello(), number=1, boot=0)
    size, _, number, boot = HEADER.unpack_from(data)
    HEADER.pack_into(data, 0, size, 99, number, boot)
    with socket.socket(socket.AF_UNIX) as old:
        old.settimeout(TIMEOUT_S)
        old.connect(str(daemon.socket))
        old.sendall(data)
        answer = old.recv(4096)
        assert b"use the same version" in answer and old.recv(1) == b""


def test_a_daemon_of_another_version_is_an_error_in_one_line(short_path: Path, open_cache: OpenCache) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "d.sock"))
        listener.listen()
        pid = os.fork()
        if not pid:
            peer, _ = listener.accept()
            peer.recv(65536)
            data = frame(Welcome(pid=1, slab_bytes=1, store="", has_cold=False), number=1, boot=7)
            HEADER.pack_into(data, 0, len(data) - HEADER.size, 99, 1, 7)
            peer.sendall(data)
            os._exit(0)
        with pytest.raises(DaemonError, match=r"speaks another protocol.*same version"):
            open_cache()
        os.waitpid(pid, 0)


def test_a_client_whose_blocks_have_another_size_than_its_namespace_is_refused(start_daemon: Start) -> None:
    daemon = start_daemon()
    wrong = hello()
    wrong.block_bytes += 4096
    with pytest.raises(DaemonError, match="blocks have 4352 bytes, those of its namespace 256"):
        DaemonClient(daemon.socket, wrong)
    connect(daemon.socket).close()
    forged = hello(Namespace(weights="raw", layout=tiny_layout(block_size=8)))
    forged.namespace = NAMESPACE.digest
    with pytest.raises(DaemonError, match=f"{NAMESPACE.digest.hex()} is named"):
        DaemonClient(daemon.socket, forged)


def test_blocks_larger_than_the_slab_are_refused(start_daemon: Start) -> None:
    daemon = start_daemon(slots=4)
    with pytest.raises(DaemonError, match=r"does not fit the daemon's slab.*--warm"):
        connect(daemon.socket, Namespace(weights="raw", layout=tiny_layout(block_size=4096)))


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than"), listening_socket(tmp_path / ("x" * 120)):
        pass


def test_no_daemon_is_an_error_that_says_how_to_start_one(short_path: Path) -> None:
    with pytest.raises(DaemonGoneError, match="tierkv daemon start"):
        DaemonClient(short_path / "none.sock")


def test_a_cache_that_the_daemon_refuses_leaves_no_thread_behind(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon(slots=4)
    before = set(threading.enumerate())
    with pytest.raises(DaemonError, match="does not fit the daemon's slab"):
        open_cache(hot=4096, block_size=4096)
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused_even_where_the_file_lets_him_in(start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon(store=False)
    short_path.chmod(0o755)
    daemon.socket.chmod(0o666)
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setuid(65534); s.connect(sys.argv[1]);"
        "print(s.recv(4096), s.recv(1))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(daemon.socket)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert "lets no other user in" in said.stdout and said.stdout.endswith("b''\n")


class LateReady:
    """A copy that ends only when somebody waits for it, as one on a GPU may."""

    def __init__(self) -> None:
        self.has_ended = False

    def wait(self, layer: int | None = None) -> None:
        """Nothing to wait for: the bytes are there."""

    def synchronize(self) -> None:
        """End the copy."""
        self.has_ended = True

    def is_done(self) -> bool:
        """Whether somebody has waited."""
        return self.has_ended


def test_closing_ends_the_connection_although_a_copy_is_on_its_way(
    start_daemon: Start, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    first, second = open_cache(), open_cache()
    first.release(PatternEngine(first).start(list(range(12))))
    first.close()
    assert second._daemon is not None and second._daemon.connection is not None
    connection, copy = second._daemon.connection, LateReady()
    promote = connection.mover.promote

    def promote_late(moves: Sequence[Move], *, after: Ready | None = None) -> LateReady:
        promote(moves, after=after).synchronize()
        return copy

    monkeypatch.setattr(connection.mover, "promote", promote_late)
    found = second.acquire(list(range(13)))
    assert found.cached_tokens[Tier.WARM] == 12
    second.release(found)
    second.close()
    assert copy.has_ended
    eventually(lambda: daemon.status().clients == 1)  # who asks
    assert daemon.status().leased_slots == 0
