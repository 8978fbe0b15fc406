"""The speed of the block store with an engine's pages on one GPU, beside the link's own.

Pages of several sizes: a block of 256 tokens of an 8B model is one page of 256 tokens, or 16 of 16. A load is measured
from the warm memory, and after a restart from the page cache; a save until its pages may be overwritten.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.mover import link_gb_s
from benchmarks.ttft import machine
from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Namespace, Strided

__all__ = ["main"]

_NUM_BLOCKS = 32
_LAYERS, _HEADS, _DIM = 32, 8, 128
_LAYOUT = BlockLayout.uniform(num_layers=_LAYERS, block_size=256, kv_heads=_HEADS, head_dim=_DIM, dtype="bfloat16")


def main() -> None:
    """Run the benchmark on one GPU and print its table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("  ".join(f"{name}: {value}" for name, value in machine(torch.device("cuda")).items()))
    gib = _NUM_BLOCKS * _LAYOUT.block_bytes / 1e9
    print(
        f"link: {link_gb_s(to_gpu=True):.1f} GB/s in, {link_gb_s(to_gpu=False):.1f} out; {gib:.2f} GB a prompt of 8192"
    )
    print(f"{'page':>5} {'save call':>10} {'save':>8} {'load call':>10} {'layer 0':>8} {'load':>8} {'restart':>9}   ms")
    for page_tokens in (256, 64, 16):
        print(f"{page_tokens:>5} " + _measure(page_tokens))


def _measure(page_tokens: int) -> str:
    per_block = 256 // page_tokens
    num_pages = _NUM_BLOCKS * per_block + 8
    shape = (num_pages, _HEADS, page_tokens, 2 * _DIM)
    layers = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16)] for _ in range(_LAYERS)]
    pages = [[block * per_block + at for at in range(per_block)] for block in range(_NUM_BLOCKS)]
    namespace = Namespace(weights="benchmark", layout=_LAYOUT, architecture={"page": page_tokens})
    with tempfile.TemporaryDirectory(prefix="tierkv-") as folder:
        config = BlockStoreConfig(cold_path=Path(folder), warm_bytes=8 << 30, num_io_threads=16)
        with BlockStore(config, namespace=namespace) as store:
            memory = store.register(layers, pages_per_block=per_block)
            saves, save_calls = [], []
            for round_ in range(4):
                keys = store.keys([round_, *range(1, _NUM_BLOCKS * 256)])
                torch.cuda.synchronize()
                started = time.perf_counter()
                save = store.save(keys, Strided(memory, pages))
                save_calls.append(time.perf_counter() - started)
                save.synchronize()
                saves.append(time.perf_counter() - started)
                store.flush()
            loads, calls, firsts = [], [], []
            for _ in range(6):
                torch.cuda.synchronize()
                started = time.perf_counter()
                load = store.load(store.reserve(keys), Strided(memory, pages))
                calls.append(time.perf_counter() - started)
                load.wait(0)
                torch.cuda.current_stream().synchronize()
                firsts.append(time.perf_counter() - started)
                load.synchronize()
                loads.append(time.perf_counter() - started)
                assert load.num_loaded == _NUM_BLOCKS
        with BlockStore(config, namespace=namespace) as store:
            memory = store.register(layers, pages_per_block=per_block)
            colds = []
            for round_ in range(4):
                keys = store.keys([round_, *range(1, _NUM_BLOCKS * 256)])
                started = time.perf_counter()
                load = store.load(store.reserve(keys), Strided(memory, pages))
                load.synchronize()
                colds.append(time.perf_counter() - started)
                assert load.num_loaded == _NUM_BLOCKS
    times = (save_calls, saves, calls, firsts, loads, colds)
    widths = (10, 8, 10, 8, 8, 9)
    return " ".join(f"{1000 * statistics.median(each[1:]):>{w}.2f}" for each, w in zip(times, widths, strict=True))


if __name__ == "__main__":
    main()
