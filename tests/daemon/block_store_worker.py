"""A block store in a process of its own: `python block_store_worker.py ACTION SOCKET` prints "ready", then sleeps."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from stored_blocks import LAYOUT, NAMESPACE, TOKENS, save

from tierkv import BlockStore, BlockStoreConfig, Namespace


def main(action: str, socket: Path) -> None:
    store = BlockStore(BlockStoreConfig(socket=socket), namespace=Namespace(weights="weights", layout=LAYOUT))
    assert store.namespace == NAMESPACE
    keys = store.keys(TOKENS)[:8]
    assert save(store, keys) == 8
    if action == "reserve":
        assert store.reserve(keys).is_ready
    elif action == "pin":
        assert store.pin(keys, ttl_s=600) == 8
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
