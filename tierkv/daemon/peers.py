"""Peers: the processes at the other ends of the connections, how many connections each has, and when it ends.

A socket stays open as long as any process has it. So a client that has forked and dies leaves its connection to a
child that knows nothing of it: what ends a connection is the end of the process that opened it, as a process
descriptor (pidfd) tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tierkv.errors import CapacityError, DaemonError

__all__ = ["Peers"]

_log = logging.getLogger(__name__)

Client = TypeVar("Client")


@dataclass(slots=True, eq=False)
class _Peer(Generic[Client]):
    """One process. descriptor: None where the system has none for it (another container's, an old kernel)."""

    pid: int
    descriptor: int | None
    clients: list[Client] = field(default_factory=list)


class Peers(Generic[Client]):
    """Processes with connections. Used on the loop alone.

    ended: called for each client of a process that has ended. most: connections that one process may have.
    """

    def __init__(self, *, ended: Callable[[Client], None], most: int) -> None:
        self._ended = ended
        self._most = most
        self._peers: dict[int, _Peer[Client]] = {}
        self._peer_of: dict[Client, _Peer[Client]] = {}

    def admit(self, client: Client, pid: int) -> None:
        """Note a connection of a process.

        Raises CapacityError if the process has too many, DaemonError if it has ended already.
        """
        peer = self._peers.get(pid)
        if peer is not None and _has_ended(peer.descriptor):  # its number belongs to another process by now
            self._bury(peer)
            peer = None
        if peer is None:
            peer = _Peer(pid, _open_process(pid))
            if peer.descriptor is not None:
                asyncio.get_running_loop().add_reader(peer.descriptor, self._bury, peer)
            self._peers[pid] = peer
        elif len(peer.clients) >= self._most:
            raise CapacityError(f"process {pid} has {len(peer.clients)} connections already")
        peer.clients.append(client)
        self._peer_of[client] = peer

    def leave(self, client: Client) -> None:
        """Forget a connection that has ended. One that was not admitted is no error."""
        peer = self._peer_of.pop(client, None)
        if peer is None:
            return
        peer.clients.remove(client)
        if not peer.clients:
            self._forget(peer)

    def counts(self) -> list[int]:
        """Return how many connections each process has."""
        return [len(peer.clients) for peer in self._peers.values()]

    def close(self) -> None:
        """Watch no process any more."""
        for peer in list(self._peers.values()):
            self._forget(peer)

    def _bury(self, peer: _Peer[Client]) -> None:
        """A process has ended: so have its connections, whoever else has them open."""
        self._forget(peer)
        for client in peer.clients:
            self._ended(client)

    def _forget(self, peer: _Peer[Client]) -> None:
        if self._peers.get(peer.pid) is peer:
            del self._peers[peer.pid]
        if peer.descriptor is not None:
            asyncio.get_running_loop().remove_reader(peer.descriptor)
            os.close(peer.descriptor)
            peer.descriptor = None


def _open_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends. Raises DaemonError if it has ended."""
    if pid <= 0:  # it lives where this process cannot see it
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise DaemonError(f"process {pid} has ended") from exc
    except (OSError, AttributeError) as exc:
        _log.warning("the end of process %d will not be noticed while a child of it has its socket: %s", pid, exc)
        return None


def _has_ended(descriptor: int | None) -> bool:
    if descriptor is None:
        return False
    poller = select.poll()
    with contextlib.suppress(OSError):
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(0))
    return False
