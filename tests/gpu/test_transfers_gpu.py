"""Transfers to and from a real GPU: every byte arrives, with priorities, cancelling and little staging memory."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from torch import Tensor

from tierkv.background.work_queue import Priority
from tierkv.errors import TransferCancelledError
from tierkv.movers.transfers import Direction, MemoryTransferManager, TransferHandle, TransferOp

DEVICE = "cuda"


def random_bytes(num_bytes: int, *, seed: int, device: str = "cpu", pinned: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return (values.pin_memory() if pinned else values).to(device)


@pytest.mark.parametrize("pool_bytes", [8 * 4096, 64 << 20])
def test_random_priorities_and_cancels_leave_every_byte_in_its_place(pool_bytes: int) -> None:
    rng, begun = random.Random(0), list[tuple[TransferHandle, Tensor]]()
    with MemoryTransferManager(DEVICE, pinned_memory_pool_size=pool_bytes) as manager:
        for seed in range(200):
            way, pinned = rng.choice(list(Direction)), rng.random() < 0.5
            source = random_bytes(rng.randrange(1, 1 << 20), seed=seed, pinned=pinned)
            target = torch.empty_like(source, pin_memory=pinned) if way is Direction.TO_CPU else None
            on_gpu = way is Direction.TO_CPU
            op = TransferOp(
                source=source.to(DEVICE) if on_gpu else source,
                direction=way,
                target=target,
                priority=rng.choice(list(Priority)),
            )
            (handle,) = manager.bulk_transfer([op])
            del op, target  # only the manager holds them: their memory must not be reused yet
            begun.append((handle, source))
            if not rng.randrange(5):
                handle.cancel()
        for handle, source in begun:
            try:
                assert torch.equal(handle.result().cpu(), source)
            except TransferCancelledError:
                assert handle.is_cancelled


def test_a_transfer_waits_for_the_computation_that_writes_its_source() -> None:
    with MemoryTransferManager(DEVICE) as manager:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            values = torch.zeros(32 << 20, dtype=torch.uint8, device=DEVICE)
            torch.cuda._sleep(200_000_000)
            values.fill_(7)
            (handle,) = manager.bulk_transfer([TransferOp.to_cpu(values)])
        assert not handle.done()
        assert bool((handle.result() == 7).all())


def test_a_target_is_not_overwritten_before_its_last_reader_is_through() -> None:
    with MemoryTransferManager(DEVICE) as manager:
        target = torch.full((32 << 20,), 1, dtype=torch.uint8, device=DEVICE)
        torch.cuda._sleep(200_000_000)
        seen = target.clone()
        (handle,) = manager.bulk_transfer([TransferOp.to_gpu(random_bytes(32 << 20, seed=1, pinned=True), target)])
        handle.result()
        assert bool((seen == 1).all())


def test_neighbouring_blocks_go_as_one_and_come_back_the_same() -> None:
    hot = random_bytes(64 << 20, seed=2, device=DEVICE).view(64, -1)
    slots = torch.zeros(hot.shape, dtype=torch.uint8).pin_memory()
    before = hot.cpu()
    with MemoryTransferManager(DEVICE) as manager:
        for handle in manager.bulk_transfer([TransferOp.to_cpu(a, b) for a, b in zip(hot, slots, strict=True)]):
            handle.result()
        assert torch.equal(slots, before)
        hot.zero_()
        order = list(range(64))
        random.Random(0).shuffle(order)
        handles = manager.bulk_transfer([TransferOp.to_gpu(slots[i], hot[i], priority=i % 3) for i in order])
        assert all(handle.wait(60) for handle in handles)
    assert torch.equal(hot.cpu(), before)


def test_the_loop_runs_while_transfers_are_awaited() -> None:
    async def round_trip(manager: MemoryTransferManager, seed: int) -> bool:
        there = random_bytes(3 << 20, seed=seed)
        up = await (await manager.async_to_gpu(there, torch.device(DEVICE), priority=seed % 3))
        back = await (await manager.async_to_cpu(up, priority=seed % 3))
        return torch.equal(back, there)

    async def run() -> list[bool]:
        with MemoryTransferManager(pinned_memory_pool_size=1 << 20, max_waiting_bytes=4 << 20) as manager:
            return await asyncio.gather(*(round_trip(manager, seed) for seed in range(20)))

    assert all(asyncio.run(run()))
