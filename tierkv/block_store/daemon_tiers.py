"""DaemonBlockTiers: the daemon's warm and cold tiers as one block store sees them.

The socket carries keys and slot numbers; blocks are copied from and to the daemon's memory, which is mapped here. A
store that only looks up does not map it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.daemon_chains import Connection, DaemonChains
from tierkv.block_store.daemon_loading import DaemonLoader
from tierkv.block_store.daemon_saving import DaemonSaver
from tierkv.block_store.engines import EnginePool, Engines
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.placement import Placement
from tierkv.block_store.reservation import Reservation
from tierkv.block_store.transfers import Load, Save
from tierkv.daemon.eviction_messages import EvictBlocks, EvictedBlocks, EvictionDone
from tierkv.daemon.messages import NO_SLOT, Count, Done, Flush
from tierkv.daemon.protocol import split_numbers
from tierkv.errors import DaemonError
from tierkv.storage.cold import ColdStore
from tierkv.transfer.daemon_connector import DaemonConnector
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import OwnedCondition
from tierkv.values.namespace import Namespace
from tierkv.values.remote_stats import RemoteStats
from tierkv.values.stats import StatsRecorder, TierStats

if TYPE_CHECKING:
    import torch

    from tierkv.movers.engine_memory import EngineMemory
from tierkv.values.users import user_id

__all__ = ["DaemonBlockTiers"]

_log = logging.getLogger(__name__)

_STALL_S = 30.0  # at the end, how long one copy may take


@dataclass(frozen=True, slots=True)
class _Pin:
    """A block that this process leases until a time of the clock."""

    connection: Connection
    slot: int
    until: float


class DaemonBlockTiers:
    """Satisfies `BlockTiers`. No method raises for a daemon that is gone, hangs or gives impossible answers.

    Raises DaemonError if the daemon refuses the namespace or speaks another version.
    """

    def __init__(
        self,
        config: BlockStoreConfig,
        socket: Path,
        namespace: Namespace,
        *,
        stats: StatsRecorder,
        changed: OwnedCondition,
        clock: Callable[[], float],
    ) -> None:
        self._namespace = namespace
        self._changed = changed
        self._clock = clock
        self._chains = DaemonChains(namespace)
        self._pins: dict[BlockHash, _Pin] = {}
        self._answered: tuple[Connection, int] | None = None
        self._engines = Engines(namespace.layout)
        self._connector: DaemonConnector[EnginePool] = DaemonConnector(
            socket,
            namespace,
            open_mover=self._engines.open if config.warm_bytes else None,
            changed=changed,
            connected=lambda _: None,
            maintain=self._maintain,
            timeout_s=config.daemon_timeout_s,
            daemon_user=None if config.daemon_user is None else user_id(config.daemon_user),
        )
        arguments = lambda: self._connector.connection, self._chains, namespace.layout, stats, changed
        self._loader = DaemonLoader(*arguments, room_wait_s=config.write_wait_s)
        self._saver = DaemonSaver(*arguments)
        try:
            self._connector.start()
        except BaseException:
            self.close()
            raise

    @property
    def cold(self) -> ColdStore | None:
        """Return None: the store on disk is the daemon's."""
        return None

    def register(self, layers: Sequence[Sequence[torch.Tensor]], *, pages_per_block: int) -> EngineMemory:
        """Return an engine's tensors as memory to copy to and from, through this connection and later ones."""
        return self._engines.register(layers, pages_per_block=pages_per_block)

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks the daemon has."""
        return self._loader.contains(keys)

    def origin(self, keys: Sequence[BlockKey]) -> Origin:
        """Return DISK: only the daemon knows."""
        return Origin.DISK

    def reserve(self, keys: Sequence[BlockKey], start: int) -> Reservation:
        """Lease blocks."""
        return self._loader.reserve(keys, start)

    def load(self, reservation: Reservation, targets: Placement) -> Load:
        """Copy reserved blocks to the engine."""
        return self._loader.load(reservation, targets)

    def save(self, keys: Sequence[BlockKey], sources: Placement, start: int) -> Save:
        """Copy blocks into reserved slots, and publish them."""
        return self._saver.save(keys, sources, start)

    decodes_on_gpu = False  # the daemon decodes for all its clients

    def calibrate(self, costs: LoadOrCompute) -> None:
        """Measure nothing: a daemon reads for many clients."""

    def end_calibration(self) -> None:
        """Nothing is measured."""

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Notify the daemon of a use. Waits for no answer."""
        chain = self._chains.leading(keys)
        if chain and (connection := self._connector.connection):
            try:
                connection.post(self._chains.match(chain, is_use=True))
            except DaemonError as exc:  # too long a message
                _log.debug("the use of %d blocks is not noted: %s", len(chain), exc)

    def pin(self, keys: Sequence[BlockKey], ttl_s: float | None) -> int:
        """Pin blocks in both tiers; with a time, lease those in the warm one until then."""
        self._saver.flush()
        chain = self._chains.leading(keys)
        if ttl_s is None:
            return self._set_pinned(chain, True)
        connection = self._connector.connection
        if connection is None or not chain:
            return 0
        try:
            answer = connection.match(self._chains.match(chain, lease=True))
            connection.end_cursor(answer.cursor)
            slots = split_numbers(answer.slots)
            connection.lease([slot for slot in slots if slot != NO_SLOT])
        except DaemonError as exc:
            _log.warning("%d blocks were not pinned: %s", len(chain), exc)
            return 0
        with self._changed:
            self._release_pins(chain[: len(slots)])
            for key, slot in zip(chain, slots, strict=False):
                if slot != NO_SLOT:
                    self._pins[key.block_hash] = _Pin(connection, slot, self._clock() + ttl_s)
        return len(slots)

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        """Let blocks be evicted again."""
        with self._changed:
            self._release_pins(keys)
        return self._set_pinned(self._chains.leading(keys), False)

    def clear(self) -> int:
        """Evict all blocks of the namespace from the daemon's tiers; 0, and a warning, if it cannot."""
        self._saver.flush()
        try:
            answer = self._connector.call_long(EvictBlocks(namespace=self._namespace.digest), EvictedBlocks)
        except DaemonError as exc:
            _log.warning("nothing was evicted: %s", exc)
            return 0
        return max(answer.warm, answer.cold)

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers."""
        return self._connector.sizes()

    def remote_stats(self) -> tuple[RemoteStats, ...]:
        """Return nothing: the daemon has the remote tiers."""
        return ()

    def flush(self) -> None:
        """Wait until the daemon has put all saved blocks on the disk, or warn that it cannot."""
        if not self._saver.flush():
            _log.warning("not flushed: a copy does not end")
            return
        try:
            self._connector.call_long(Flush(), Done)
        except DaemonError as exc:
            _log.warning("not flushed: %s", exc)

    def close(self) -> bool:
        """End all copies and the connection. Return whether a hanging copy has kept it open."""
        is_idle = self._loader.close(stall_s=_STALL_S)
        is_idle = self._saver.close(stall_s=_STALL_S) and is_idle
        with self._changed:
            self._release_pins(list(self._pins))
        self._connector.close(is_idle=is_idle)
        if is_idle:
            self._engines.close()
        return not is_idle

    def _set_pinned(self, chain: Sequence[BlockKey], pinned: bool) -> int:
        try:
            return self._connector.call_long(self._chains.pin(chain, pinned), Count).count if chain else 0
        except DaemonError as exc:
            _log.warning("%d blocks were not %s: %s", len(chain), "pinned" if pinned else "unpinned", exc)
            return 0

    def _release_pins(self, keys: Sequence[BlockKey] | Sequence[BlockHash]) -> None:
        """End the leases of pinned blocks; the caller holds the lock."""
        assert self._changed.is_owned()
        for key in keys:
            pin = self._pins.pop(key.block_hash if isinstance(key, BlockKey) else key, None)
            if pin:
                pin.connection.return_leases([pin.slot])

    def _maintain(self) -> None:
        """Return leases, those of pins whose time is over included, and answer evictions. A thread calls this."""
        with self._changed:
            self._loader.reap()
            now = self._clock()
            over = [each for each, pin in self._pins.items() if pin.until <= now or pin.connection.is_retired]
            self._release_pins(over)
        connection = self._connector.connection
        if connection is None:
            self._answered = None
            return
        connection.send_returned()
        connection.read_waiting()
        self._answer_eviction(connection)

    def _answer_eviction(self, connection: Connection) -> None:
        """Notify the daemon that this store keeps no copy of what was evicted, so that it does not wait for it."""
        newest = connection.client.last_eviction
        if self._answered != (connection, newest):
            connection.post(EvictionDone(number=newest, blocks=0, in_use=0, pinned=0))
            self._answered = connection, newest
