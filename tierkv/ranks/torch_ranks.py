"""Ranks that agree through a store of torch.distributed.

Each decision is a register that is written once, by compare-and-set. The first rank that has seen all votes writes
them; the first rank whose wait times out writes that there is no decision. A late rank reads what was written. An
all-reduce was rejected: a rank that times out cannot withdraw its vote, so the others may continue with a number that
it never saw.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import xxhash
from torch import distributed

from tierkv.errors import ConfigError, RankError
from tierkv.ranks.group import Vote

__all__ = ["Store", "TorchRanks"]

_DECISION = "decision"
_LOST_STEP = "lost step"
_NONE = "none"
_SLICE = timedelta(seconds=0.5)
"""How long a wait lasts before this rank looks whether another one has failed."""
_MOST_REASON = 500
_MESSAGES_AT_ONCE = 64
"""Messages that the first rank sends before the others must have read as many: then they are deleted."""


class Store(Protocol):
    """The methods of torch.distributed.Store that ranks use. Failures and time-outs raise RuntimeError."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...
    def check(self, keys: list[str]) -> bool: ...
    def has_extended_api(self) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class TorchRanks:
    """One rank of a group that shares a store; satisfies `RankGroup`. Thread-safe; all ranks call in the same order.

    store: reachable by every rank, such as a TCPStore; keys that begin with "tierkv/" are reserved for this class.
    timeout_s: how long to wait for the other ranks' votes; after it nothing counts as cached. It must cover the delay
    between ranks, reads of cold blocks included. gather_timeout_s: the same for `gather`, called while models load.
    monitor_store: another connection to the store, for calls while one of another thread waits; None takes the same.
    A decision takes a few round trips to the store: 0.1 ms for two ranks and a TCPStore on one machine.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        timeout_s: float = 30.0,
        gather_timeout_s: float = 600.0,
        monitor_store: Store | None = None,
    ) -> None:
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in [0, {size})")
        if timeout_s <= 0 or gather_timeout_s <= 0:
            raise ConfigError(f"timeouts must be positive, got {timeout_s} and {gather_timeout_s}")
        self.rank = rank
        self.size = size
        self._store = store
        self._monitor_store = monitor_store or store
        self._num_sessions = 0
        self._num_signs = 0
        self._signs: dict[int, tuple[bytes, float]] = {}  # of other ranks: the last one, and when it was first seen
        self._timeout = timedelta(seconds=timeout_s)
        self._gather_timeout = timedelta(seconds=gather_timeout_s)
        self._lock = threading.Lock()
        self._num_rounds = 0
        self._num_gathers = 0
        self._num_messages = 0
        self._kept: list[int] = []

    @classmethod
    def of_process_group(cls, *, host: str = "127.0.0.1", timeout_s: float = 30.0) -> TorchRanks:
        """Return this process's rank in torch.distributed's default group; every process of it calls this together.

        Rank 0 serves the store on a free port and broadcasts the port. host: the address of rank 0 for the others.
        Raises ConfigError if the group is not initialised.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ConfigError("ranks need torch.distributed", hint="call init_process_group, or run under torchrun")
        rank, size = distributed.get_rank(), distributed.get_world_size()
        tcp_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
        server = tcp_store(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        ports = [server.port if server else 0]
        distributed.broadcast_object_list(ports, src=0)
        store = server or tcp_store(host, ports[0], is_master=False)
        monitor_store = tcp_store(host, ports[0], is_master=False)
        return cls(store, rank=rank, size=size, timeout_s=timeout_s, monitor_store=monitor_store)

    def agree(self, vote: Sequence[int], *, topic: bytes) -> list[Vote] | None:
        """Return the votes of all ranks, or None if one is missing in time; the same on every rank.

        Raises RankError if the ranks vote on different topics, or if the store cannot be reached.
        """
        text = f"{','.join(map(str, vote))} {xxhash.xxh3_64_hexdigest(topic)}"
        with self._lock:
            self._num_rounds += 1
            try:
                decision = self._decide(self._num_rounds, text)
            except RuntimeError as exc:
                raise RankError(f"rank {self.rank} cannot know what the others decided: {exc}") from exc
        if decision == _LOST_STEP:
            raise RankError("the ranks have lost step: they ask for different things at the same time")
        if decision == _NONE:
            return None
        return [tuple(map(int, each.split(","))) for each in decision.split()]

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload. Raises RankError if a payload is missing in time."""
        with self._lock:
            self._num_gathers += 1
            keys = [f"tierkv/gather/{self._num_gathers}/{rank}" for rank in range(self.size)]
            try:
                self._store.set(keys[self.rank], payload.hex())
                self._wait(keys, self._gather_timeout)
                return [bytes.fromhex(text.decode()) for text in self._get(keys)]
            except RuntimeError as exc:
                raise RankError(f"rank {self.rank} of {self.size} has not heard of every other: {exc}") from exc

    def send(self, message: bytes) -> None:
        """Send a message from the first rank to all others, in order. Costs one round trip to the store.

        Raises RankError if another rank has not read the messages before the last 64 ones within `timeout_s`.
        """
        with self._lock:
            number = self._num_messages
            self._num_messages += 1
            try:
                if number % _MESSAGES_AT_ONCE == 0 and number:
                    self._delete_read(number)
                self._store.set(_message_key(number), message.hex())
            except RuntimeError as exc:
                raise RankError(f"another rank does not read what the first one sends: {exc}") from exc

    def receive(self, *, timeout_s: float) -> bytes | None:
        """Return the next message of the first rank; None if none comes in time.

        Raises RankError if the store cannot be reached: the first rank has gone.
        """
        key = _message_key(self._num_messages)
        try:
            self._wait([key], timedelta(seconds=timeout_s))
        except RuntimeError as exc:
            self._require_store(exc)
            return None
        try:
            message = bytes.fromhex(self._store.get(key).decode())
            self._num_messages += 1
            if self._num_messages % _MESSAGES_AT_ONCE == 0:
                self._store.set(_read_key(self._num_messages, self.rank), "1")
        except RuntimeError as exc:
            raise RankError(f"the first rank has gone: {exc}") from exc
        return message

    def begin_session(self) -> None:
        """Forget failures of before. All ranks call this together, when they open a model."""
        self._num_sessions += 1
        self._signs.clear()

    def fail(self, reason: str) -> None:
        """Let the other ranks know that this one has failed: the first one to fail is named. Raises nothing."""
        with contextlib.suppress(RuntimeError):
            self._monitor_store.compare_set(self._failed_key, "", f"rank {self.rank}: {reason}"[:_MOST_REASON])

    def failure(self, *, silent_s: float) -> str | None:
        """Give a sign of life, and return which rank has failed and why, or has gone; None if all are well.

        silent_s: a rank that has given a sign before, and none for so long, has gone.
        """
        store, now = self._monitor_store, time.monotonic()
        self._num_signs += 1
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store.set(self._sign_key(self.rank), str(self._num_signs))
            if failed := self._failed_other(store):
                return failed
            for rank in others:
                key = self._sign_key(rank)
                sign = store.get(key) if store.check([key]) else b""
                if rank not in self._signs or self._signs[rank][0] != sign:
                    self._signs[rank] = sign, now
        except RuntimeError as exc:
            return f"the rank that serves the ranks' store has gone ({_first_line(exc)})"
        for rank, (sign, since) in self._signs.items():
            if sign and now - since > silent_s:
                return f"rank {rank} has given no sign of life for {now - since:.0f} s"
        return None

    def _failed_other(self, store: Store) -> str | None:
        """Return what the first rank that failed has said, unless it is this one."""
        if not store.check([self._failed_key]):
            return None
        reason = store.get(self._failed_key).decode(errors="replace")
        return None if reason.startswith(f"rank {self.rank}:") else reason

    @property
    def _failed_key(self) -> str:
        return f"tierkv/failed/{self._num_sessions}"

    def _sign_key(self, rank: int) -> str:
        return f"tierkv/sign/{self._num_sessions}/{rank}"

    def _wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait for keys. Raises RuntimeError after the timeout, RankError soon after another rank has failed."""
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
            try:
                self._store.wait(keys, min(left, _SLICE))
                return
            except RuntimeError:
                if self._num_sessions and (failed := self._failed_other(self._store)):
                    raise RankError(f"another rank has failed: {failed}") from None
                if left <= _SLICE:
                    raise

    def _delete_read(self, number: int) -> None:
        """Wait until every other rank has read all messages before the last ones, and delete those."""
        read = number - _MESSAGES_AT_ONCE
        if not read:
            return
        keys = [_read_key(read, rank) for rank in range(1, self.size)]
        if keys:
            self._store.wait(keys, self._timeout)
        for key in [*keys, *map(_message_key, range(read - _MESSAGES_AT_ONCE, read))]:
            self._store.delete_key(key)

    def _require_store(self, exc: RuntimeError) -> None:
        """Raise RankError if the store cannot be reached: a wait that timed out raises the same error."""
        try:
            self._store.set(f"tierkv/alive/{self.rank}", "1")
        except RuntimeError:
            raise RankError(f"the first rank has gone: {exc}") from exc

    def _decide(self, number: int, vote: str) -> str:
        """Vote, and return the decision of a round; this rank writes it unless another rank has."""
        keys = [_key(number, rank) for rank in range(self.size)]
        self._store.set(keys[self.rank], vote)
        self._kept.append(number)
        try:
            self._wait(keys, self._timeout)
        except RuntimeError:  # a time-out; if the store is gone, the next line raises
            return self._write_once(number, _NONE)
        decision = self._write_once(number, _decision_of([text.decode() for text in self._get(keys)]))
        self._forget_before(number)
        return decision

    def _write_once(self, number: int, decision: str) -> str:
        return self._store.compare_set(_key(number, _DECISION), "", decision).decode()

    def _get(self, keys: list[str]) -> list[bytes]:
        if self._store.has_extended_api():
            return list(self._store.multi_get(keys))
        return [self._store.get(key) for key in keys]

    def _forget_before(self, number: int) -> None:
        """Delete old rounds. All ranks have voted in this round, so no rank reads an earlier decision again."""
        for old in self._kept[:-1]:
            self._store.delete_key(_key(old, self.rank))
            if self.rank == 0:
                self._store.delete_key(_key(old, _DECISION))
        self._kept = [number]


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)[:200]


def _message_key(number: int) -> str:
    return f"tierkv/message/{number}"


def _read_key(number: int, rank: int) -> str:
    return f"tierkv/read/{number}/{rank}"


def _key(number: int, name: object) -> str:
    return f"tierkv/{number}/{name}"


def _decision_of(votes: list[str]) -> str:
    """Return the decision for all votes; each is numbers and the digest of its topic."""
    numbers, topics = zip(*(vote.split() for vote in votes), strict=True)
    return _LOST_STEP if len(set(topics)) > 1 else " ".join(numbers)
