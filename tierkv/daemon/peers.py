"""Peers: the processes at the other ends of the connections. The end of a process ends its connections.

A socket stays open as long as any process has it. So a client that has forked leaves its connection to its child, which
does not use it. The daemon therefore waits for the end of the process that connected, on a process descriptor (pidfd).
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

    ended: called for each client of a process that has ended. most: connections of one process.
    """

    def __init__(self, *, ended: Callable[[Client], None], most: int) -> None:
        self._ended = ended
        self._most = most
        self._peers: dict[int, _Peer[Client]] = {}
        self._peer_of: dict[Client, _Peer[Client]] = {}

    def add(self, client: Client, pid: int) -> None:
        """Add a connection of a process.

        Raises CapacityError if the process has too many, DaemonError if it has ended already.
        """
        peer = self._peers.get(pid)
        if peer is not None and _has_ended(peer.descriptor):  # another process has its id by now
            self._end(peer)
            peer = None
        if peer is None:
            peer = _Peer(pid, _open_process(pid))
            if peer.descriptor is not None:
                asyncio.get_running_loop().add_reader(peer.descriptor, self._end, peer)
            self._peers[pid] = peer
        elif len(peer.clients) >= self._most:
            raise CapacityError(f"process {pid} has {len(peer.clients)} connections already")
        peer.clients.append(client)
        self._peer_of[client] = peer

    def remove(self, client: Client) -> None:
        """Remove a connection that has ended. One that was not added is no error."""
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
        """Forget all processes."""
        for peer in list(self._peers.values()):
            self._forget(peer)

    def _end(self, peer: _Peer[Client]) -> None:
        """End the connections of a process that has ended, though another process may have them open."""
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
    if pid <= 0:  # a process outside this process's namespace
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise DaemonError(f"process {pid} has ended") from exc
    except (OSError, AttributeError) as exc:
        _log.warning("the end of process %d is not noticed while a child of it has the socket: %s", pid, exc)
        return None


def _has_ended(descriptor: int | None) -> bool:
    if descriptor is None:
        return False
    poller = select.poll()
    with contextlib.suppress(OSError):
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(0))
    return False
