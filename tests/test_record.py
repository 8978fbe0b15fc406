"""The record: exact bytes, round trips, and every kind of damage is told apart from another block."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_layout import iter_packed

from tierkv.errors import CorruptBlockError, FormatVersionError, ShapeError, StoreError
from tierkv.storage.codecs import CODECS, RAW, codec_by_name
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import (
    HEADER_BYTES,
    BlockInfo,
    TruncatedBlockError,
    decode_record,
    encode_record,
    parse_record,
    read_header,
)
from tierkv.values.layout import BlockLayout, LayerLayout

NAMESPACE = bytes(range(16))
LAYOUT = BlockLayout.uniform(num_layers=2, block_size=16, kv_heads=2, head_dim=8, dtype="bfloat16")
TINY = BlockLayout.uniform(num_layers=1, block_size=2, kv_heads=1, head_dim=4, dtype="float16")


def info_of(num_tokens: int) -> BlockInfo:
    return BlockInfo.first(np.arange(num_tokens, dtype="<u4").tobytes(), namespace=NAMESPACE)


def block_of(layout: BlockLayout, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(layout.block_bytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def decoded(record: np.ndarray | bytes, info: BlockInfo, layout: BlockLayout = LAYOUT) -> np.ndarray:
    out = np.full(layout.block_bytes, 0xEE, dtype=np.uint8)
    assert decode_record(record, out, expected=info, layout=layout) is None
    return out


def test_the_bytes_of_a_record_never_change() -> None:
    block = np.arange(TINY.block_bytes, dtype=np.uint8)
    record = encode_record(info_of(2), block, layout=TINY, codec=RAW)
    golden = (
        "544b564202000000f8a78c2eba1991fdd9788284a8148ae159eaa1baf8cca3fb"
        "000102030405060708090a0b0c0d0e0f000102030405060708090a0b0c0d0e0f"
        "0200000002000000000001000200000020000000000000002000000000000000"
        "e000000000000000c00000000200000000f292e7312c45e8ffe5747b36873031"
        "0000000001000000100000001000000000000000000000000000000000000000"
        "0000000000000000000000000000000000000000000000000000000000000000"
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    )
    assert record.data.tobytes().hex() == golden


@pytest.mark.parametrize("codec", [c for c in CODECS if not c.is_lossy], ids=lambda codec: codec.name)
@pytest.mark.parametrize("num_tokens", [1, 7, 16])
def test_the_tokens_of_a_block_come_back_and_nothing_else_is_written(codec, num_tokens: int) -> None:
    info, block = info_of(num_tokens), block_of(LAYOUT)
    record = encode_record(info, block, layout=LAYOUT, codec=codec)
    out = decoded(record.data, info)
    untouched = np.ones(LAYOUT.block_bytes, dtype=bool)
    for offset, _, length in iter_packed(LAYOUT, num_tokens):
        assert np.array_equal(out[offset : offset + length], block[offset : offset + length])
        untouched[offset : offset + length] = False
    assert (out[untouched] == 0xEE).all()
    assert record.raw_bytes == LAYOUT.token_bytes * num_tokens


def test_layers_of_different_shapes_come_back() -> None:
    layers = (LayerLayout(kv_heads=1, k_dim=6, v_dim=2), LayerLayout(kv_heads=3, k_dim=4, v_dim=4))
    layout = BlockLayout(block_size=5, dtype="bfloat16", layers=layers)
    info, block = info_of(5), block_of(layout)
    assert np.array_equal(decoded(encode_record(info, block, layout=layout).data, info, layout), block)


def test_a_block_that_does_not_shrink_is_stored_raw() -> None:
    noise = np.random.default_rng(3).integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)
    record = encode_record(info_of(16), noise, layout=LAYOUT)
    assert record.codec == "raw"
    assert np.array_equal(decoded(record.data, info_of(16)), noise)


def test_a_block_that_shrinks_uses_the_codec_of_its_dtype() -> None:
    layout = BlockLayout.uniform(num_layers=2, block_size=64, kv_heads=2, head_dim=64, dtype="bfloat16")
    record = encode_record(info_of(64), block_of(layout), layout=layout)
    assert record.codec == "exponent16"
    assert record.stored_bytes < record.raw_bytes / 1.4


def test_padding_behind_a_record_is_ignored() -> None:
    record = encode_record(info_of(16), block_of(LAYOUT), layout=LAYOUT)
    padded = record.data.tobytes() + bytes(100)
    assert np.array_equal(decoded(padded, record.info), block_of(LAYOUT))
    assert parse_record(padded).data.tobytes() == record.data.tobytes()


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("parent", MissReason.COLLISION),
        ("token_bytes", MissReason.COLLISION),
        ("block_hash", MissReason.COLLISION),
        ("content_digest", MissReason.COLLISION),
        ("namespace", MissReason.NAMESPACE),
    ],
)
def test_a_sound_record_of_another_block_is_a_mismatch_not_corruption(field: str, reason: MissReason) -> None:
    record = encode_record(info_of(2), block_of(LAYOUT), layout=LAYOUT)
    other = bytes(8) if field == "token_bytes" else bytes(16)
    expected = replace(record.info, **{field: other})
    out = np.empty(LAYOUT.block_bytes, dtype=np.uint8)
    assert decode_record(record.data, out, expected=expected, layout=LAYOUT) is reason


def test_every_flipped_bit_is_noticed() -> None:
    record = encode_record(info_of(2), block_of(TINY), layout=TINY).data.tobytes()
    out = np.empty(TINY.block_bytes, dtype=np.uint8)
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreError):
            decode_record(damaged, out, expected=info_of(2), layout=TINY)


def test_a_record_cut_anywhere_is_truncated() -> None:
    record = encode_record(info_of(2), block_of(TINY), layout=TINY).data.tobytes()
    out = np.empty(TINY.block_bytes, dtype=np.uint8)
    for size in range(len(record)):
        with pytest.raises(TruncatedBlockError):
            decode_record(record[:size], out, expected=info_of(2), layout=TINY)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(4, 3), (4, 1), (6, 1), (72, 999), (74, 7)],
    ids=["newer", "older", "flags", "codec", "version of the codec"],
)
def test_a_record_of_another_version_is_refused_with_the_remedy(offset: int, value: int) -> None:
    record = bytearray(encode_record(info_of(2), block_of(TINY), layout=TINY).data)
    struct.pack_into("<H", record, offset, value)
    with pytest.raises(CorruptBlockError):  # a bit has flipped: no other version writes a checksum that is wrong
        read_header(record)
    with pytest.raises(FormatVersionError, match="version that wrote it"):
        read_header(with_checksum(record))


def with_checksum(record: bytearray) -> bytearray:
    """ContentDigest a record anew, as a version that writes other things into it does."""
    seed = int.from_bytes(record[:8], "little")
    struct.pack_into("<Q", record, 8, xxhash.xxh3_64_intdigest(bytes(record[16:]), seed=seed))
    return record


def test_a_record_of_another_layout_is_corrupt_not_misread() -> None:
    record = encode_record(info_of(2), block_of(TINY), layout=TINY)
    other = BlockLayout.uniform(num_layers=2, block_size=2, kv_heads=1, head_dim=4, dtype="float16")
    with pytest.raises(CorruptBlockError):
        decode_record(record.data, np.empty(other.block_bytes, np.uint8), expected=record.info, layout=other)


def test_buffers_of_the_wrong_size_or_too_many_tokens_are_shape_errors() -> None:
    with pytest.raises(ShapeError):
        encode_record(info_of(2), np.empty(3, dtype=np.uint8), layout=TINY)
    with pytest.raises(ShapeError):
        encode_record(info_of(3), block_of(TINY), layout=TINY)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=600))
def test_arbitrary_bytes_are_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(StoreError):
        decode_record(b"TKVB" + data, np.empty(TINY.block_bytes, np.uint8), expected=info_of(2), layout=TINY)


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), max_size=8))
def test_a_mutated_header_is_an_error_of_ours_or_a_header_that_fits_the_record(edits) -> None:
    record = bytearray(encode_record(info_of(2), block_of(TINY), layout=TINY).data)
    for offset, value in edits:
        record[offset] = value
    try:
        header = read_header(record)
    except StoreError:
        return
    assert header.record_bytes <= len(record)
    assert sum(header.frame_sizes) == header.record_bytes - header.payload_offset


def test_codecs_are_named_in_the_record() -> None:
    record = encode_record(info_of(16), block_of(LAYOUT), layout=LAYOUT, codec=codec_by_name("zstd"))
    assert read_header(record.data).codec.name == record.codec
