"""Blocks that stay coded until a GPU decodes them into the engine: a CPU stands in for it here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tierkv import BlockLayout, BlockStore, BlockStoreConfig, Buffers, Namespace, StoreError, Strided
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import Origin
from tierkv.block_store.warm_memory import WarmMemory
from tierkv.movers.engine_memory import EngineMemory
from tierkv.movers.ready import DONE, Ready
from tierkv.storage.codecs import EXPONENT16
from tierkv.storage.coded import CodedBlock

TOKENS, PAGES, BLOCKS = 16, 40, 12
LAYOUT = BlockLayout.uniform(num_layers=2, block_size=2 * TOKENS, kv_heads=2, head_dim=64, dtype="bfloat16")
NAMESPACE = Namespace(weights="w", layout=LAYOUT)


class Later:
    """A copy that ends when the test says so."""

    def __init__(self) -> None:
        self.is_over = False

    def is_done(self) -> bool:
        return self.is_over

    def wait(self, layer: int | None = None) -> None:
        assert self.is_over, "bytes that are not there are about to be read"

    def synchronize(self) -> None:
        self.is_over = True


class FakeFrames:
    """Decodes as EngineFrames does. kept_later: the slots are only written to by `write`."""

    def __init__(self, engine: EngineMemory, memory: WarmMemory, *, blocks_at_once: int = 4) -> None:
        self.blocks_at_once = blocks_at_once
        self.num_decoded = 0
        self.fails = False
        self.kept_later = False
        self.kept: list[tuple[Later, Callable[[], None]]] = []
        self._engine, self._memory = engine, memory

    def load(
        self,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        pages: Sequence[Sequence[int]],
        *,
        after: Ready,
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        if self.fails:
            raise StoreError("2 frames did not decode")
        after.synchronize()
        memory = self._memory
        for slot, block, ids in zip(slots, coded, pages, strict=True):
            payload = memory.slots[slot].copy()
            decoded = memory.slots[slot].copy()
            EXPONENT16.decode_runs(
                payload[: block.payload_bytes], block.frame_sizes, decoded, LAYOUT.runs, LAYOUT.block_size
            )
            memory.slots[slot][:] = decoded
            self._engine.load([slot], [ids], memory.slots, after=[])
            if not keeps_decoded:
                memory.slots[slot][:] = payload
            elif self.kept_later:
                memory.slots[slot][:] = payload
                self.kept.append(
                    (Later(), lambda slot=slot, decoded=decoded: memory.slots[slot].__setitem__(..., decoded))
                )  # type: ignore[misc]
            self.num_decoded += 1
        return DONE, self.kept[-1][0] if self.kept else DONE

    def write(self) -> None:
        for later, write in self.kept:
            write()
            later.is_over = True


class Opened:
    """A store on the same files, with an engine of its own whose "GPU" decodes."""

    def __init__(self, path: Path, *, warm_blocks: int = 64, decodes: bool = True) -> None:
        config = BlockStoreConfig(cold_path=path, warm_bytes=warm_blocks * LAYOUT.block_bytes, min_free_bytes=0)
        self.store = BlockStore(config, namespace=NAMESPACE)
        self.memory: WarmMemory = self.store._tiers.memory  # type: ignore[attr-defined]
        self.tensors = [[torch.zeros(PAGES, TOKENS, 2, 2, 64).bfloat16()] for _ in range(2)]
        self.engine = self.store.register(self.tensors, pages_per_block=2)
        self.frames = FakeFrames(self.engine, self.memory)
        if decodes:
            self.engine._frames = (self.memory.slots.ctypes.data, self.frames)  # type: ignore[assignment]
            self.memory.decoding = self.engine

    def load(self, keys: Sequence[BlockKey]) -> int:
        """Load blocks into pages 0, 1, 2, ...; return how many came."""
        reservation = self.store.reserve(keys)
        reservation.wait()
        load = self.store.load(reservation, Strided(self.engine, [[2 * at, 2 * at + 1] for at in range(len(keys))]))
        load.synchronize()
        return load.num_loaded

    def pages(self) -> list[torch.Tensor]:
        return [layer[0].clone() for layer in self.tensors]

    def num_held(self) -> int:
        with self.store._changed:
            self.memory.reap()
            return self.memory.index.slots.referenced_count - len(self.memory.spare)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def want(path: Path) -> list[torch.Tensor]:
    """The pages of twelve blocks that lie in the store."""
    first = Opened(path, decodes=False)
    for layer in first.tensors:
        layer[0].copy_(torch.randn(layer[0].shape))
    want = [layer[0][: 2 * BLOCKS].clone() for layer in first.tensors]
    places = Strided(first.engine, [[2 * at, 2 * at + 1] for at in range(BLOCKS)])
    assert first.store.save(keys_of(first), places).num_saved == BLOCKS
    first.store.close()
    return want


def keys_of(opened: Opened) -> Sequence[BlockKey]:
    return opened.store.keys(range(BLOCKS * LAYOUT.block_size))


def assert_equal(opened: Opened, want: Sequence[torch.Tensor], count: int = BLOCKS) -> None:
    for got, expected in zip(opened.pages(), want, strict=True):
        assert torch.equal(got[: 2 * count], expected[: 2 * count])


def block_of(want: Sequence[torch.Tensor], at: int) -> bytes:
    """Return the bytes of a block as a slot holds them."""
    pages = torch.cat([layer[2 * at : 2 * at + 2].flatten() for layer in want])
    return pages.view(torch.uint8).numpy().tobytes()


def test_a_gpu_decodes_what_is_read_and_the_blocks_stay_warm(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    assert opened.load(keys) == BLOCKS and opened.frames.num_decoded == BLOCKS
    assert_equal(opened, want)
    assert opened.num_held() == 0 and not opened.memory.coded
    for layer in opened.tensors:
        layer[0].zero_()
    assert opened.store.reserve(keys).num_ready == BLOCKS, "warm now"
    assert opened.load(keys) == BLOCKS and opened.frames.num_decoded == BLOCKS, "no second time"
    assert_equal(opened, want)
    opened.store.close()


def test_payloads_are_never_taken_for_blocks(path: Path, want: list[torch.Tensor]) -> None:
    """Another request that finds the same block while it lies there coded reads it itself."""
    opened = Opened(path)
    keys = keys_of(opened)
    waiting = opened.store.reserve(keys)
    waiting.wait()
    assert waiting.is_ready and len(opened.memory.coded) == BLOCKS
    with opened.store._changed:
        assert not any(opened.memory.index.get(key) for key in keys), "they have a holder"
    out = [bytearray(LAYOUT.block_bytes) for _ in keys]
    load = opened.store.load(opened.store.reserve(keys), Buffers(out))
    load.synchronize()
    assert load.num_loaded == BLOCKS and opened.frames.num_decoded == 0, "buffers are filled by the CPU"
    assert out == [block_of(want, at) for at in range(BLOCKS)]
    places = Strided(opened.engine, [[2 * at, 2 * at + 1] for at in range(BLOCKS)])
    late = opened.store.load(waiting, places)
    late.synchronize()
    assert late.num_loaded == BLOCKS and opened.frames.num_decoded == BLOCKS
    assert_equal(opened, want)
    assert opened.num_held() == 0 and not opened.memory.coded
    opened.store.close()


def test_a_released_reservation_leaves_no_payload_to_the_next_user_of_its_slots(
    path: Path, want: list[torch.Tensor]
) -> None:
    opened = Opened(path, warm_blocks=32)
    keys = keys_of(opened)
    with opened.store.reserve(keys) as reservation:
        reservation.wait()
        assert opened.memory.coded
    assert opened.num_held() == 0
    others = opened.store.keys([7, *range(26 * LAYOUT.block_size)])[:26]
    block = torch.randn(LAYOUT.block_bytes // 2).bfloat16()
    assert opened.store.save(others, Buffers([block] * 26)).num_saved == 26
    out = [bytearray(LAYOUT.block_bytes) for _ in others]
    load = opened.store.load(opened.store.reserve(others), Buffers(out))
    load.synchronize()
    raw = block.view(torch.uint8).numpy().tobytes()
    assert load.num_loaded and all(bytes(each) == raw for each in out[: load.num_loaded])
    assert opened.load(keys) == BLOCKS
    assert_equal(opened, want)
    opened.store.close()


def test_slots_stay_held_until_the_decoded_blocks_are_back(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    opened.frames.kept_later = True
    keys = keys_of(opened)
    assert opened.load(keys) == BLOCKS
    assert_equal(opened, want)
    assert opened.num_held() == BLOCKS, "they are being written to"
    opened.frames.write()
    assert opened.num_held() == 0
    out = [bytearray(LAYOUT.block_bytes) for _ in keys]
    opened.store.load(opened.store.reserve(keys), Buffers(out)).synchronize()
    assert out == [block_of(want, at) for at in range(BLOCKS)]
    opened.store.close()


def test_a_block_that_comes_back_late_is_waited_for(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    opened.frames.kept_later = True
    keys = keys_of(opened)
    assert opened.load(keys) == BLOCKS
    for later, _ in opened.frames.kept:
        later.synchronize = later.wait  # type: ignore[method-assign]
    reservation, out = opened.store.reserve(keys), Buffers([bytearray(LAYOUT.block_bytes) for _ in keys])
    with pytest.raises(AssertionError, match="about to be read"):
        opened.store.load(reservation, out)
    opened.frames.write()
    opened.store.close()


def test_blocks_that_a_gpu_cannot_decode_are_misses_and_the_cpu_decodes_from_then_on(
    path: Path, want: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    opened.frames.fails = True
    with caplog.at_level(logging.WARNING):
        assert opened.load(keys) == 0
    assert "did not decode" in caplog.text
    assert opened.num_held() == 0 and opened.memory.num_decoded_at_once == 0
    assert opened.store.stats().miss_reasons["io_error"] == 1
    assert opened.load(keys) == BLOCKS and opened.frames.num_decoded == 0
    assert_equal(opened, want)
    opened.store.close()


def test_payloads_that_were_read_before_a_gpu_failed_are_decoded_by_the_cpu(
    path: Path, want: list[torch.Tensor]
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    reservation = opened.store.reserve(keys)
    reservation.wait()
    opened.engine._frames = None
    places = Strided(opened.engine, [[2 * at, 2 * at + 1] for at in range(BLOCKS)])
    load = opened.store.load(reservation, places)
    load.synchronize()
    assert load.num_loaded == BLOCKS and not opened.memory.coded
    assert_equal(opened, want)
    assert opened.store.reserve(keys).num_ready == BLOCKS, "warm now"
    opened.store.close()


def test_blocks_pass_coded_through_the_spare_slots_where_memory_is_short(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path, warm_blocks=8)  # of which one is spare, and three may be held
    keys = keys_of(opened)
    assert opened.load(keys) == BLOCKS and opened.frames.num_decoded == BLOCKS
    assert_equal(opened, want)
    assert opened.load(keys) == BLOCKS
    assert_equal(opened, want)
    assert opened.num_held() == 0
    opened.store.close()


def test_measuring_decodes_and_keeps_nothing(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    loader = opened.store._tiers._loader  # type: ignore[attr-defined]
    assert loader.time_reading(keys[:4]) > 0
    assert opened.frames.num_decoded == 4 and not any(layer[0].any() for layer in opened.tensors)
    with opened.store._changed:
        assert not len(opened.memory.index)
    opened.frames.fails = True
    assert loader.time_reading(keys[:4]) is None
    opened.store.close()


def test_payloads_stay_for_the_next_request_when_a_reservation_is_released(
    path: Path, want: list[torch.Tensor]
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    with opened.store.reserve(keys) as reservation:
        reservation.wait()
    assert opened.num_held() == 0
    first, second = opened.store.reserve(keys), opened.store.reserve(keys)
    assert first.num_ready == BLOCKS and first.origin is Origin.WARM
    assert second.origin is not Origin.WARM, "a payload has one holder"
    second.wait()
    assert second.num_ready == BLOCKS
    places = Strided(opened.engine, [[2 * at, 2 * at + 1] for at in range(BLOCKS)])
    for reservation in (first, second):
        for layer in opened.tensors:
            layer[0].zero_()
        load = opened.store.load(reservation, places)
        load.synchronize()
        assert load.num_loaded == BLOCKS
        assert_equal(opened, want)
    assert opened.frames.num_decoded == 2 * BLOCKS and not opened.memory.coded and opened.num_held() == 0
    opened.store.close()


def test_a_pin_of_a_payload_outlives_its_decoding(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    with opened.store.reserve(keys) as reservation:
        reservation.wait()
    assert opened.store.pin(keys, ttl_s=1000.0) == BLOCKS
    assert opened.load(keys) == BLOCKS
    others = opened.store.keys([9, *range(60 * LAYOUT.block_size)])
    opened.store.save(others, Buffers([bytearray(LAYOUT.block_bytes)] * len(others)))
    assert opened.store.reserve(keys).num_ready == BLOCKS
    opened.store.close()


def test_payloads_that_are_held_while_a_store_is_cleared_are_not_found_after_it(
    path: Path, want: list[torch.Tensor]
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    reservation = opened.store.reserve(keys)
    reservation.wait()
    opened.store.clear()
    reservation.release()
    assert opened.store.contains(keys) == 0 and opened.num_held() == 0
    opened.store.close()


def test_copies_end_before_their_slots_are_given_up_when_a_gpu_fails(
    path: Path, want: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block is warm and its copy is on its way when the GPU fails on those behind it."""
    opened = Opened(path)
    keys = keys_of(opened)
    assert opened.load(keys[:1]) == 1
    copies: list[Later] = []

    def load_later(*_: object, **__: object) -> Later:
        copies.append(Later())
        return copies[-1]

    monkeypatch.setattr(opened.engine, "load", load_later)
    reservation = opened.store.reserve(keys)
    reservation.wait()
    opened.frames.fails = True
    places = Strided(opened.engine, [[2 * at, 2 * at + 1] for at in range(BLOCKS)])
    load = opened.store.load(reservation, places)
    assert load.num_loaded == 1 and [copy.is_over for copy in copies] == [True]
    opened.store.close()
