"""Keys as the daemon's messages name them: one chain from the namespace on, or rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeAlias

from tierkv.block_store.engines import EnginePool
from tierkv.block_store.keys import BlockKey
from tierkv.daemon.messages import Chain, Match, Pin
from tierkv.transfer.daemon_connection import DaemonConnection
from tierkv.values.namespace import Namespace, has_rows

__all__ = ["Connection", "DaemonChains"]

Connection: TypeAlias = DaemonConnection[EnginePool]


class DaemonChains:
    """Makes messages for one namespace. The daemon finds a block only behind all blocks that it follows."""

    def __init__(self, namespace: Namespace) -> None:
        self._has_rows = has_rows(namespace.architecture)
        self._root = namespace.digest
        self._no_partial = namespace.layout.block_size + 1

    def leading(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Return the leading keys that one message can name: each follows the one before, or rows that all differ."""
        found = list(keys)
        parent = self._root
        seen: set[bytes] = set()
        for at, key in enumerate(found):
            if key.parent_hash != parent or key.block_hash in seen:
                return found[:at]
            if self._has_rows:
                seen.add(key.block_hash)
            else:
                parent = key.block_hash
        return found

    def match(self, chain: Sequence[BlockKey], start: int = 0, *, lease: bool = False, is_use: bool = False) -> Match:
        """Return the question which blocks are there, from `start` on. A partial block is no answer."""
        hashes, tokens = _packed(chain)
        return Match(
            hashes=hashes, tokens=tokens, start=start, min_partial_tokens=self._no_partial, lease=lease, is_use=is_use
        )

    def pin(self, chain: Sequence[BlockKey], pinned: bool) -> Pin:
        """Return the request to pin blocks, or to unpin them."""
        hashes, tokens = _packed(chain)
        return Pin(hashes=hashes, tokens=tokens, pinned=pinned)

    def chain(self, chain: Sequence[BlockKey], start: int) -> Chain:
        """Return the proposal to write the blocks from `start` on."""
        hashes, tokens = _packed(chain)
        return Chain(hashes, tokens, array("I", range(start, len(chain))).tobytes())


def _packed(chain: Sequence[BlockKey]) -> tuple[bytes, bytes]:
    return b"".join(key.block_hash for key in chain), b"".join(key.token_bytes for key in chain)
