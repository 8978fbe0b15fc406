"""The speed of moves between the hot and the warm tier, and their effect on a running batch.

Every figure stands beside the link's own speed, measured in the same run, or beside the batch alone.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.ttft import machine, random_model
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import SequenceStep, use_tierkv_attention
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.graphs import GraphedModel
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import probe_layout
from tierkv.kernels.pages import LayerPages, gather_blocks, scatter_blocks
from tierkv.movers.mover import Move, Mover, Ready
from tierkv.movers.pages import PageMover
from tierkv.movers.transfers import MemoryTransferManager, TransferOp
from tierkv.movers.windows import WindowMover, window_format
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout

__all__ = ["MoveFigure", "block_moves", "decode_beside_moves", "link_gb_s", "main"]

_DEVICE = torch.device("cuda")
_LAYOUT = BlockLayout.uniform(num_layers=32, block_size=256, kv_heads=8, head_dim=128, dtype="bfloat16")
_NUM_BLOCKS = 64  # 2 GiB
_NUM_THREADS = 16
_NUM_BYTES = _NUM_BLOCKS * _LAYOUT.block_bytes


@dataclass(frozen=True, slots=True)
class MoveFigure:
    """One move: its name, its kind (raw, bulk, compressed, pages, or a kernel for comparison), direction and speed."""

    what: str
    kind: str
    is_up: bool
    gb_s: float


def main() -> None:
    """Run the benchmark on one GPU and print its table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("  ".join(f"{name}: {value}" for name, value in machine(_DEVICE).items()))
    link_in, link_out = link_gb_s(to_gpu=True), link_gb_s(to_gpu=False)
    print(f"link, one large copy: {link_in:.1f} GB/s in, {link_out:.1f} GB/s out")
    for figure in block_moves():
        ratio = figure.gb_s / (link_in if figure.is_up else link_out)
        print(f"{figure.what}: {figure.gb_s:.1f} GB/s, {ratio:.3f} of the link")
    for what, step_ms, alone_ms, _ in decode_beside_moves():
        print(f"{what}: {step_ms:.2f} ms, {step_ms / alone_ms - 1:+.1%}")


def link_gb_s(*, to_gpu: bool) -> float:
    """Return the speed of one large copy between page-locked memory and the GPU, in GB/s."""
    host = torch.empty(2 << 30, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(2 << 30, dtype=torch.uint8, device=_DEVICE)
    target, source = (gpu, host) if to_gpu else (host, gpu)
    return _gb_s(lambda: target.copy_(source, non_blocking=True), source.numel())


def block_moves() -> Iterator[MoveFigure]:
    """Measure moves of 64 scattered blocks of 32 MiB: raw, compressed, and as an engine's pages."""
    hot = HotPool(_LAYOUT, 2 * _NUM_BLOCKS, _DEVICE)
    _fill(hot)
    warm = WarmPool(_LAYOUT.block_bytes, _NUM_BLOCKS, num_threads=_NUM_THREADS)
    mover = Mover(hot, warm)
    up, down = _scattered_moves()
    for name, is_up, move in (
        ("promote", True, lambda: mover.promote(up)),
        ("demote", False, lambda: mover.demote(down, after=mover.mark())),
    ):
        yield MoveFigure(f"{name} 64 scattered blocks, raw", "raw", is_up, _gb_s(move, _NUM_BYTES))
    yield from _bulk_transfers(hot, mover)
    yield from _compressed_moves(hot, mover)
    for page_size in (16, 256):
        yield from _page_moves(mover, warm, page_size)
    mover.close()
    warm.close()


def _fill(hot: HotPool) -> None:
    """Write normal values with a scale for each channel, like K and V."""
    runs, tokens, channels = 2 * _LAYOUT.num_layers, _LAYOUT.block_size, 8 * 128
    scales = torch.exp(torch.randn(runs, 1, channels, device=_DEVICE) * 0.3)
    for block in range(hot.num_blocks):
        values = torch.randn(runs, tokens, channels, device=_DEVICE) * scales
        hot.blocks[block].copy_(values.to(hot.dtype).view(-1))


def _gb_s(move: Callable[[], object], num_bytes: int) -> float:
    speeds: list[float] = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        move()
        torch.cuda.synchronize()
        speeds.append(num_bytes / (time.perf_counter() - started) / 1e9)
    return statistics.median(speeds[2:])


def _scattered_moves() -> tuple[list[Move], list[Move]]:
    """Return moves in both directions, in random order: no two moves are adjacent."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(2 * _NUM_BLOCKS, generator=generator)[:_NUM_BLOCKS].tolist()
    slots = torch.randperm(_NUM_BLOCKS, generator=generator).tolist()
    pairs = list(zip(slots, blocks, strict=True))
    return [Move(slot, block) for slot, block in pairs], [Move(block, slot) for slot, block in pairs]


@contextmanager
def _window_mover(hot: HotPool, mover: Mover) -> Iterator[WindowMover]:
    form = window_format(_LAYOUT)
    slots = WarmPool(form.slot_bytes, _NUM_BLOCKS, num_threads=_NUM_THREADS)
    windows = WindowMover(hot, slots, form, mover)
    yield windows
    windows.close()
    slots.close()


def _compressed_moves(hot: HotPool, mover: Mover) -> Iterator[MoveFigure]:
    up, down = _scattered_moves()
    whole = [_LAYOUT.block_size] * len(down)
    before = hot.blocks.clone()
    with _window_mover(hot, mover) as windows:
        demote = partial(windows.demote, down, num_tokens=whole, after=[mover.mark()] * len(down))
        gb_s = _gb_s(demote, _NUM_BYTES)
        hot.blocks.zero_()
        windows.promote(up).synchronize()
        torch.cuda.synchronize()
        moved = [move.target for move in up]
        is_exact = torch.equal(hot.blocks[moved].view(torch.int16), before[moved].view(torch.int16))
        hot.blocks.copy_(before)
        what = "64 scattered blocks, compressed" if is_exact else "64 blocks, compressed: NOT EXACT"
        yield MoveFigure(f"promote {what}", "compressed", True, _gb_s(lambda: windows.promote(up), _NUM_BYTES))
        yield MoveFigure(f"demote {what}", "compressed", False, gb_s)


def _bulk_transfers(hot: HotPool, mover: Mover) -> Iterator[MoveFigure]:
    """Measure transfers of the same blocks from and to page-locked memory, and through staging."""
    up, down = _scattered_moves()
    for name, slots in (("page-locked", mover.slots), ("pageable", torch.empty_like(mover.slots).fill_(1))):
        loads = [TransferOp.to_gpu(slots[move.source], hot.bytes_view[move.target]) for move in up]
        stores = [TransferOp.to_cpu(hot.bytes_view[move.source], slots[move.target]) for move in down]
        with MemoryTransferManager(_DEVICE) as manager:
            for way, is_up, ops in (("to_gpu", True, loads), ("to_cpu", False, stores)):
                gb_s = _gb_s(partial(_transfer_all, manager, ops), _NUM_BYTES)
                yield MoveFigure(f"bulk_transfer {way}, 64 scattered blocks, {name}", "bulk", is_up, gb_s)


def _transfer_all(manager: MemoryTransferManager, ops: Sequence[TransferOp]) -> None:
    for handle in manager.bulk_transfer(ops):
        handle.result()


def _page_moves(mover: Mover, warm: WarmPool, page_size: int) -> Iterator[MoveFigure]:
    """Measure loads and stores of an engine's layer-major pages, through staging and by a kernel alone."""
    pages_per_block = _LAYOUT.block_size // page_size
    num_pages = 2 * _NUM_BLOCKS * pages_per_block
    pages = LayerPages(
        [torch.zeros(num_pages, page_size, 8, 128, dtype=torch.bfloat16, device=_DEVICE) for _ in range(64)]
    )
    order = torch.randperm(num_pages, device=_DEVICE)[: _NUM_BLOCKS * pages_per_block]
    page_ids = order.view(_NUM_BLOCKS, pages_per_block)
    blocks = torch.from_numpy(warm.slots)
    rows = list(blocks)
    staged = PageMover(pages, _LAYOUT.block_bytes)
    for name, is_up, kind, move in (
        ("load pages of {}, through staging", True, "pages", lambda: staged.load(rows, page_ids, after=mover.mark())),
        (
            "store pages of {}, through staging",
            False,
            "pages",
            lambda: staged.store(page_ids, rows, after=mover.mark()),
        ),
        (
            "scatter kernel, pages of {}, from CPU memory",
            True,
            "kernel",
            lambda: scatter_blocks(pages, page_ids, blocks),
        ),
        ("gather kernel, pages of {}, to CPU memory", False, "kernel", lambda: gather_blocks(pages, page_ids, blocks)),
    ):
        yield MoveFigure(name.format(page_size), kind, is_up, _gb_s(move, _NUM_BYTES))


def decode_beside_moves() -> Iterator[tuple[str, float, float, float | None]]:
    """Time decode steps of a captured batch of 16 alone, and while blocks move at full speed.

    Yields what moves, milliseconds a step beside it and alone, and the most that their ratio should be.
    """
    model = random_model("8b", _DEVICE)
    layout = probe_layout(model, block_size=256)
    config = CacheConfig(hot_bytes=80 * layout.block_bytes, warm_bytes=8 * layout.block_bytes)
    hot = HotPool(_LAYOUT, 2 * _NUM_BLOCKS, _DEVICE)
    warm = WarmPool(_LAYOUT.block_bytes, _NUM_BLOCKS, num_threads=_NUM_THREADS)
    _fill(hot)
    mover = Mover(hot, warm)
    with (
        TierCache(config, namespace=namespace_of(model, layout), device=_DEVICE) as cache,
        _window_mover(hot, mover) as windows,
        torch.inference_mode(),
        use_tierkv_attention(model),
    ):
        decode = _decoder(model, cache)
        alone = _step_ms(decode, [])
        for name, moves, at_most in _background(mover, windows, warm):
            yield f"decode step of 16 sequences beside {name}", _step_ms(decode, moves), alone, at_most
    mover.close()
    warm.close()


def _background(
    mover: Mover, windows: WindowMover, warm: WarmPool
) -> list[tuple[str, list[Callable[[], Ready]], float | None]]:
    """Return the moves to repeat beside the batch, and the limits."""
    up, down = _scattered_moves()
    side = torch.cuda.Stream(_DEVICE)
    layers = [torch.zeros(2 * _NUM_BLOCKS, 256, 8, 128, dtype=torch.bfloat16, device=_DEVICE) for _ in range(64)]
    pages, slab = LayerPages(layers), torch.from_numpy(warm.slots)
    page_ids = torch.tensor([move.target for move in up], device=_DEVICE).view(-1, 1)
    idle = mover.mark()  # the batch does not use these blocks, so moves wait for none of its work
    whole = [_LAYOUT.block_size] * len(down)
    windows.demote(down, num_tokens=whole, after=[idle] * len(down))

    def on_side(move: Callable[[], Any]) -> Ready:
        with torch.cuda.stream(side):
            move()
            return mover.mark()

    def promote() -> Ready:
        return mover.promote(up, after=idle)

    def demote() -> Ready:
        return mover.demote(down, after=idle)

    def promote_compressed() -> Ready:
        with torch.cuda.stream(side):
            return windows.promote(up)

    def demote_compressed() -> Ready:
        windows.demote(down, num_tokens=whole, after=[idle] * len(down))
        return idle

    return [
        ("promotions", [promote], 1.03),
        ("demotions", [demote], 1.03),
        ("both", [promote, demote], 1.05),
        ("compressed promotions", [promote_compressed], None),
        ("compressed demotions", [demote_compressed], None),
        ("a scatter kernel", [lambda: on_side(lambda: scatter_blocks(pages, page_ids, slab))], None),
    ]


def _decoder(model: Any, cache: TierCache) -> Callable[[], None]:
    """Return a captured decode step of 16 sequences."""
    sequences = [cache.acquire([i] * 1000) for i in range(16)]
    steps = [SequenceStep(block_table=s.block_table, num_past=999, num_new=1) for s in sequences]
    graphs = GraphedModel(model, cache, attention=make_attention("auto", model.device))

    def step() -> None:
        graphs.run(steps, [1] * len(steps))

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step


def _step_ms(step: Callable[[], None], moves: Sequence[Callable[[], Ready]]) -> float:
    """Return the mean milliseconds of a decode step while a thread for each of `moves` repeats it."""
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
