"""Hostile messages: from clients to a daemon, and from a daemon to its clients."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from hostile.driver import Area, WrongAnswerError, refused
from hostile.files_area import make_odd_file
from hostile.mutations import change_json, mutate, odd_number, odd_text
from pattern_layout import tiny_layout
from raw_client import NAMESPACE, chain_of, connect, hello, tokens_of

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.daemon import eviction_messages as e
from tierkv.daemon import messages as m
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.protocol import HEADER, PROTOCOL_VERSION, FrameReader, ProtocolError, frame, parse_body
from tierkv.daemon.server import DaemonConfig, serve
from tierkv.errors import TierKVError
from tierkv.storage.state_file import write_state_file
from tierkv.storage.warm import Slab
from tierkv.values.block import iter_chain
from tierkv.values.namespace import Namespace

__all__ = ["Answers", "Requests"]

_ANSWER_S = 6.0
_HOSTILE = Namespace(weights="hostile", layout=tiny_layout(), name="hostile")
_SLOTS = 48
_FILL = 7
_ENCODER = msgspec.msgpack.Encoder()


def _odd_bytes(random: Random, unit: int) -> bytes:
    """Return bytes for a field that is a list of so many bytes each."""
    kind = random.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return random.randbytes(random.choice((1, unit - 1, unit + 1)))
    if kind == 2:
        return b"".join(odd_number(random, 8 * unit).to_bytes(unit, "little") for _ in range(3))
    if kind == 3:
        return random.randbytes(unit) * random.choice((2, 300))
    return b"".join(random.randrange(_SLOTS + 2).to_bytes(unit, "little") for _ in range(random.randrange(1, 5)))


def _changed(random: Random, message: Any) -> Any:
    """Return a message of the same class with one or two fields that are odd, perhaps of another type."""
    if not isinstance(message, msgspec.Struct):
        return odd_number(random)
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    for _ in range(random.choice((1, 1, 2))):
        if not values:
            break
        name = random.choice(tuple(values))
        value = values[name]
        if isinstance(value, bool):
            values[name] = random.choice((True, False, 1, "yes"))
        elif isinstance(value, int):
            values[name] = random.choice((odd_number(random), -odd_number(random, 63), odd_number(random, 32), 2, "2"))
        elif isinstance(value, bytes):
            unit = 16 if name in ("hashes", "namespace", "block_hash") else 4
            values[name] = random.choice((_odd_bytes(random, unit), mutate(random, value)))
        elif isinstance(value, str):
            values[name] = odd_text(random).encode(errors="replace").decode()
        elif isinstance(value, list):
            values[name] = random.choice(([], [_changed(random, each) for each in value], value[:1] * 50, [1]))
        elif isinstance(value, dict):
            values[name] = random.choice(({}, {"a": 1}, {"blocks": -1, "live_bytes": "x"}, []))
        elif isinstance(value, msgspec.Struct):
            values[name] = random.choice((None, _changed(random, value)))
    return type(message)(**values)  # which compares no type with its field's


def _framed(random: Random, message: Any, *, number: int, boot: int) -> bytes:
    """Return a message as bytes; now and then damaged, or in a header that does not fit."""
    try:
        data = bytearray(frame(message, number=number, boot=boot))
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        return b""
    kind = random.randrange(20)
    if kind == 0:
        body = mutate(random, bytes(data[HEADER.size :]))
        data = bytearray(HEADER.pack(len(body), PROTOCOL_VERSION, number, boot)) + body
    elif kind == 1:
        data[: HEADER.size] = mutate(random, bytes(data[: HEADER.size]))[: HEADER.size].ljust(HEADER.size, b"\0")
    elif kind == 2:
        del data[random.randrange(len(data)) :]
    return bytes(data)


class Requests(Area):
    """Clients that say anything to a daemon: each request is answered or refused, and honest clients notice nothing."""

    name = "requests"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._socket = directory / "d.sock"
        self._tokens = tokens_of(16)
        self._honest: DaemonClient | None = None
        self._slab: Slab | None = None
        self._number = 0

    def around(self, work: Callable[[], None]) -> None:
        config = DaemonConfig(
            socket=self._socket,
            store=self.directory / "store",
            warm_bytes=_SLOTS * 4096,
            cold_bytes=16 << 20,
            min_free_bytes=0,
            num_io_threads=1,
        )
        failures: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as exc:  # noqa: BLE001 - told by the main thread
                failures.append(exc)
            finally:
                self._end_honest()
                with DaemonClient(self._socket) as client:
                    client.call(m.Stop(), m.Done)

        thread = threading.Thread(target=run, name="cases")
        serve(config, started=thread.start)
        thread.join()
        if failures:
            raise failures[0]

    def case(self, random: Random) -> bool:
        self._number += 1
        if self._number % 25 == 1:
            self._check_honest()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(_ANSWER_S)
            peer.connect(os.fspath(self._socket))
            reader = FrameReader()
            greeting = self._greeting(random)
            data = _framed(random, greeting, number=1, boot=0)
            boot, answer = self._exchange(peer, reader, data, 1)
            is_deep = isinstance(answer, m.Welcome)
            for number in range(2, random.randrange(3, 6)):
                if boot is None:
                    break
                message = self._request(random)
                answered = not isinstance(message, m.Release | m.Abandon | m.EndClaim)
                data = _framed(random, message, number=number if answered else 0, boot=boot)
                if _is_said(data, m.Stop) or (isinstance(message, m.Wait) and message.timeout_ms != 1):
                    continue
                later, answer = self._exchange(peer, reader, data, number if answered else 0)
                if later is None:
                    break
                is_deep |= answer is not None and not isinstance(answer, m.Failure)
        return is_deep

    def _exchange(
        self, peer: socket.socket, reader: FrameReader, data: bytes, number: int
    ) -> tuple[int | None, m.Message | None]:
        """Send a frame and return (boot id, answer) if it wants one; no boot id once the connection is closed."""
        is_whole = _is_whole(data)
        is_answered = is_whole and number and HEADER.unpack_from(data)[2] == number
        try:
            peer.sendall(data)
        except OSError:
            return None, None
        if not is_answered:
            is_as_sent = is_whole and not number and HEADER.unpack_from(data)[2] == 0
            return (0 if is_as_sent else None), None
        deadline = time.monotonic() + _ANSWER_S
        while True:
            with contextlib.suppress(ProtocolError):
                if cut := reader.next():
                    got, boot, body = cut
                    answer = parse_body(body)
                    if got == 0 and isinstance(answer, m.Failure) and not answer.is_fatal:
                        continue  # of an earlier message, which wanted no answer
                    if got not in (number, 0):
                        raise WrongAnswerError(f"an answer to request {got}, not {number}")
                    if isinstance(answer, m.Failure):
                        self.reached["Failure"] += 1
                    return (None if isinstance(answer, m.Failure) and answer.is_fatal else boot), answer
            try:
                received, fds, _, _ = socket.recv_fds(peer, 1 << 16, 4)
            except TimeoutError:
                body_said = data[HEADER.size :][:80]
                raise WrongAnswerError(f"not answered: {_name_of(data)}") from TimeoutError(repr(body_said))
            except OSError:
                return None, None
            for fd in fds:
                os.close(fd)
            if not received:
                return None, None
            if time.monotonic() > deadline:
                raise WrongAnswerError(f"not answered: {_name_of(data)}")
            reader.feed(received)

    def _greeting(self, random: Random) -> m.Message:
        said = hello(_HOSTILE)
        kind = random.randrange(8)
        if kind == 0:
            said = msgspec.structs.replace(said, namespace=NAMESPACE.digest)
        elif kind == 1:
            said = msgspec.structs.replace(said, description=change_json(random, said.description))
        elif kind == 2:
            layout = tiny_layout(block_size=random.choice((1, 4, 8, 64, 1 << 12)))
            said = hello(replace(_HOSTILE, layout=layout, lossy_codec=random.choice(("", "lossy-int8"))))
        elif kind == 3:
            said = _changed(random, said)
        elif kind == 4:
            said = m.Hello()
        if said.namespace == NAMESPACE.digest and said.description == NAMESPACE.describe():
            said = hello(_HOSTILE)  # who proves to be the same model may write that model's blocks
        return said

    def _request(self, random: Random) -> m.Message:
        tokens = tokens_of(random.choice((4, 8, 16)), random.choice((0, 0, 100)))
        hashes = b"".join(h for h in _chain(tokens))
        chain = m.Chain(hashes, tokens, np.arange(len(tokens) // 16, dtype="<u4").tobytes())
        path = self.directory / random.choice(("odd", "state.tkv", "nothing", "sub/x", "saved.tkv"))
        with contextlib.suppress(OSError):
            if path.name == "odd":
                _remove_quietly(path)
                make_odd_file(random, path, b"TKVSTATE" + bytes(4096))
            elif path.name == "state.tkv" and not path.exists():
                write_state_file(path, namespace=_HOSTILE.digest, description=_HOSTILE.describe(), records=())
        load = os.fspath(path) if random.random() < 0.8 else random.choice(("relative", "/", "/dev/null", "/a\0b"))
        message: m.Message = random.choice(
            (
                m.Match(hashes=hashes, tokens=tokens, lease=True, wants_claim=random.random() < 0.5),
                m.Match(hashes=hashes, tokens=tokens, start=random.choice((0, 1, 2))),
                m.Reserve(chains=[chain]),
                m.Publish(slots=_odd_bytes(random, 4)),
                m.Abandon(slots=_odd_bytes(random, 4)),
                m.Release(slots=_odd_bytes(random, 4), cursors=_odd_bytes(random, 4)),
                m.Fetch(cursor=random.randrange(3), first=random.randrange(3), count=random.randrange(4)),
                m.Wait(block_hash=hashes[:16], timeout_ms=1),
                m.EndClaim(claim=odd_number(random)),
                m.Pin(hashes=hashes, tokens=tokens, pinned=random.random() < 0.5),
                m.Prefetch(hashes=hashes, tokens=tokens),
                m.Evict(count=random.choice((-1, 0, 1))),
                e.EvictBlocks(namespace=_HOSTILE.digest, hashes=hashes, tokens=tokens),
                e.EvictionsSince(log=random.randrange(2), number=random.randrange(3)),
                e.EvictionDone(number=odd_number(random), blocks=1, in_use=0, pinned=0),
                m.Flush(),
                m.LoadState(path=load),
                m.SaveState(path=os.fspath(self.directory / "saved.tkv")),
                m.Status(),
                m.Done(),
                m.Hello(),
            )
        )
        if isinstance(message, m.SaveState) or random.random() < 0.4:
            return message
        changed = _changed(random, message)
        if isinstance(changed, m.LoadState) and not os.fspath(changed.path).startswith(os.fspath(self.directory)):
            return message
        return changed  # type: ignore[no-any-return]

    def _check_honest(self) -> None:
        """Raise WrongAnswerError unless an honest client reads what it wrote, and can ask for the status."""
        if self._honest is None:
            self._honest = connect(self._socket)
            self._slab = Slab.attach(self._honest.take_descriptor(), self._honest.welcome.slab_bytes)
        client = self._honest
        ask = m.Match(hashes=chain_of(self._tokens), tokens=self._tokens, lease=True)
        found = client.call(ask, m.Found)
        slots = np.frombuffer(found.slots, dtype="<u4")
        assert self._slab is not None
        for slot in slots:
            if slot != m.NO_SLOT and not (self._slab.slots(NAMESPACE.layout.block_bytes)[slot] == _FILL).all():
                raise WrongAnswerError("an honest client's block is not what it wrote")
        leased = slots[slots != m.NO_SLOT].tobytes()
        cursors = struct.pack("<I", found.cursor) if found.cursor else b""
        client.post(m.Release(slots=leased, cursors=cursors))
        if len(slots) < 4:
            with contextlib.suppress(TierKVError):
                self._write_honest(client)
        report = client.call(m.Status(), m.StatusReport)
        if report.clients > 16:
            raise WrongAnswerError(f"{report.clients} clients, where all but one have gone")

    def _write_honest(self, client: DaemonClient) -> None:
        tokens = self._tokens
        count = len(tokens) // 16
        chain = m.Chain(chain_of(tokens), tokens, np.arange(count, dtype="<u4").tobytes())
        given = client.call(m.Reserve(chains=[chain]), m.Reserved).chains[0]
        assert self._slab is not None
        for slot in np.frombuffer(given.slots, dtype="<u4"):
            self._slab.slots(NAMESPACE.layout.block_bytes)[slot] = _FILL
        if given.slots:
            client.call(m.Publish(slots=given.slots), m.Published)

    def _end_honest(self) -> None:
        if self._honest:
            self._honest.close()
        if self._slab:
            self._slab.close()


class Answers(Area):
    """A daemon that answers anything: clients refuse it, and caches go on without."""

    name = "answers"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._path = directory / "fake.sock"
        self._random: queue.Queue[Random] = queue.Queue()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(self._path))
        self._listener.listen(8)
        self._is_over = False
        self._script = Random(0)
        self._thread = threading.Thread(target=self._serve, name="fake daemon", daemon=True)
        self._thread.start()

    def case(self, random: Random) -> bool:
        self._script = Random(random.getrandbits(64))
        with refused(self):
            return self._ask_as_cache(random) if random.random() < 0.25 else self._ask_as_client(random)
        return False

    def close(self) -> None:
        self._is_over = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
            peer.connect(os.fspath(self._path))
        self._thread.join(5)
        self._listener.close()

    def _ask_as_client(self, random: Random) -> bool:
        is_answered = False
        with DaemonClient(self._path, hello(), timeout_s=0.4) as client:
            if client.descriptor is not None:
                with refused(self):
                    Slab.attach(client.take_descriptor(), client.welcome.slab_bytes).close()
            tokens = tokens_of(16)
            for message, expected in random.sample(
                [
                    (m.Match(hashes=chain_of(tokens), tokens=tokens, lease=True), m.Found),
                    (m.Fetch(cursor=1, first=0, count=2), m.Fetched),
                    (m.Reserve(chains=[]), m.Reserved),
                    (m.Publish(slots=b""), m.Published),
                    (m.Wait(block_hash=bytes(16), timeout_ms=1), m.Waited),
                    (m.Status(), m.StatusReport),
                    (m.Pin(hashes=b"", tokens=b"", pinned=True), m.Count),
                ],
                3,
            ):
                answer = client.call(message, expected)
                is_answered = True
                if not isinstance(answer, expected):
                    raise WrongAnswerError(f"{type(answer).__name__} for {type(message).__name__}")
        return is_answered

    def _ask_as_cache(self, random: Random) -> bool:
        config = CacheConfig(
            block_size=4,
            hot_bytes=12 * NAMESPACE.layout.block_bytes,
            socket=self._path,
            compute_wait_s=random.choice((0.0, 0.05)),
            daemon_timeout_s=0.3,
            write_wait_s=0.5,
            num_io_threads=1,
        )
        with TierCache(config, namespace=NAMESPACE) as cache:
            for _ in range(2):
                prompt = list(range(random.choice((1, 5, 13, 20))))
                sequence = cache.acquire(prompt)
                sequence.wait_all()
                if not 0 <= sequence.num_cached_tokens < len(prompt):
                    raise WrongAnswerError(f"{sequence.num_cached_tokens} tokens cached of {len(prompt)}")
                cache.commit(sequence, sequence.num_tokens)
                cache.release(sequence)
            for call in (
                lambda: cache.match(list(range(20))),
                lambda: cache.pin(list(range(20))),
                lambda: cache.prefetch(list(range(20))).wait(0.5),
                cache.stats,
                cache.check,
            ):
                with refused(self, TimeoutError):
                    call()
        return True

    # The daemon's side

    def _serve(self) -> None:
        while not self._is_over:
            peer, _ = self._listener.accept()
            if self._is_over:
                peer.close()
                return
            threading.Thread(
                target=self._converse, args=(peer, Random(self._script.getrandbits(64))), daemon=True
            ).start()

    def _converse(self, peer: socket.socket, random: Random) -> None:
        """Answer one client, mostly by what is right but for a field or two, until it or the script ends."""
        boot = random.choice((1, 5, (1 << 64) - 1))
        with peer, contextlib.suppress(OSError):
            peer.settimeout(5.0)
            reader = FrameReader()
            while True:
                try:
                    while (cut := reader.next()) is None:
                        data = peer.recv(1 << 16)
                        if not data:
                            return
                        reader.feed(data)
                    number, _, body = cut
                    message = parse_body(body)
                except ProtocolError:
                    return
                if isinstance(message, m.Hello):
                    if not self._welcome(random, peer, number, boot):
                        return
                    continue
                answer = self._answer(random, message)
                if answer is None or random.random() < 0.002:
                    continue
                said_boot = boot if random.random() < 0.98 else odd_number(random)
                said_number = number if random.random() < 0.98 else random.randrange(1 << 16)
                data = _framed(random, answer, number=said_number, boot=said_boot)
                peer.sendall(data)
                if not _is_whole(data) or random.random() < 0.02:
                    return  # else the client waits for the rest as long as it may

    def _welcome(self, random: Random, peer: socket.socket, number: int, boot: int) -> bool:
        """Greet; return whether the greeting was a whole frame."""
        size = random.choice((64, 16)) * 4096
        welcome: Any = m.Welcome(pid=1, slab_bytes=size, store="", has_cold=True)
        if random.random() < 0.3:
            welcome = _changed(random, welcome)
        data = _framed(random, welcome, number=number, boot=boot) if random.random() < 0.5 else b""
        with contextlib.suppress(TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            data = data or bytes(frame(welcome, number=number, boot=boot))
        fds = _memory(random, size)
        try:
            socket.send_fds(peer, [data or b"\0"], fds)
        finally:
            for fd in fds:
                os.close(fd)
        return _is_whole(data)

    def _answer(self, random: Random, message: m.Message) -> Any:
        slots = np.array([random.randrange(12) for _ in range(random.randrange(4))], dtype="<u4").tobytes()
        partial_block = m.FoundPartial(
            random.randbytes(16), tokens_of(3), random.choice((1, 2, 3)), random.choice((3, m.NO_SLOT))
        )
        answers: dict[type, Any] = {
            m.Match: m.Found(
                slots=slots,
                partial_block=random.choice((None, partial_block)),
                cursor=random.randrange(3),
                claim=random.randrange(3),
                is_computing=random.random() < 0.2,
                miss=random.choice(("", "absent", "corrupt", "nonsense")),
            ),
            m.Fetch: m.Fetched(slots=slots, miss=""),
            m.Reserve: m.Reserved(
                chains=[
                    m.ChainAnswer(numbers=slots, slots=slots, num_there=0, num_busy=0, refusal="")
                    for _ in range(len(getattr(message, "chains", ())))
                ]
            ),
            m.Publish: m.Published(count=1, lost=b""),
            m.Wait: m.Waited(is_over=random.random() < 0.5),
            m.Pin: m.Count(count=random.randrange(9)),
            m.Prefetch: m.Count(count=1),
            m.Flush: m.Done(),
            e.EvictionsSince: e.Evictions(1, random.randrange(2), True, [e.Eviction(1, 0.0, older_than_s=1.0)]),
            m.Status: _status(),
        }
        answer = answers.get(type(message))
        if answer is None:
            return None
        if random.random() < 0.05:
            return m.Failure(message=odd_text(random).encode(errors="replace").decode(), is_fatal=random.random() < 0.5)
        if random.random() < 0.05:
            return random.choice(list(answers.values()))
        return _changed(random, answer) if random.random() < 0.5 else answer


def _memory(random: Random, size: int) -> list[int]:
    """Return descriptors that a daemon may hand over: mostly memory, of some size, sealed or not."""
    kind = random.randrange(12)
    if kind == 0:
        return []
    if kind == 1:
        ends = os.pipe()
        return list(ends)
    if kind == 2:
        return [os.open("/dev/null", os.O_RDWR)]
    if kind == 3:
        return [os.open("/", os.O_RDONLY)]
    fds = [os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in range(1 if kind != 4 else 3)]
    for fd in fds:
        os.ftruncate(fd, size if kind > 5 else 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | (fcntl.F_SEAL_GROW if kind > 6 else 0))
    return fds


def _status() -> m.StatusReport:
    tenant = m.TenantStatus(
        namespace=NAMESPACE.digest.hex(), name="n", block_bytes=1, warm_blocks=1, pinned_bytes=0, clients=1
    )
    return m.StatusReport(
        pid=1,
        uptime_s=1.0,
        socket="s",
        store="",
        warm_bytes=1,
        warm_free_bytes=1,
        rss_bytes=1,
        clients=1,
        leased_slots=0,
        reserved_slots=0,
        claims=0,
        pending_writes=0,
        bytes_received=0,
        bytes_sent=0,
        counters={},
        tenants=[tenant],
        cold={},
    )


def _chain(tokens: bytes) -> list[bytes]:
    return [block_hash for block_hash, _ in iter_chain(_HOSTILE.digest, tokens, _HOSTILE.layout.block_size)]


def _is_said(data: bytes, kind: type[m.Message]) -> bool:
    try:
        return isinstance(parse_body(data[HEADER.size :]), kind)
    except TierKVError:
        return False


def _is_whole(data: bytes) -> bool:
    """Tell whether the bytes are as long as their header says."""
    return len(data) >= HEADER.size and HEADER.unpack_from(data)[0] == len(data) - HEADER.size


def _name_of(data: bytes) -> str:
    try:
        return repr(parse_body(data[HEADER.size :]))[:300]
    except TierKVError as exc:
        return f"what is no message ({exc})"[:300]


def _remove_quietly(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
