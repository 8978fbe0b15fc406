"""Blocks that stay coded until a GPU decodes them into the engine: a CPU stands in for it here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_engine import LAYOUT, FakeFrames, Later, Opened

from tierkv import Buffers, StoreError, Strided
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import Origin
from tierkv.movers.ready import Ready

BLOCKS = 12


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


def leave_payloads(opened: Opened, keys: Sequence[BlockKey]) -> None:
    """Have blocks read and not loaded: they lie coded in the warm memory, and no request holds them."""
    with opened.store.reserve(keys) as reservation:
        reservation.wait()


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
    leave_payloads(opened, keys)
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
    leave_payloads(opened, keys)
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


class SecondBatchFails(FakeFrames):
    """Fails when the first of two batches lies decoded in its slots."""

    def load(self, slots: Any, coded: Any, pages: Any, *, after: Ready, keeps_decoded: bool) -> tuple[Ready, Ready]:
        part = slice(self.blocks_at_once)
        super().load(slots[part], coded[part], pages[part], after=after, keeps_decoded=keeps_decoded)
        raise StoreError("CUDA out of memory")


def test_what_a_failing_gpu_has_decoded_is_no_payload_any_more(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    opened.frames = SecondBatchFails(opened.engine, opened.memory)
    opened.engine._frames = (opened.memory.slots.ctypes.data, opened.frames)  # type: ignore[assignment]
    keys = keys_of(opened)
    assert opened.load(keys) == 0 and opened.num_held() == 0
    assert opened.load(keys) == BLOCKS
    assert_equal(opened, want)
    opened.store.close()


@pytest.mark.parametrize("num_good", [0, 2])
def test_a_payload_that_the_cpu_cannot_decode_is_a_miss(
    path: Path, want: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    reservation = opened.store.reserve(keys)
    reservation.wait()
    opened.engine._frames = None
    bad = next(slot for slot in reservation._slots[num_good:] if slot is not None)
    opened.memory.slots[bad][:64] ^= 0xFF
    load = opened.store.load(reservation, Buffers([bytearray(LAYOUT.block_bytes) for _ in keys]))
    assert load.num_loaded == 0 and opened.num_held() == 0
    assert opened.load(keys) == BLOCKS
    assert_equal(opened, want)
    opened.store.close()


def test_a_store_that_is_cleared_still_knows_which_slots_are_being_written(
    path: Path, want: list[torch.Tensor]
) -> None:
    opened = Opened(path)
    opened.frames.kept_later = True
    keys = keys_of(opened)
    assert opened.load(keys) == BLOCKS
    reservation = opened.store.reserve(keys)
    opened.store.clear()
    for later, _ in opened.frames.kept:
        later.synchronize = opened.frames.write  # type: ignore[method-assign]
    out = [bytearray(LAYOUT.block_bytes) for _ in keys]
    opened.store.load(reservation, Buffers(out)).synchronize()
    assert out == [block_of(want, at) for at in range(BLOCKS)]
    opened.store.close()


@pytest.mark.parametrize(("before", "after"), [(math.inf, -math.inf), (-math.inf, math.inf)])
def test_a_payload_is_pinned_and_unpinned_while_it_is_held(
    path: Path, want: list[torch.Tensor], before: float, after: float
) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    leave_payloads(opened, keys)
    with opened.store._changed:
        opened.memory.set_pinned(keys, before)
    with opened.store.reserve(keys), opened.store._changed:
        opened.memory.set_pinned(keys, after)
    with opened.store._changed:
        assert {opened.memory.index.get(key).pinned_until for key in keys} == {after}  # type: ignore[union-attr]
    opened.store.close()


def test_a_key_that_comes_twice_holds_a_payload_once(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path)
    keys = keys_of(opened)
    leave_payloads(opened, keys)
    with opened.store._changed:
        first, second, third = opened.memory.hold([keys[0], keys[1], keys[0]])
        assert first is not None and second is not None and third is None
        opened.memory.unpin([first, second])
    assert opened.num_held() == 0
    opened.store.close()


def test_a_chain_goes_from_its_end(path: Path, want: list[torch.Tensor]) -> None:
    opened = Opened(path, warm_blocks=24)
    keys = keys_of(opened)
    leave_payloads(opened, keys[:6])
    with opened.store._changed:
        taken = opened.memory.take(opened.memory.index.slots.free_count + 3)
        assert [opened.memory.index.get(key) is not None for key in keys[:6]] == [True] * 3 + [False] * 3
        opened.memory.unpin(taken)
    opened.store.close()
