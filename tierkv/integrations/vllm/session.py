"""The block store of one engine. The worker side opens it; a scheduler side in the same process uses it, too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.plan import StepPlan
from tierkv.values.namespace import Namespace

__all__ = ["Reserved", "Session", "close_session", "find_session", "open_session"]


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation on its way to the worker side. read_s: how long its cold blocks took."""

    reservation: Reservation
    read_s: float
    origin: Origin


class Session:
    """One engine's block store and what both sides of the connector share where they are in one process.

    reserved: blocks of requests whose hit was announced, until the worker side loads them.
    run_now: carries out a plan of the worker side between two steps: after a request's end no further step may come.
    renew_now: lets the worker side begin a namespace with another salt. num_workers: of this machine.
    """

    def __init__(self, options: Options, namespace: Namespace, *, num_workers: int = 1) -> None:
        self.options = options
        self.namespace = namespace
        self._config = options.store_config(num_workers=num_workers)
        self.store: BlockStore = BlockStore(self._config, namespace=namespace)
        self.costs: LoadOrCompute = LoadOrCompute(block_size=namespace.layout.block_size)
        self.reserved: dict[str, Reserved] = {}
        self.run_now: Callable[[StepPlan], None] | None = None
        self.renew_now: Callable[[str], None] | None = None

    def take(self, request_id: str) -> Reserved | None:
        """Return what is reserved for a request; the caller owns it from now on."""
        return self.reserved.pop(request_id, None)

    def reopen(self, salt: str) -> None:
        """Close the store and open it for another namespace, which has no blocks. The caller ends copies first."""
        self.close()
        self.store = BlockStore(self._config, namespace=replace(self.namespace, salt=salt))

    def close(self) -> None:
        """Write what is pending, then close the store."""
        for reserved in self.reserved.values():
            reserved.reservation.release()
        self.reserved.clear()
        self.store.flush()
        self.store.close()


_sessions: dict[str, Session] = {}  # by engine id: vLLM builds both sides, and gives them nothing else in common
_lock = threading.Lock()


def open_session(engine_id: str, make: Callable[[], Session]) -> Session:
    """Open the session of an engine in this process."""
    session = make()
    with _lock:
        _sessions[engine_id] = session
    return session


def find_session(engine_id: str) -> Session | None:
    """Return the session that the worker side of this process has opened; None if the worker is another process."""
    with _lock:
        return _sessions.get(engine_id)


def close_session(engine_id: str) -> None:
    """Close the session of an engine, if it is open."""
    with _lock:
        session = _sessions.pop(engine_id, None)
    if session:
        session.close()
