"""A store that only looks up, where torch cannot be imported: `python lookup_worker.py SOCKET` prints what is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


class NoTorch:
    """Refuses to import what a scheduler need not have."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ("torch", "triton", "transformers"):
            raise ImportError(f"{name} was imported")


if __name__ == "__main__":
    sys.meta_path.insert(0, NoTorch())  # type: ignore[arg-type]
    from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace

    layout = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
    config = BlockStoreConfig(socket=Path(sys.argv[1]), warm_bytes=0)
    with BlockStore(config, namespace=Namespace(weights="weights", layout=layout)) as store:
        found = store.contains(store.keys(range(100, 260)))
        maps = Path("/proc/self/maps").read_text()
        files = [str(each.resolve()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        is_mapped = "tierkv-warm" in maps or any("tierkv-warm" in each for each in files)
        print(found, "mapped" if is_mapped else "not mapped", sorted({"torch", "numpy"} & set(sys.modules)))
