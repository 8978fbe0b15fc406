"""Transfers by priority: their bytes, their order, and what is left of them when they fail or are cancelled."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tierkv.background.work_queue import Priority
from tierkv.errors import CapacityError, ClosedError, ConfigError, ShapeError, StoreError, TransferCancelledError
from tierkv.movers import transfers
from tierkv.movers.mover import Ready
from tierkv.movers.transfers import Direction, MemoryTransferManager, TransferHandle, TransferOp

UP, DOWN = Direction.TO_GPU, Direction.TO_CPU
PIECE = 8
POOL = 8 * PIECE


class LateCopy:
    """A copy that reads and writes when it is waited for, as late as a copy engine may."""

    def __init__(self, engine: SlowEngine, target: Tensor, source: Tensor) -> None:
        self._engine, self._target, self._source = engine, target, source
        self.is_there = False

    def copy(self) -> None:
        self._target.copy_(self._source)
        self.is_there = True

    def wait(self, layer: int | None = None) -> None:
        raise AssertionError("no stream waits for a transfer")

    def synchronize(self) -> None:
        self._engine.pass_until(self)

    def is_done(self) -> bool:
        return self.is_there


class SlowEngine:
    """Copies in order, each only when a thread waits for it; every transfer uses staging memory.

    copied: the first byte of each piece, in the order in which they were begun. gate: nothing begins before it is set.
    """

    def __init__(self) -> None:
        self._queues: dict[int, list[LateCopy]] = defaultdict(list)
        self.copied: list[int] = []
        self.most_in_flight = 0
        self.gate, self.has_begun = threading.Event(), threading.Event()
        self.gate.set()
        self.fails: Callable[[Tensor], bool] = lambda _: False

    @property
    def queue(self) -> list[LateCopy]:
        """The copies in flight of the calling thread: each transfer queue has one thread."""
        return self._queues[threading.get_ident()]

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        self.has_begun.set()
        assert self.gate.wait(20)
        if self.fails(source):
            raise RuntimeError("the engine is down")
        self.copied.append(int(source[0]))
        self.queue.append(LateCopy(self, target, source))
        self.most_in_flight = max(self.most_in_flight, len(self.queue))
        return self.queue[-1]

    def pass_until(self, last: LateCopy) -> None:
        while not last.is_there:
            self.queue.pop(0).copy()

    def needs_staging(self, host: Tensor) -> bool:
        return True

    def drain(self) -> None:
        while self.queue:
            self.queue.pop(0).copy()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SlowEngine:
    """Return the copy engine of all managers that are opened from here on."""
    engine = SlowEngine()
    monkeypatch.setattr(transfers, "open_copy_engine", lambda _: engine)
    return engine


@pytest.fixture
def manager(engine: SlowEngine) -> Iterator[MemoryTransferManager]:
    with MemoryTransferManager("cpu", pinned_memory_pool_size=POOL, max_waiting_bytes=64) as manager:
        yield manager
        engine.gate.set()


def up(values: Tensor, priority: Priority = Priority.REQUEST, target: Tensor | None = None) -> TransferOp:
    return TransferOp.to_gpu(values, target, priority=priority)


def filled(byte: int, num_bytes: int = PIECE) -> Tensor:
    return torch.full((num_bytes,), byte, dtype=torch.uint8)


def hold(manager: MemoryTransferManager, engine: SlowEngine) -> TransferHandle:
    """Return a transfer that keeps the thread busy until the gate is set."""
    engine.gate.clear()
    (handle,) = manager.bulk_transfer([up(filled(0))])
    assert engine.has_begun.wait(20)
    return handle


@pytest.mark.parametrize("is_staged", [False, True])
def test_every_byte_arrives_whatever_the_order(is_staged: bool, request: pytest.FixtureRequest) -> None:
    if is_staged:
        request.getfixturevalue("engine")
    rng, handles = random.Random(0), list[tuple[TransferHandle, Tensor]]()
    with MemoryTransferManager("cpu", pinned_memory_pool_size=POOL) as manager:
        for _ in range(100):
            source = torch.randint(0, 99, (rng.randrange(40), 3), dtype=torch.int16)
            op = TransferOp(source=source, direction=rng.choice([UP, DOWN]), priority=rng.choice(list(Priority)))
            (handle,) = manager.bulk_transfer([op])
            handles.append((handle, source))
            if not rng.randrange(4):
                handle.cancel()
        for handle, source in handles:
            try:
                assert torch.equal(handle.result(), source)
            except TransferCancelledError:
                assert handle.is_cancelled
            assert handle.done()


def test_the_more_urgent_overtakes_between_two_pieces(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    hold(manager, engine)
    ops = [up(filled(3, 3 * PIECE), Priority.DEMOTION), up(filled(2), Priority.PREFETCH), up(filled(1))]
    handles = manager.bulk_transfer(ops)
    engine.gate.set()
    for handle in handles:
        handle.result()
    assert engine.copied == [0, 1, 2, 3, 3, 3]
    engine.copied.clear()
    half = threading.Event()
    engine.fails = lambda source: half.set() or not first_piece.wait(20)  # type: ignore[func-returns-value]
    first_piece = threading.Event()
    (long,) = manager.bulk_transfer([up(filled(3, 4 * PIECE), Priority.DEMOTION)])
    assert half.wait(20)  # the first piece has begun
    (urgent,) = manager.bulk_transfer([up(filled(1))])
    first_piece.set()
    assert torch.equal(long.result(), filled(3, 4 * PIECE))
    assert torch.equal(urgent.result(), filled(1))
    assert engine.copied == [3, 1, 3, 3, 3]


def test_a_demotion_gets_on_beside_requests_that_never_end(engine: SlowEngine) -> None:
    with MemoryTransferManager("cpu", pinned_memory_pool_size=POOL) as manager:
        hold(manager, engine)
        demotion = up(filled(200, 2 * PIECE), Priority.DEMOTION)
        handles = manager.bulk_transfer([demotion, *(up(filled(1)) for _ in range(100))])
        engine.gate.set()
        for handle in handles:
            handle.result()
        assert [at for at, byte in enumerate(engine.copied) if byte == 200] == [33, 66]


def test_no_more_is_in_flight_than_there_is_staging(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    source = torch.arange(20 * PIECE, dtype=torch.uint8)
    for way in (UP, DOWN):
        (handle,) = manager.bulk_transfer([TransferOp(source=source, direction=way)])
        assert torch.equal(handle.result(), source)
    assert engine.most_in_flight == POOL // PIECE // 2


def test_neighbours_are_copied_as_one_and_end_each_for_itself(
    manager: MemoryTransferManager, engine: SlowEngine
) -> None:
    hold(manager, engine)
    source, target = torch.arange(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    pairs = [(0, 2), (2, 4), (4, 8), (10, 12)]
    handles = manager.bulk_transfer([up(source[a:b], target=target[a:b]) for a, b in pairs])
    handles[1].cancel()  # of no use: the piece is wanted by its neighbours
    engine.gate.set()
    for (a, b), handle in zip(pairs, handles, strict=True):
        assert torch.equal(handle.result(), source[a:b])
    assert engine.copied == [0, 0, 10]
    assert target.tolist() == [*range(8), 0, 0, 10, 11, 0, 0, 0, 0]


def test_a_failure_is_told_to_whom_it_hit(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    source, target = torch.arange(3 * PIECE, dtype=torch.uint8), torch.zeros(3 * PIECE, dtype=torch.uint8)
    engine.fails = lambda piece: int(piece[0]) == PIECE
    cuts = [(0, PIECE), (PIECE, PIECE + 4), (PIECE + 4, 2 * PIECE), (2 * PIECE, 3 * PIECE)]
    handles = manager.bulk_transfer([up(source[a:b], target=target[a:b]) for a, b in cuts])
    (other,) = manager.bulk_transfer([up(filled(7))])
    for handle in handles[1:3]:
        with pytest.raises(StoreError, match="the engine is down"):
            handle.result()
    assert torch.equal(handles[0].result(), source[:PIECE])
    assert torch.equal(handles[3].result(), source[2 * PIECE :])
    assert torch.equal(other.result(), filled(7))


def test_what_waits_is_dropped_and_what_is_in_flight_ends(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    target = torch.zeros(3 * PIECE, dtype=torch.uint8)
    engine.gate.clear()
    (begun,) = manager.bulk_transfer([up(filled(1, 3 * PIECE), target=target)])
    assert engine.has_begun.wait(20)
    (waiting,) = manager.bulk_transfer([up(filled(2))])
    for handle in (waiting, begun):
        handle.cancel()
    assert waiting.done(), "it had not begun"
    assert not begun.done(), "its first piece is being copied"
    assert not begun.wait(timeout_s=0)
    engine.gate.set()
    for handle in (waiting, begun):
        with pytest.raises(TransferCancelledError):
            handle.result()
    assert engine.copied == [1]
    assert target.tolist() == [1] * PIECE + [0] * 2 * PIECE
    begun.cancel()  # of no use any more


def test_a_full_queue_refuses_in_time_and_takes_more_when_there_is_room(
    manager: MemoryTransferManager, engine: SlowEngine
) -> None:
    hold(manager, engine)
    first = manager.bulk_transfer([up(filled(1, 64))])
    with pytest.raises(CapacityError, match="request"):
        manager.bulk_transfer([up(filled(2))], timeout_s=0)
    manager.bulk_transfer([up(filled(3), Priority.PREFETCH)], timeout_s=0)  # other priorities have room of their own

    async def hand_over() -> Tensor:
        handing = asyncio.ensure_future(manager.async_to_gpu(filled(4)))
        await asyncio.sleep(0)
        assert not handing.done(), "there is no room yet, and the loop runs"
        engine.gate.set()
        return await (await handing)

    assert torch.equal(asyncio.run(hand_over()), filled(4))
    assert torch.equal(first[0].result(), filled(1, 64))


def test_what_was_not_taken_is_dropped_with_the_rest_of_its_batch(
    manager: MemoryTransferManager, engine: SlowEngine
) -> None:
    hold(manager, engine)
    with pytest.raises(CapacityError):
        manager.bulk_transfer([up(filled(1, 40)), up(filled(2, 40))], timeout_s=0)
    engine.gate.set()
    (last,) = manager.bulk_transfer([up(filled(3))])
    last.result()
    assert engine.copied == [0, 3]


def test_several_await_one_transfer_while_the_loop_runs(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    async def run() -> None:
        engine.gate.clear()
        handle = await manager.async_to_cpu(filled(5), priority=2)

        async def get() -> Tensor:
            return await handle

        waiting = [asyncio.ensure_future(get()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # ends the waiting, not the transfer
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert not handle.is_cancelled
        engine.gate.set()
        for each in waiting[1:]:
            assert torch.equal(await each, filled(5))
        assert torch.equal(await handle, filled(5))
        failed = await manager.async_to_gpu(filled(6))
        failed.cancel()
        try:
            await failed
        except TransferCancelledError:
            pass

    asyncio.run(run())


def test_who_no_longer_runs_a_loop_holds_up_nobody(manager: MemoryTransferManager, engine: SlowEngine) -> None:
    async def leave() -> TransferHandle:
        engine.gate.clear()
        handle = await manager.async_to_cpu(filled(5))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_get(handle), 0)
        return handle

    async def _get(handle: TransferHandle) -> Tensor:
        return await handle

    handle = asyncio.run(leave())
    engine.gate.set()
    assert torch.equal(handle.result(), filled(5))


def test_shapes_strides_and_modes(manager: MemoryTransferManager) -> None:
    matrix = torch.arange(12).reshape(3, 4)
    empty, strided, scalar = manager.bulk_transfer([up(torch.empty(0, 4)), up(matrix.t()), up(torch.tensor(2.5))])
    assert empty.result().shape == (0, 4)
    assert torch.equal(strided.result(), matrix.t())
    assert float(scalar.result()) == 2.5
    with torch.inference_mode():
        made_there = torch.empty(3)
    leaf = torch.ones(3, requires_grad=True)
    (handle,) = manager.bulk_transfer([up(leaf, target=made_there)])
    assert handle.result().tolist() == [1, 1, 1]
    assert manager.bulk_transfer([]) == []


def test_what_cannot_be_copied_is_refused_before_anything_begins(
    manager: MemoryTransferManager, engine: SlowEngine
) -> None:
    with pytest.raises(ShapeError, match="a target of"):
        up(filled(1), target=torch.empty(3))
    with pytest.raises(ShapeError, match="contiguous"):
        up(torch.ones(2, 3), target=torch.ones(3, 2).t())
    on_meta = TransferOp(source=torch.empty(3, device="meta"), direction=UP)
    with pytest.raises(ShapeError, match="source of a transfer to_gpu lies on meta"):
        manager.bulk_transfer([up(filled(1)), on_meta])
    assert not engine.has_begun.is_set()
    with pytest.raises(ConfigError, match="no priority 3"):
        asyncio.run(manager.async_to_cpu(filled(1), priority=3))
    with pytest.raises(ConfigError, match="device is cpu, not meta"):
        asyncio.run(manager.async_to_gpu(filled(1), "meta"))
    with pytest.raises(ConfigError, match="at least 8 bytes"):
        MemoryTransferManager("cpu", pinned_memory_pool_size=7)


def test_closing_carries_out_what_was_handed_over(engine: SlowEngine) -> None:
    manager = MemoryTransferManager("cpu", pinned_memory_pool_size=POOL)
    handles = manager.bulk_transfer([up(filled(i, 5 * PIECE), Priority.DEMOTION) for i in range(5)])
    manager.close()
    manager.close()
    assert all(handle.done() for handle in handles)
    assert handles[4].result().tolist() == [4] * 5 * PIECE
    with pytest.raises(ClosedError, match="closed"):
        manager.bulk_transfer([up(filled(1))])


def test_a_handle_that_is_done_holds_no_source(manager: MemoryTransferManager) -> None:
    source = filled(1)
    (handle,) = manager.bulk_transfer([up(source)])
    handle.result()
    manager.close()
    assert handle._on_cancel is None


def test_closing_gives_the_staging_memory_back(engine: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [np.zeros(POOL, dtype=np.uint8)]
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: torch.from_numpy(memory[0]).view(shape[0]))
    manager = MemoryTransferManager("cpu", pinned_memory_pool_size=POOL)
    monkeypatch.undo()
    held = weakref.ref(memory.pop())
    manager.close()
    assert held() is None


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view])
def test_what_is_yet_to_be_conjugated_or_negated_is_copied_as_what_it_stands_for(
    manager: MemoryTransferManager, lazy: Callable[[Tensor], Tensor]
) -> None:
    source = lazy(torch.tensor([1 + 2j, 3 - 4j]))
    (handle,) = manager.bulk_transfer([up(source)])
    assert torch.equal(handle.result(), source)
    with pytest.raises(ShapeError, match="plain"):
        up(torch.tensor([1j, 2j]), target=lazy(torch.zeros(2, dtype=torch.complex64)))
