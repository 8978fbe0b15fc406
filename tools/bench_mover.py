"""How fast blocks move between the hot and the warm tier, and what a running batch notices of it.

Every figure stands beside the link's own speed, measured in the same run, or beside the batch alone.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tierkv.attention import SequenceStep, use_tierkv_attention
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.fingerprint import namespace_of
from tierkv.gate import probe_layout
from tierkv.graphs import GraphedModel
from tierkv.kernels.pages import LayerPages, gather_blocks, scatter_blocks
from tierkv.layout import BlockLayout
from tierkv.mover import Move, Mover, Ready
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.tools.bench_ttft import machine, random_model

__all__ = ["main"]

_DEVICE = torch.device("cuda")
_LAYOUT = BlockLayout.uniform(num_layers=32, block_size=256, kv_heads=8, head_dim=128, dtype="bfloat16")
_NUM_BLOCKS = 64  # 2 GiB


def main() -> None:
    """Run the benchmark on one GPU and print its table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("  ".join(f"{name}: {value}" for name, value in machine(_DEVICE).items()))
    link_in, link_out = _link(to_gpu=True), _link(to_gpu=False)
    print(f"link, one large copy: {link_in:.1f} GB/s in, {link_out:.1f} GB/s out")
    hot, warm = HotPool(_LAYOUT, 2 * _NUM_BLOCKS, _DEVICE), WarmPool(_LAYOUT.block_bytes, _NUM_BLOCKS, num_threads=16)
    mover = Mover(hot, warm)
    _bench_blocks(mover, link_in, link_out)
    for page_size in (16, 256):
        _bench_pages(warm, page_size, link_in, link_out)
    print("LMCache 0.5.1's multi-layer transfer on such a machine: 50.3 to 51.1 in, 51.9 to 52.1 GB/s out")
    _bench_decode(mover, warm)
    mover.close()


def _gb_s(move: Callable[[], object], num_bytes: int) -> float:
    speeds: list[float] = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        move()
        torch.cuda.synchronize()
        speeds.append(num_bytes / (time.perf_counter() - started) / 1e9)
    return statistics.median(speeds[1:])


def _link(*, to_gpu: bool) -> float:
    host = torch.empty(2 << 30, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(2 << 30, dtype=torch.uint8, device=_DEVICE)
    target, source = (gpu, host) if to_gpu else (host, gpu)
    return _gb_s(lambda: target.copy_(source, non_blocking=True), source.numel())


def _scattered() -> tuple[list[int], list[int]]:
    """Return block ids and warm slots in random order: no two neighbours stay neighbours."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randperm(2 * _NUM_BLOCKS, generator=generator)[:_NUM_BLOCKS].tolist(),
        torch.randperm(_NUM_BLOCKS, generator=generator).tolist(),
    )


def _bench_blocks(mover: Mover, link_in: float, link_out: float) -> None:
    blocks, slots = _scattered()
    up = [Move(slot, block) for slot, block in zip(slots, blocks, strict=True)]
    down = [Move(block, slot) for slot, block in zip(slots, blocks, strict=True)]
    num_bytes = _NUM_BLOCKS * _LAYOUT.block_bytes
    ways: dict[str, tuple[Callable[[], Ready], float]] = {
        "promote": (lambda: mover.promote(up), link_in),
        "demote": (lambda: mover.demote(down, after=mover.mark()), link_out),
    }
    for name, (move, link) in ways.items():
        speed = _gb_s(move, num_bytes)
        ratio = f"{speed / link:.3f} of the link (>= 0.98)"
        print(f"{name} {_NUM_BLOCKS} scattered blocks of 32 MiB: {speed:.1f} GB/s, {ratio}")


def _bench_pages(warm: WarmPool, page_size: int, link_in: float, link_out: float) -> None:
    """Gather and scatter between layer-major pages and the warm slab, which is page-locked."""
    pages_per_block = _LAYOUT.block_size // page_size
    num_pages = 2 * _NUM_BLOCKS * pages_per_block
    layers = [torch.zeros(num_pages, page_size, 8, 128, dtype=torch.bfloat16, device=_DEVICE) for _ in range(64)]
    pages = LayerPages(layers)
    order = torch.randperm(num_pages, device=_DEVICE)[: _NUM_BLOCKS * pages_per_block]
    page_ids = order.view(_NUM_BLOCKS, pages_per_block)
    blocks = torch.from_numpy(warm.slots)
    num_bytes = _NUM_BLOCKS * _LAYOUT.block_bytes
    for name, move, link in (("scatter", scatter_blocks, link_in), ("gather ", gather_blocks, link_out)):
        for num_programs in (16, 128, 512):
            speed = _gb_s(partial(move, pages, page_ids, blocks, num_programs=num_programs), num_bytes)
            print(
                f"{name} pages of {page_size}, {num_programs} programs: {speed:.1f} GB/s, "
                f"{speed / link:.3f} of the link (>= 0.92)"
            )


def _bench_decode(mover: Mover, warm: WarmPool) -> None:
    """Time decode steps of a captured batch of 16 alone, and while blocks move at full speed."""
    model = random_model("8b", _DEVICE)
    layout = probe_layout(model, block_size=256)
    config = CacheConfig(hot_bytes=80 * layout.block_bytes, warm_bytes=8 * layout.block_bytes)
    blocks, slots = _scattered()
    up = [Move(slot, block) for slot, block in zip(slots, blocks, strict=True)]
    down = [Move(block, slot) for slot, block in zip(slots, blocks, strict=True)]
    layers = [torch.zeros(2 * _NUM_BLOCKS, 256, 8, 128, dtype=torch.bfloat16, device=_DEVICE) for _ in range(64)]
    pages = LayerPages(layers)
    page_ids = torch.tensor(blocks, device=_DEVICE).view(-1, 1)
    slab = torch.from_numpy(warm.slots)
    side = torch.cuda.Stream(_DEVICE)

    def promote() -> Ready:
        with torch.cuda.stream(side):  # an idle stream: what is promoted here is nobody's, and waits for nobody
            return mover.promote(up)

    def kernel() -> Ready:
        with torch.cuda.stream(side):
            scatter_blocks(pages, page_ids, slab)
            return mover.mark()

    with (
        TierCache(config, namespace=namespace_of(model, layout), device=_DEVICE) as cache,
        torch.inference_mode(),
        use_tierkv_attention(model),
    ):
        decode = _decoder(model, cache)
        alone = _step_ms(decode, [])
        print(f"decode of 16 sequences of 1,000 tokens, CUDA graph: {alone:.2f} ms a step alone")
        idle = mover.mark()  # demotions behind the first steps only: they wait for nothing of the batch
        for name, moves, limit in (
            ("promoting", [promote], "<= 3 %"),
            ("demoting", [lambda: mover.demote(down, after=idle)], "<= 3 %"),
            ("both", [promote, lambda: mover.demote(down, after=idle)], "<= 5 %"),
            ("scatter kernel", [kernel], "for comparison"),
        ):
            beside = _step_ms(decode, moves)
            print(f"  while {name}: {beside:.2f} ms, {beside / alone - 1:+.1%} ({limit})")


def _decoder(model: Any, cache: TierCache) -> Callable[[], None]:
    """Return one decode step of 16 sequences, captured."""
    sequences = [cache.acquire([i] * 1000) for i in range(16)]
    steps = [SequenceStep(block_table=s.block_table, num_past=999, num_new=1) for s in sequences]
    graphs = GraphedModel(model, cache)

    def step() -> None:
        graphs.run(steps, [1] * len(steps))

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step


def _step_ms(step: Callable[[], None], moves: Sequence[Callable[[], Ready]]) -> float:
    """Return the mean milliseconds of a decode step while `moves` are repeated by threads of their own."""
    stop = threading.Event()

    def repeat(move: Callable[[], Ready]) -> None:
        while not stop.is_set():
            move().synchronize()

    threads = [threading.Thread(target=repeat, args=(move,)) for move in moves]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(200):
        step()
    end.record()
    end.synchronize()
    stop.set()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 200


if __name__ == "__main__":
    main()
