"""Cold blocks decoded on the GPU: the tables of their frames, and the kernel that merges planes and rests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard

pytest.importorskip("triton", reason="triton has no wheel for this machine")

from pattern_layout import iter_packed, tiny_layout
from test_windows import normal_block

from tierkv.errors import CorruptBlockError, ShapeError
from tierkv.kernels.planes import merge_frames
from tierkv.movers.frames import FrameMover, can_decode
from tierkv.movers.mover import Move, Mover
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock, CodedLayout, check_frames, zero_frames
from tierkv.storage.hot import HotPool
from tierkv.storage.record import BlockInfo, decode_record, encode_record
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout, LayerLayout

LAYOUT = BlockLayout(
    block_size=256,
    dtype="bfloat16",
    layers=(LayerLayout(kv_heads=9, k_dim=64, v_dim=16), LayerLayout(kv_heads=1, k_dim=8, v_dim=8)),
)
TOKENS = np.arange(256, dtype="<u4").tobytes()
INFO = BlockInfo.first(TOKENS, namespace=b"n" * 16)


def make_block(seed: int) -> Bytes:
    block = normal_block(LAYOUT, seed)
    noise = np.random.default_rng(seed).integers(0, 256, 64 << 10, dtype=np.uint8)
    block[: noise.size] = noise  # its frame does not shrink and is stored as it is
    return block


def coded_payload(block: Bytes) -> tuple[Bytes, CodedBlock]:
    slot = np.zeros(LAYOUT.block_bytes, np.uint8)
    coded = CodedBlock()
    record = encode_record(INFO, block, layout=LAYOUT).data
    assert decode_record(record, slot, expected=INFO, layout=LAYOUT, coded=coded) is None
    assert coded.frame_sizes
    return slot, coded


def test_planes_and_rests_merge_into_the_named_blocks(device: str) -> None:
    blocks = [make_block(seed) for seed in range(2)]
    tables = CodedLayout(LAYOUT)
    payloads, planes, rests = [], [], []
    for block in blocks:
        slot, coded = coded_payload(block)
        offsets, sizes, rest_offsets = tables.parts(coded.frame_sizes)
        plane = np.zeros(LAYOUT.block_bytes // 2, np.uint8)
        for offset, size, first, length in zip(offsets, sizes, tables.planes, tables.plane_bytes, strict=True):
            frame = slot[offset : offset + size]
            decoded = frame if size == length else np.frombuffer(zstandard.decompress(frame.tobytes()), np.uint8)
            plane[first : first + length] = decoded
        payloads.append(slot)
        planes.append(plane)
        rests.append(rest_offsets)
    pool = torch.zeros((4, LAYOUT.block_bytes // 2), dtype=torch.bfloat16, device=device)
    merge_frames(
        torch.from_numpy(np.stack(planes)).to(device),
        torch.from_numpy(np.stack(payloads)).to(device),
        torch.from_numpy(np.stack(rests)).to(device),
        torch.from_numpy(tables.tiles).to(device),
        torch.tensor([3, 1], device=device),
        pool,
    )
    for block_id, block in ((3, blocks[0]), (1, blocks[1])):
        assert np.array_equal(pool[block_id].view(torch.uint8).cpu().numpy(), block)
    assert not pool[[0, 2]].any()


def test_a_partial_block_and_another_codec_are_decoded_at_once() -> None:
    block = make_block(0)
    short = BlockInfo.first(TOKENS[: 4 * 9], namespace=INFO.namespace)
    coded, out = CodedBlock(), np.zeros(LAYOUT.block_bytes, np.uint8)
    record = encode_record(short, block, layout=LAYOUT).data
    assert decode_record(record, out, expected=short, layout=LAYOUT, coded=coded) is None
    assert not coded.frame_sizes
    for offset, _, length in iter_packed(LAYOUT, 9):
        assert np.array_equal(out[offset : offset + length], block[offset : offset + length])


@pytest.mark.parametrize("damage", ["length", "missing"])
def test_frames_that_are_not_what_belongs_there_are_found_before_a_gpu_sees_them(damage: str) -> None:
    slot, coded = coded_payload(make_block(0))
    sizes = list(coded.frame_sizes)
    if damage == "missing":
        sizes.pop()
    else:
        offsets, lengths, _ = CodedLayout(LAYOUT).parts(sizes)
        at = int(offsets[-1])
        slot[at : at + int(lengths[-1])] = np.frombuffer(
            zstandard.compress(bytes(10_000)).ljust(int(lengths[-1]), b"\0"), np.uint8
        )[: int(lengths[-1])]
    with pytest.raises(CorruptBlockError):
        check_frames(slot, sizes, CodedLayout(LAYOUT))


@pytest.mark.parametrize("layout", [LAYOUT, tiny_layout(dtype="bfloat16")])  # frames of planes so small are longer
def test_the_frames_of_zeros_fit_a_block_and_are_what_a_reader_accepts(layout: BlockLayout) -> None:
    frames = zero_frames(CodedLayout(layout))
    payload = np.frombuffer(b"".join(frames), dtype=np.uint8)
    assert payload.size <= layout.block_bytes
    check_frames(payload, [len(frame) for frame in frames], CodedLayout(layout))


def test_planes_of_another_size_are_refused(device: str) -> None:
    tables = CodedLayout(LAYOUT)
    with pytest.raises(ShapeError, match="planes"):
        merge_frames(
            torch.zeros((1, 8), dtype=torch.uint8, device=device),
            torch.zeros((1, 8), dtype=torch.uint8, device=device),
            torch.zeros((1, 4), dtype=torch.int64, device=device),
            torch.from_numpy(tables.tiles).to(device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros((1, LAYOUT.block_bytes // 2), dtype=torch.bfloat16, device=device),
        )


@pytest.mark.gpu
def test_a_gpu_decodes_frames_written_by_a_cpu_bit_for_bit() -> None:
    device = torch.device("cuda")
    if not can_decode(LAYOUT, device):
        pytest.skip("nvCOMP is not installed")
    hot, warm = HotPool(LAYOUT, 8, device), WarmPool(LAYOUT.block_bytes, 4)
    mover = Mover(hot, warm)
    frames = FrameMover(hot.blocks, hot.layout, mover.slots, mover.load_stream)
    blocks = [make_block(seed) for seed in range(4)]
    coded: list[CodedBlock] = []
    for slot, block in enumerate(blocks):
        payload, kind = coded_payload(block)
        warm.slots[slot] = payload
        coded.append(kind)
    frames.promote([Move(slot, 7 - slot) for slot in range(4)], coded).synchronize()
    for slot, block in enumerate(blocks):
        assert np.array_equal(hot.bytes_view[7 - slot].cpu().numpy(), block)
    mover.close()
    warm.close()
