"""LMCache's C++ client of Redis on a server that `benchmarks.remote` runs: the same sizes, another environment.

It is started by `python -m benchmarks.remote --peer PYTHON` and imports nothing of tierkv. PYTHON has lmcache 0.5.6,
installed with --no-deps, and what that imports; a module named `stubs` on PYTHONPATH may stand in for what needs a GPU.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

SIZE_LAYERS, HEADS, DIM, CHUNK, COUNT, ROUNDS = 4, 8, 128, 256, 24, 10  # 4 MiB a block
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure put, get and existence, and print them as benchmarks.remote does."""
    warnings.simplefilter("ignore")
    os.environ["LMCACHE_LOG_LEVEL"] = "ERROR"
    logging.disable(logging.WARNING)
    try:
        import stubs  # type: ignore[import-not-found]

        stubs.install()
    except ImportError:
        pass
    import numpy as np
    import torch
    from lmcache.v1.config import LMCacheEngineConfig  # type: ignore[import-not-found]
    from lmcache.v1.metadata import LMCacheMetadata  # type: ignore[import-not-found]
    from lmcache.v1.storage_backend.connector.redis_connector import RESPConnector  # type: ignore[import-not-found]
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend  # type: ignore[import-not-found]
    from lmcache.v1.token_database import ChunkedTokenDatabase  # type: ignore[import-not-found]

    port, pid = int(os.environ["TIERKV_PORT"]), int(os.environ["TIERKV_PID"])
    shape = (SIZE_LAYERS, 2, CHUNK, HEADS, DIM)
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=True,
        max_local_cpu_size=1.0,
        save_unfull_chunk=False,
        remote_url=f"resp://127.0.0.1:{port}",
        remote_serde="naive",
    )
    metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.bfloat16, shape)
    backend = LocalCPUBackend(config, metadata, dst_device="cpu")
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    database = ChunkedTokenDatabase(config, metadata)

    def keys_of(count: int) -> list[Any]:
        tokens = np.random.randint(0, 1 << 17, count * CHUNK).tolist()
        return [key for _, _, key in database.process_tokens(tokens=tokens)]

    async def connect() -> Any:
        return RESPConnector("127.0.0.1", port, loop, backend, 8)

    client = run(connect())
    keys = keys_of(COUNT)
    blocks = [backend.allocate(client.meta_shapes, client.meta_dtypes, client.meta_fmt) for _ in keys]
    size = sum(memoryview(block.byte_array).nbytes for block in blocks)

    def get() -> None:
        for block in run(client._batched_get(keys)):
            if block is not None:
                block.ref_count_down()

    for name, work in (
        ("LMCache resp:// put (C++, 8 threads)", lambda: run(client._batched_put(keys, blocks))),
        ("LMCache resp:// get", get),
    ):
        client_s, server_s, best_s = time.process_time(), cpu_of(pid), float("inf")
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            work()
            best_s = min(best_s, time.perf_counter() - begin)
        used = size * ROUNDS / 1e9
        client_s, server_s = (time.process_time() - client_s) / used, (cpu_of(pid) - server_s) / used
        print(
            f"  {name:60s} CPU s/GB {client_s + server_s:5.2f} (client {client_s:.2f}, server {server_s:.2f})  "
            f"{size / best_s / 1e9:.2f} GB/s"
        )
    many = keys_of(128)
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        client.batched_contains(many)
        times.append(time.perf_counter() - begin)
    print(f"LMCache: existence of 128 blocks that are not there {1e6 * min(times):.0f} us", flush=True)
    os._exit(0)  # its threads do not end


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / TICKS


if __name__ == "__main__":
    main()
