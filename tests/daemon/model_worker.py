"""A model over the daemon, as a process: `python model_worker.py SOCKET CACHE_DIR OUTPUT`; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tierkv.config import CacheConfig
from tierkv.engine.models import load_model
from tierkv.engine.runner import GenerationOptions, open_runner

if __name__ == "__main__":
    socket, cache_dir, output = map(Path, sys.argv[1:])
    prompt = [(7 * i * i + 3 * i) % 250 for i in range(300)]
    config = CacheConfig(socket=socket, block_size=64, hot_bytes=64 << 20)
    with open_runner(load_model(None, cache_dir=cache_dir, device="cpu"), config) as runner:
        options = GenerationOptions(max_new_tokens=3, keep_logits=True, store_partial=True, stop_ids=frozenset())
        result = runner.generate([prompt], options)[0]
        runner.cache.flush()
        assert runner.cache._daemon is not None and runner.cache._daemon.connection is not None
        client = runner.cache._daemon.connection.client
        torch.save(result.logits, output)
        print(
            json.dumps(
                {
                    "token_ids": result.token_ids,
                    "cached_tokens": {tier.value: count for tier, count in result.cached_tokens.items()},
                    "socket_bytes": client.bytes_sent + client.bytes_received,
                    "block_bytes": runner.cache.layout.block_bytes,
                }
            )
        )
