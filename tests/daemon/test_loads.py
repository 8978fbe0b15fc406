"""State files that clients have the daemon load: each open once, bounded, and no file hinders the others."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from core_model import SLOT_BYTES, Client, DictStore, as_bytes, finish_load
from daemon_process import Daemon, Start
from raw_client import NAMESPACE, chain_of, connect, tokens_of, write_prompt
from test_life_and_death import eventually

from tierkv.daemon.core import Connection, Core
from tierkv.daemon.messages import Count, Fetch, Found, LoadState, Match, Saved, SaveState
from tierkv.daemon.side_threads import SideThreads
from tierkv.daemon.state_files import MAX_LOADED_OF_CLIENT, LoadedFile, StateFiles
from tierkv.errors import CapacityError, DaemonError, StoreError
from tierkv.storage.outcomes import MissReason
from tierkv.storage.state_file import FileIdentity, StateFile, write_state_file
from tierkv.values.block import Tier

TOKENS = tokens_of(16)


def num_open(daemon: Daemon, path: Path) -> int:
    """Return how many descriptors of a file the daemon has."""
    assert daemon.process
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    return sum(os.readlink(each) == str(path) for each in folder.iterdir() if os.path.lexists(each))


def state_file(path: Path, weights: str = "raw") -> Path:
    """Write a state file without blocks."""
    name = NAMESPACE if weights == "raw" else type(NAMESPACE)(weights=weights, layout=NAMESPACE.layout)
    write_state_file(path, namespace=name.digest, description=name.describe(), records=())
    return path


def test_what_is_no_regular_file_is_refused_at_once_and_takes_no_thread(start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon(num_io_threads=1)
    os.mkfifo(short_path / "FIFO")
    (short_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as other, connect(daemon.socket) as client:
        other.bind(str(short_path / "socket"))
        for _ in range(20):
            for name in (short_path / "FIFO", short_path / "directory", short_path / "socket", "/dev/zero"):
                with pytest.raises(DaemonError, match="not a regular file"):
                    client.call(LoadState(path=str(name)), Count, timeout_s=5)
        with pytest.raises(DaemonError, match="No such file"):
            client.call(LoadState(path=str(short_path / "none")), Count, timeout_s=5)
        assert write_prompt(client, TOKENS) == 4


def test_one_file_is_open_once_whatever_names_it_and_closed_with_its_last_client(
    start_daemon: Start, short_path: Path
) -> None:
    daemon = start_daemon(store=False)
    path = short_path / "s.tkv"
    with connect(daemon.socket) as client:
        write_prompt(client, TOKENS)
        assert client.call(SaveState(path=str(path)), Saved).blocks == 4
    daemon.kill()
    daemon.start()
    os.link(path, short_path / "other name")
    first, second = connect(daemon.socket), connect(daemon.socket)
    for client in (first, second, first):
        assert client.call(LoadState(path=str(path)), Count).count == 4
        assert client.call(LoadState(path=str(short_path / "other name")), Count).count == 4
    assert num_open(daemon, path) == 1
    first.close()
    found = second.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS, lease=True), Found)
    assert len(found.slots) == 16, "it is still loaded"
    second.close()
    eventually(lambda: num_open(daemon, path) == 0)
    with connect(daemon.socket) as client:
        assert client.call(Match(hashes=chain_of(TOKENS), tokens=TOKENS), Found).slots == b""


class Loads:
    """StateFiles for one namespace, with files that may hang until they are let go."""

    def __init__(self, **options: Any) -> None:
        self.core = Core(16 * SLOT_BYTES, clock=lambda: 0.0, extent_bytes=SLOT_BYTES)
        self.go_on = threading.Event()
        self.opened: list[StateFile] = []
        self.loads = StateFiles(open_file=self.open, **options)

    def open(self, path: Path) -> StateFile:
        if path.name.startswith("hang"):
            self.go_on.wait(30)
        self.opened.append(StateFile(path))
        return self.opened[-1]

    @property
    def num_open(self) -> int:
        return sum(state._file._fd >= 0 for state in self.opened)

    def connection(self) -> Connection:
        connection = self.core.connect()
        self.core.open_tenant(connection, NAMESPACE.digest, b"", layout=NAMESPACE.layout)
        return connection

    def disconnect(self, connection: Connection) -> None:
        self.core.disconnect(connection)
        self.loads.unload(connection)


def test_a_file_that_hangs_is_given_up_in_time_and_hinders_no_other_client(tmp_path: Path) -> None:
    loads = Loads(open_s=0.3)
    good = state_file(tmp_path / "good")
    hanging = [state_file(tmp_path / f"hang {number}") for number in range(3)]

    async def act() -> None:
        bad, other = loads.connection(), loads.connection()
        pending = [asyncio.ensure_future(loads.loads.load(bad, path)) for path in hanging[:2]]
        await asyncio.sleep(0)
        with pytest.raises(DaemonError, match="do not answer"):
            await loads.loads.load(bad, hanging[2])
        assert await loads.loads.load(other, good) == 0
        for each in pending:
            with pytest.raises(DaemonError, match=r"not opened within 0\.3 s"):
                await each
        with pytest.raises(DaemonError, match="do not answer"):  # its threads have not come back
            await loads.loads.load(bad, good)
        loads.go_on.set()
        while loads.loads._openers.num_pending:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        assert loads.num_open == 1, "what came too late is closed"
        assert await loads.loads.load(bad, good) == 0
        loads.disconnect(other)
        assert loads.num_open == 1
        loads.disconnect(bad)
        assert loads.num_open == 0
        loads.loads.close()

    asyncio.run(act())


def test_a_client_that_goes_while_its_file_is_opened_leaves_nothing(tmp_path: Path) -> None:
    loads = Loads()
    path = state_file(tmp_path / "hang")

    async def act() -> None:
        connection = loads.connection()
        pending = asyncio.ensure_future(loads.loads.load(connection, path))
        await asyncio.sleep(0)
        loads.disconnect(connection)
        loads.go_on.set()
        with pytest.raises(DaemonError, match="closed meanwhile"):
            await pending
        assert loads.num_open == 0
        loads.loads.close()

    asyncio.run(act())


def test_the_number_of_open_files_is_bounded_and_another_namespaces_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = Loads()
    monkeypatch.setattr("tierkv.daemon.state_files.MAX_LOADED", MAX_LOADED_OF_CLIENT + 1)

    async def act() -> None:
        first, second = loads.connection(), loads.connection()
        with pytest.raises(StoreError, match="another model"):
            await loads.loads.load(first, state_file(tmp_path / "other", "other"))
        for number in range(MAX_LOADED_OF_CLIENT):
            await loads.loads.load(first, state_file(tmp_path / str(number)))
        with pytest.raises(CapacityError, match="one client"):
            await loads.loads.load(first, state_file(tmp_path / "more"))
        await loads.loads.load(second, tmp_path / "more")
        with pytest.raises(CapacityError, match="loaded already"):
            await loads.loads.load(second, state_file(tmp_path / "most"))
        assert loads.num_open == MAX_LOADED_OF_CLIENT + 1
        loads.disconnect(first)
        assert loads.num_open == 1
        loads.loads.close()

    asyncio.run(act())
    assert loads.num_open == 0


def test_a_file_that_has_come_to_the_path_of_a_loaded_one_takes_its_place_for_the_same_client(tmp_path: Path) -> None:
    loads = Loads()
    path = state_file(tmp_path / "s.tkv")

    async def act() -> None:
        first, second = loads.connection(), loads.connection()
        await loads.loads.load(first, path)
        await loads.loads.load(second, path)
        for _ in range(2 * MAX_LOADED_OF_CLIENT):
            await loads.loads.load(first, state_file(path))
        assert loads.num_open == 2, "the second client has the first file still"
        loads.disconnect(second)
        assert loads.num_open == 1
        loads.loads.close()

    asyncio.run(act())
    assert loads.num_open == 0


class HangingFile:
    """A state file whose reads of token ids hang until they are let go."""

    def __init__(self) -> None:
        self.identity = FileIdentity(1, 2, 3, 4, 5)
        self.path = Path("hanging")
        self.go_on = threading.Event()
        self.is_closed = False

    def lookup(self, block_hash: bytes) -> str:
        return "there"

    def children(self, parent: bytes) -> list[bytes]:
        return [b"child"]

    def read_tokens(self, block_hash: bytes) -> bytes:
        self.go_on.wait(30)
        return b"tokens"

    def find_longest_run(self, parent: bytes, token_bytes: bytes) -> tuple[bytes, bytes, int]:
        return parent, self.read_tokens(parent), 1

    def close(self) -> None:
        self.is_closed = True


def test_a_loaded_file_that_hangs_has_nothing_until_its_read_returns() -> None:
    hanging: Any = HangingFile()
    file = LoadedFile(hanging)
    assert file.lookup(b"h") == "there"
    assert file.find_longest_run(b"p", b"tokens") is None
    before = time.monotonic()
    assert file.is_hanging and file.lookup(b"h") is None
    assert file.read_tokens(b"h") is None and file.find_longest_run(b"p", b"t") is None
    assert time.monotonic() - before < 0.2 and file.num_pending == 1, "no further thread is spent on it"
    file.close()
    assert not hanging.is_closed, "its read may still use the descriptor"
    hanging.go_on.set()
    eventually(lambda: hanging.is_closed)


def test_a_slot_that_a_late_read_may_write_is_nobody_elses_until_it_returns() -> None:
    store = DictStore()
    core = Core(4 * SLOT_BYTES, clock=lambda: 0.0, store=store, extent_bytes=SLOT_BYTES)
    slab: dict[int, tuple[bytes, bytes]] = {}
    client = Client(core, slab, b"n" * 16, lambda parent, tokens: bytes([tokens[0]]) * 16)
    client.reserve(as_bytes([1, 1]), [0])
    for write in client.publish(1):
        core.finish_write(write, is_stored=store.put(_identify(write), slab[write.slot]))
    core.evict(client.connection, -1)
    found = client.match(as_bytes([1, 1]))
    task = core.loads.begin_fetch(client.connection, Fetch(cursor=found.cursor, first=0, count=1))
    (slot,) = task.slots
    fetched = core.loads.end_fetch(client.connection, task)
    assert (fetched.slots, fetched.miss) == (b"", MissReason.IO_ERROR.value)
    core.check()
    size_class = next(iter(core.slab.classes.values()))
    others = size_class.take(4)
    assert len(others) == 3 and slot not in others
    finish_load(core, slab, task)
    assert size_class.index.warm.reference_count(slot) == 0
    size_class.index.unpin_all(Tier.WARM, others)
    core.check()


def _identify(write: Any) -> Any:
    from tierkv.daemon.values import BlockIdentifier

    return BlockIdentifier().identify(write.tenant, write.entry)


def test_side_threads_run_no_more_than_they_are_and_leave_out_what_was_cancelled() -> None:
    threads = SideThreads(2, name="test")
    go_on = threading.Event()
    calls = [threads.submit(go_on.wait, 30) for _ in range(2)]
    waiting = threads.submit(lambda: 1)
    cancelled = threads.submit(lambda: 2)
    assert threads.num_pending == 4 and cancelled.cancel() and not waiting.done()
    go_on.set()
    assert waiting.result(5) == 1 and all(call.result(5) for call in calls)
    failing = threads.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    eventually(lambda: threads.num_pending == 0)
    threads.shutdown()
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(lambda: 3)
