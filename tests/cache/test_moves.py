"""How copies are batched, and what a batch that fails halfway leaves behind: nothing that is still under way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FailingCopies, FakeCuda, FakeStream
from pattern_layout import tiny_layout

from tierkv.errors import StoreError
from tierkv.movers import engine_frames, frames, pages, windows
from tierkv.movers.mover import Done, Move, Mover, layer_groups
from tierkv.storage.coded import CodedBlock, CodedLayout, zero_frames
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.storage.windows import WindowFormat
from tierkv.values.layout import BlockLayout

MOVES = [Move(0, 3), Move(2, 1), Move(1, 0)]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def fake_mover(layout: BlockLayout) -> tuple[HotPool, WarmPool, Mover]:
    """Return a mover on CPU memory that believes itself on a GPU."""
    hot, warm = HotPool(layout, 4, torch.device("cpu")), WarmPool(layout.block_bytes, 4)
    mover = Mover(hot, warm)
    mover.is_cuda, mover._device = True, torch.device("cpu")
    mover.load_stream, mover.store_stream = torch.cuda.Stream(), torch.cuda.Stream()
    return hot, warm, mover


def assert_idle(*streams: Any) -> None:
    assert [stream.num_queued for stream in streams] == [0] * len(streams)


@pytest.mark.parametrize(("block_size", "num_copies"), [(64, 2), (4, 4)])
def test_neighbours_go_in_one_copy_where_their_places_touch(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, block_size: int, num_copies: int
) -> None:
    """Slots are whole pages apart: smaller blocks do not touch, and torch would not copy them in one go."""
    layout = BlockLayout.uniform(num_layers=2, block_size=block_size, kv_heads=1, head_dim=4, dtype="float32")
    hot, _, mover = fake_mover(layout)
    assert mover.slots.is_contiguous() == (num_copies == 2)
    hot.bytes_view[:4] = torch.arange(4, dtype=torch.uint8)[:, None]
    copies = FailingCopies(monkeypatch, cuda, fail_at=99)
    mover.demote([Move(1, 0), Move(2, 1), Move(3, 2), Move(0, 3)], after=Done())
    assert copies.count == num_copies
    assert mover.slots[:, 0].tolist() == [1, 2, 3, 0]
    copies.count = 0
    mover.promote([Move(0, 0), Move(1, 1), Move(2, 2), Move(3, 3)])
    assert copies.count == 4, "batches have their own test"
    assert hot.bytes_view[:4, -1].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("way", ["promote", "demote", "copy"])
def test_a_mover_waits_for_what_it_had_queued(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    _, _, mover = fake_mover(tiny_layout())
    ways: dict[str, Callable[[], object]] = {
        "promote": lambda: mover.promote(MOVES),
        "demote": lambda: mover.demote(MOVES, after=Done()),
        "copy": lambda: mover.copy(MOVES),
    }
    copies = FailingCopies(monkeypatch, cuda, fail_at=2)
    with pytest.raises(StoreError, match="had enough"):
        ways[way]()
    assert copies.count == 3
    assert_idle(cuda.current, mover.load_stream, mover.store_stream)


def gpu_windows(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Mover]:
    """Return the GPU's side of a window mover; its kernels do nothing."""
    layout = tiny_layout(dtype="bfloat16")
    hot, _, mover = fake_mover(layout)
    form = WindowFormat(layout, layer_groups(layout))
    gpu = object.__new__(windows._GpuWindows)
    gpu._kernels = SimpleNamespace(decompress_section=lambda *_: None, compress_section=lambda *_: None)
    gpu._pool, gpu._form, gpu._device, gpu._mover = hot.blocks, form, hot.device, mover
    gpu._array = np.zeros((4, form.slot_bytes), np.uint8)
    gpu._slots = torch.from_numpy(gpu._array)
    gpu._tiles = [None for _ in form.sections]
    gpu._decode_stream, gpu._code_stream = torch.cuda.Stream(), torch.cuda.Stream()
    room = windows._CHUNK_BLOCKS * max(section.capacity_bytes for section in form.sections)
    gpu._up = [gpu._buffer(room) for _ in range(windows._NUM_BUFFERS)]
    gpu._down = [gpu._buffer(room) for _ in range(windows._NUM_BUFFERS)]
    gpu._up_lock, gpu._down_lock = windows.threading.Lock(), windows.threading.Lock()
    monkeypatch.setattr(windows._GpuWindows, "_ids", lambda _, numbers, *__: torch.tensor(list(numbers)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options).zero_())
    return gpu, mover


@pytest.mark.parametrize("way", ["promote", "demote"])
def test_a_window_mover_waits_for_what_it_had_queued(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    gpu, mover = gpu_windows(monkeypatch)
    FailingCopies(monkeypatch, cuda, fail_at=2)
    with pytest.raises(StoreError, match="had enough"):
        gpu.promote(MOVES) if way == "promote" else gpu.demote(MOVES, [4] * len(MOVES), [Done()])
    assert_idle(mover.load_stream, mover.store_stream, gpu._decode_stream, gpu._code_stream)


def test_a_frame_mover_waits_for_what_it_had_queued(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    hot, _, mover = fake_mover(tiny_layout(dtype="bfloat16"))
    gpu = object.__new__(frames.FrameMover)
    gpu._blocks, gpu._slots, gpu._load_stream = hot.blocks, mover.slots, mover.load_stream
    gpu._lock = frames.threading.Lock()
    gpu._payload_room, gpu._plane_room = torch.empty(0, dtype=torch.uint8), torch.empty((0, 1), dtype=torch.uint8)
    gpu.stream = torch.cuda.Stream()
    FailingCopies(monkeypatch, cuda, fail_at=2)
    with pytest.raises(StoreError, match="had enough"):
        gpu.promote(MOVES, [CodedBlock(frame_sizes=(16,)) for _ in MOVES])
    assert_idle(mover.load_stream, gpu.stream)


def test_memory_for_blocks_in_work_is_kept_where_that_is_wanted() -> None:
    gpu = object.__new__(frames.FrameMover)
    gpu._blocks = torch.empty((4, 64), dtype=torch.int16)
    gpu._payload_room = torch.empty(3 * 128, dtype=torch.uint8)
    for count, stride, is_kept in ((3, 128, True), (2, 64, True), (4, 128, False)):
        memory = gpu._payload_memory(count, stride)
        assert memory.shape == (count, stride)
        assert (memory.data_ptr() == gpu._payload_room.data_ptr()) == is_kept


@pytest.mark.parametrize("is_right", [True, False])
def test_a_wave_is_known_to_be_right_before_it_is_promoted(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    def check() -> None:
        assert not gpu.stream.num_queued, "what is not done yet says nothing"
        if not is_right:
            raise StoreError("1 frames did not decode")

    def decode(*_: object, **__: object) -> SimpleNamespace:
        cuda.current.num_queued += 1
        return SimpleNamespace(check=check)

    layout = tiny_layout(dtype="bfloat16")
    hot, warm, mover = fake_mover(layout)
    gpu: Any = object.__new__(frames.FrameMover)
    gpu._blocks, gpu._slots, gpu._load_stream = hot.blocks, mover.slots, mover.load_stream
    gpu._lock = frames.threading.Lock()
    gpu._payload_room, gpu._plane_room = torch.empty(0, dtype=torch.uint8), torch.empty((0, 1), dtype=torch.uint8)
    gpu.stream, gpu._layout, gpu._tiles = torch.cuda.Stream(), CodedLayout(layout), None
    gpu._batch, gpu._kernels = SimpleNamespace(decode=decode), SimpleNamespace(merge_frames=lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    sizes = [len(each) - (not rest) for each, rest in zip(zero_frames(gpu._layout), gpu._layout.is_rest, strict=True)]
    coded = [CodedBlock(frame_sizes=tuple(sizes)) for _ in MOVES]
    if is_right:
        gpu.promote(MOVES, coded)
    else:
        with pytest.raises(StoreError, match="did not decode"):
            gpu.promote(MOVES, coded)
    assert_idle(mover.load_stream, gpu.stream)
    warm.close()


@pytest.mark.parametrize("fails", ["promote", "scatter", "keep"])
def test_an_engines_decoder_waits_for_what_it_had_queued(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Four blocks, two at a time; the second batch fails while the first is still being copied back."""

    def promote(moves: list[Move], *_: object, after: object) -> Done:
        gpu._mover.stream.num_queued += 1
        num_batches.append(len(moves))
        if fails == "promote" and len(num_batches) == 2:
            raise StoreError("had enough")
        return Done()

    def scatter(*_: object) -> None:
        cuda.current.num_queued += 1
        if fails == "scatter" and len(num_batches) == 2:
            raise RuntimeError("had enough")

    num_batches: list[int] = []
    gpu: Any = object.__new__(engine_frames.EngineFrames)
    gpu.blocks_at_once, gpu._lock, gpu._turn = 2, engine_frames.threading.Lock(), 0
    gpu._kernels, gpu._pages = SimpleNamespace(scatter_blocks=scatter), SimpleNamespace(device=torch.device("cpu"))
    gpu._slots, gpu._blocks = torch.zeros((4, 64), dtype=torch.uint8), torch.zeros((4, 32), dtype=torch.int16)
    gpu._mover = SimpleNamespace(promote=promote, stream=torch.cuda.Stream())
    gpu._scatter_stream, gpu._keep_stream, gpu._free = torch.cuda.Stream(), torch.cuda.Stream(), [Done(), Done()]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    # Each batch copies its table of pages, then its two blocks.
    copies = FailingCopies(monkeypatch, cuda, fail_at=3 if fails == "keep" else 99)
    with pytest.raises(StoreError, match="had enough"):
        gpu.load([0, 1, 2, 3], [CodedBlock()] * 4, [[0], [1], [2], [3]], after=Done(), keeps_decoded=True)
    assert num_batches == [2, 2] and copies.count
    assert_idle(gpu._mover.stream, gpu._scatter_stream, gpu._keep_stream)
    assert not gpu._lock.locked()


@pytest.mark.parametrize("way", ["load", "store"])
def test_a_page_mover_waits_for_what_it_had_queued(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    nothing = SimpleNamespace(scatter_blocks=lambda *_: None, gather_blocks=lambda *_: None)
    mover = object.__new__(pages.PageMover)
    mover._kernels, mover.pages = nothing, SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    mover._up, mover._down = (pages._Direction(64, 2, torch.device("cpu")) for _ in range(2))
    blocks, ids = [torch.zeros(64, dtype=torch.uint8) for _ in range(3)], torch.zeros((3, 1), dtype=torch.int64)
    FailingCopies(monkeypatch, cuda, fail_at=2)
    with pytest.raises(StoreError, match="had enough"):
        mover.load(blocks, ids, after=Done()) if way == "load" else mover.store(ids, blocks, after=Done())
    for each in (mover._up, mover._down):
        assert_idle(each.copy_stream, each.kernel_stream)
        assert not each._lock.locked(), "the turn was not given up"


@pytest.mark.parametrize("pages_per_block", [1, 16])
def test_the_first_request_compiles_no_kernel(cuda: FakeCuda, pages_per_block: int) -> None:
    """Triton compiles a kernel anew for addresses that are no multiples of 16, and for other numbers of blocks."""
    kinds: set[tuple[str, int, bool]] = set()

    def noted(name: str) -> Callable[[object, torch.Tensor, torch.Tensor], None]:
        def launch(_: object, page_ids: torch.Tensor, rows: torch.Tensor) -> None:
            kinds.add((name, len(rows), page_ids.data_ptr() % 16 == 0))
            reads = name == "gather" and set(page_ids.flatten().tolist()) == {0}
            assert reads or (name == "scatter" and set(page_ids.flatten().tolist()) == {-1}) or not is_warming

        return launch

    mover = object.__new__(pages.PageMover)
    mover._kernels = SimpleNamespace(scatter_blocks=noted("scatter"), gather_blocks=noted("gather"))  # type: ignore[assignment]
    mover.pages = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    mover._up, mover._down = (pages._Direction(64, 2, torch.device("cpu")) for _ in range(2))
    mover._pages_per_block, is_warming = pages_per_block, True
    mover.warm_up()
    compiled, is_warming = set(kinds), False
    blocks, ids = (
        [torch.zeros(64, dtype=torch.uint8) for _ in range(4)],
        torch.zeros((4, pages_per_block), dtype=torch.int64),
    )
    mover.load(blocks, ids, after=Done())
    mover.store(ids, blocks, after=Done())
    assert kinds == compiled and len(kinds) >= 2


def test_pages_are_copied_one_by_one_where_no_kernel_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mover:
        def __init__(self, *_: object) -> None:
            pass

        def warm_up(self) -> None:
            raise OSError("no C compiler")

    pytest.importorskip("triton")
    monkeypatch.setattr(pages, "PageMover", Mover)
    assert pages.page_mover([torch.zeros((2, 64), dtype=torch.uint8)], 64) is None


def test_a_stream_that_has_failed_is_not_waited_for_in_vain() -> None:
    class Broken(FakeStream):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    after = FakeStream()
    after.num_queued = 1
    frames.synchronize_streams(Broken(), after)  # type: ignore[arg-type]
    assert_idle(after)
