"""The lossy codecs: how near they come, what they refuse, and that nothing of theirs is taken for exact bytes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from cold_blocks import LAYOUT as COLD_LAYOUT
from cold_blocks import open_store, read
from crafted_state import craft, state_of, state_start
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.attention_error import attention_error, codec_error
from tierkv.errors import ConfigError, CorruptBlockError, ShapeError, StoreError, TierKVError
from tierkv.storage.codec import LITERALS_ONLY, FrameCoder
from tierkv.storage.codecs import CODECS, codec_by_name, fits_namespace
from tierkv.storage.codecs_lossy import float_format
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import BlockInfo, EncodedRecord, decode_record, encode_record, read_header
from tierkv.storage.record_header import write_header
from tierkv.storage.state_file import StateFile
from tierkv.storage.state_format import ALIGN_BYTES
from tierkv.values.layout import BlockLayout, LayerLayout
from tierkv.values.namespace import Namespace, differing_fields

LOSSY = [codec.name for codec in CODECS if codec.is_lossy]
DTYPES = ["bfloat16", "float16", "float32"]
LAYERS = (LayerLayout(kv_heads=2, k_dim=16, v_dim=8), LayerLayout(kv_heads=3, k_dim=4, v_dim=32))
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}
MAX_ERROR = {"lossy-int8": 0.02}
names = pytest.mark.parametrize("name", LOSSY)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def layout_of(dtype: str, block_size: int = 24) -> BlockLayout:
    return BlockLayout(block_size=block_size, dtype=dtype, layers=LAYERS)


def as_block(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return values.astype(dtype).view(np.uint8)


def as_values(block: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return block.view(dtype).astype(np.float32)


def normal_block(layout: BlockLayout, seed: int = 0) -> np.ndarray:
    count = layout.block_bytes // layout.item_bytes
    return as_block(np.random.default_rng(seed).standard_normal(count), layout.dtype)


def info_of(num_tokens: int, namespace: bytes = bytes(16)) -> BlockInfo:
    tokens = np.arange(num_tokens, dtype="<u4").tobytes()
    return BlockInfo.first(tokens, namespace=namespace)


def coded(block: np.ndarray, layout: BlockLayout, name: str, num_tokens: int | None = None) -> EncodedRecord:
    return encode_record(info_of(num_tokens or layout.block_size), block, layout=layout, codec=codec_by_name(name))


def decoded(record: EncodedRecord, layout: BlockLayout) -> np.ndarray:
    out = np.zeros(layout.block_bytes, dtype=np.uint8)
    lossy_codec = record.codec if codec_by_name(record.codec).is_lossy else ""
    assert decode_record(record.data, out, expected=record.info, layout=layout, lossy_codec=lossy_codec) is None
    return out


@names
@dtypes
@pytest.mark.parametrize("num_tokens", [5, 23, 24])
def test_layers_of_different_shapes_and_partial_tails_come_back_nearly(name: str, dtype: str, num_tokens: int) -> None:
    layout = layout_of(dtype)
    block = normal_block(layout)
    record = coded(block, layout, name, num_tokens)
    assert record.codec == name
    out = decoded(record, layout)
    error = attention_error(block, out, layout=layout, num_tokens=num_tokens)
    assert 0 < error.mean < MAX_ERROR[name] and error.max < 3 * MAX_ERROR[name]
    for run in layout.runs:
        begin, end = run.offset_bytes + run.token_bytes * num_tokens, run.offset_bytes + run.token_bytes * 24
        assert not out[begin:end].any()


@names
@dtypes
def test_what_was_decoded_is_encoded_to_the_same_again(name: str, dtype: str) -> None:
    layout = layout_of(dtype)
    once = decoded(coded(normal_block(layout), layout, name), layout)
    assert np.array_equal(decoded(coded(once, layout, name), layout), once)


@dtypes
def test_int8_is_within_half_a_step_of_its_channel_or_token(dtype: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=32, kv_heads=2, head_dim=16, dtype=dtype)
    block = normal_block(layout)
    back = decoded(coded(block, layout, "lossy-int8"), layout)
    exact, out = (as_values(each, dtype).reshape(2, 32, 2, 16) for each in (block, back))
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23}[dtype]
    for at, axis in ((0, 0), (1, 2)):  # keys: of a channel over tokens; values: of a token and head over dims
        step = np.abs(exact[at]).max(axis=axis, keepdims=True) / 127
        assert (np.abs(out[at] - exact[at]) <= 0.5001 * step + rounding * np.abs(exact[at])).all()


@names
def test_an_outlying_channel_of_the_keys_does_not_spoil_the_others(name: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=64, kv_heads=2, head_dim=16, dtype="float32")
    values = np.random.default_rng(0).standard_normal((2, 64, 2, 16)).astype(np.float32)
    values[0, :, 0, 3] *= 1000
    out = decoded(coded(values.reshape(-1).view(np.uint8), layout, name), layout).view(np.float32).reshape(values.shape)
    others = np.delete(values[0, :, 0], 3, axis=1)
    error = np.abs(np.delete(out[0, :, 0], 3, axis=1) - others)
    assert error.max() < 0.2 and error.mean() < 0.05


@names
@dtypes
@pytest.mark.parametrize("bits", ["infinity", "negative infinity", "not a number", "the largest number"])
def test_a_block_with_a_number_that_cannot_be_held_is_stored_raw(name: str, dtype: str, bits: str) -> None:
    layout = layout_of(dtype)
    block = normal_block(layout)
    words = block.view(np.uint32 if dtype == "float32" else np.uint16)
    sign = 1 << 8 * words.itemsize - 1
    words[words.size // 2] = {
        "infinity": INFINITY[dtype],
        "negative infinity": INFINITY[dtype] | sign,
        "not a number": INFINITY[dtype] | 1,
        "the largest number": INFINITY[dtype] - 1,
    }[bits]
    record = coded(block, layout, name)
    assert record.codec == "raw"
    assert np.array_equal(decoded(record, layout), block)


@names
@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 6e-8, 3.5, 3e4])
def test_runs_of_one_number_zeros_and_subnormals_among_them_come_back(name: str, dtype: str, value: float) -> None:
    layout = layout_of(dtype)
    block = as_block(np.full(layout.block_bytes // layout.item_bytes, value), dtype)
    exact, out = as_values(block, dtype), as_values(decoded(coded(block, layout, name), layout), dtype)
    assert np.isfinite(out).all()
    assert np.abs(out - exact).max() <= 0.07 * abs(value) + 2.0**-126


@names
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_tail_too_short_to_save_anything_is_exact_or_near(name: str, num_tokens: int) -> None:
    layout = layout_of("bfloat16")
    block = normal_block(layout)
    record = coded(block, layout, name, num_tokens)
    assert record.stored_bytes <= coded(block, layout, "raw", num_tokens).stored_bytes
    error = attention_error(block, decoded(record, layout), layout=layout, num_tokens=num_tokens)
    assert error.mean < MAX_ERROR[name]


@names
def test_other_dtypes_are_refused_with_the_remedy(name: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=1, head_dim=4, dtype="float8_e5m2")
    with pytest.raises(ConfigError, match="lossless"):
        coded(np.zeros(layout.block_bytes, dtype=np.uint8), layout, name)


def test_runs_longer_than_a_frame_and_a_token_longer_than_a_piece_come_back() -> None:
    layers = (LayerLayout(kv_heads=1, k_dim=40_000, v_dim=200_000), LayerLayout(kv_heads=8, k_dim=64, v_dim=64))
    layout = BlockLayout(block_size=300, dtype="bfloat16", layers=layers[1:])
    wide = BlockLayout(block_size=3, dtype="bfloat16", layers=layers[:1])
    for each in (layout, wide):
        for name in LOSSY:
            block = normal_block(each)
            record = coded(block, each, name)
            assert len(read_header(record.data).frame_sizes) > 2 * len(each.runs)
            assert attention_error(block, decoded(record, each), layout=each).mean < 2 * MAX_ERROR[name]


def test_int8_is_half_the_bytes_and_a_lossless_codec_has_no_error() -> None:
    layout = BlockLayout.uniform(num_layers=2, block_size=256, kv_heads=4, head_dim=64, dtype="bfloat16")
    block = normal_block(layout)
    errors = {name: codec_error(codec_by_name(name), block, layout=layout) for name in [*LOSSY, "exponent16"]}
    assert errors["exponent16"].max == errors["exponent16"].max_logit_deviation == 0
    for name in LOSSY:
        record = coded(block, layout, name)
        assert record.stored_bytes < 0.52 * record.raw_bytes


def test_the_error_is_that_of_attention_computed_by_hand() -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=2, kv_heads=1, head_dim=1, dtype="float32")
    exact = np.array([0, np.log(3), 1, 5], dtype=np.float32).view(np.uint8)  # k0 k1 v0 v1: weights 1/4, 3/4, output 4
    near = np.array([0, 0, 1, 5], dtype=np.float32).view(np.uint8)  # weights 1/2, output 3
    error = attention_error(exact, near, layout=layout, queries=[np.ones((1, 1, 1), dtype=np.float32)])
    assert error.mean == pytest.approx(0.25) and error.max_logit_deviation == pytest.approx(np.log(3))


def test_queries_of_grouped_heads_are_taken_and_others_refused() -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=8, kv_heads=2, head_dim=4, dtype="float32")
    block = normal_block(layout)
    grouped = np.ones((3, 6, 4), dtype=np.float32)
    assert attention_error(block, block, layout=layout, queries=[grouped]).max == 0
    for shape in ((3, 3, 4), (3, 2, 5), (3, 4)):
        with pytest.raises(ShapeError):
            attention_error(block, block, layout=layout, queries=[np.ones(shape, dtype=np.float32)])


GOLDEN = {
    "lossy-int8": (
        "8181818181818181a1a2a3a4a5a7a8aac0c3c5c7cacccfd2e0e3e7eaeef2f6fb"  # K: a byte a number
        "80407840704068406040584050404840"  # the largest of each channel: 4, 3.875, ...
        "002a557f495b6d7f5c68737f666e777f6b72787f6e74797f71767a7f73777b7f"  # V
        "c03e603fb03ff03f1840384058407840"  # the largest of each token and head: 0.375, 0.875, ...
    ),
}


@names
def test_the_bytes_of_a_lossy_record_never_change(name: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=2, head_dim=4, dtype="bfloat16")
    block = as_block(np.arange(64, dtype=np.float32) / 8 - 4, "bfloat16")
    record = coded(block, layout, name)
    header = read_header(record.data)
    assert (header.codec.codec_id, header.codec.version) == (6, 1)
    assert record.data[header.payload_offset :].tobytes().hex() == GOLDEN[name]


@names
@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
    resealed=st.booleans(),
)
def test_a_mutated_lossy_record_is_refused_or_numbers_of_some_kind(name: str, edits, resealed: bool) -> None:
    layout = layout_of("bfloat16")
    record = coded(normal_block(layout), layout, name)
    data = bytearray(record.data)
    for at, value in edits:
        data[at % len(data)] = value
    if resealed:  # as a writer with another idea of the codec would
        data[8:16] = xxhash.xxh3_64_intdigest(data[16:], seed=int.from_bytes(data[:8], "little")).to_bytes(8, "little")
    out = np.empty(layout.block_bytes, dtype=np.uint8)
    with contextlib.suppress(StoreError):
        decode_record(data, out, expected=record.info, layout=layout, lossy_codec=name)


def test_int8_frames_may_be_coded_by_another_writer() -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=512, kv_heads=2, head_dim=64, dtype="bfloat16")
    run, values = layout.runs[0], normal_block(layout)[: layout.runs[0].token_bytes * 512]
    codec, out, again = codec_by_name("lossy-int8"), np.empty_like(values), np.empty_like(values)
    sizes = codec.encode_run(values, run, plain := np.empty_like(values))
    assert sizes is not None and len(sizes) == 2
    coded_size = FrameCoder(LITERALS_ONLY).encode(plain[: sizes[0]], frames := np.empty_like(values))
    assert coded_size < sizes[0]
    frames[coded_size : coded_size + sizes[1]] = plain[sizes[0] : sum(sizes)]
    codec.decode_run(plain[: sum(sizes)], sizes, run, out)
    codec.decode_run(frames[: coded_size + sizes[1]], [coded_size, sizes[1]], run, again)
    assert np.array_equal(out, again)


@names
def test_scales_of_another_length_are_corrupt(name: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=8, kv_heads=2, head_dim=4, dtype="bfloat16")
    codec, run = codec_by_name(name), layout.runs[0]
    out = np.empty(run.token_bytes * 8, dtype=np.uint8)
    sizes = codec.encode_run(normal_block(layout)[: out.size], run, frames := np.empty(out.size, dtype=np.uint8))
    assert sizes is not None
    with pytest.raises(CorruptBlockError, match="scales"):
        codec.decode_run(frames[: sum(sizes) - 1], [*sizes[:-1], sizes[-1] - 1], run, out)


@names
@dtypes
def test_the_largest_and_the_smallest_numbers_that_a_lossy_codec_holds_come_back(name: str, dtype: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=8, kv_heads=2, head_dim=8, dtype=dtype)
    form = float_format(dtype)
    for magnitude in (form.largest, form.largest - 1, 1, 0):
        words = np.full(layout.block_bytes // layout.item_bytes, magnitude, dtype=form.word)
        words[::3] |= form.word.type(~form.magnitude & (1 << 8 * form.word.itemsize) - 1)  # the sign
        back = decoded(coded(words.view(np.uint8), layout, name), layout).view(form.word)
        assert np.all((back & form.word.type(form.magnitude)) <= form.largest)


def forged(name: str, dtype: str, *, scales: int | None = None, number: int | None = None) -> CorruptBlockError | None:
    """Decode a run of which the scales' bytes, or one number's byte, are none that a writer writes."""
    layout = BlockLayout.uniform(num_layers=1, block_size=64, kv_heads=2, head_dim=8, dtype=dtype)
    codec, run = codec_by_name(name), layout.runs[0]
    values = as_block(np.full(layout.block_bytes // layout.item_bytes, 1.5), dtype)[: run.token_bytes * 64]
    sizes = codec.encode_run(values, run, frames := np.empty(values.size, dtype=np.uint8))
    assert sizes is not None
    plane = np.full(64 * 16, 0x38 if number is None else number, dtype=np.uint8)
    packed = frames[sum(sizes[:-1]) : sum(sizes)].copy()
    if scales is not None:
        item = layout.item_bytes
        packed = np.frombuffer(scales.to_bytes(item, "little") * (packed.size // item), dtype=np.uint8)
    out = np.empty(values.size, dtype=np.uint8)
    try:
        codec.decode_run(np.concatenate([plane, packed]), [plane.size, packed.size], run, out)
    except CorruptBlockError as exc:
        return exc
    assert np.all(np.isfinite(as_values(out, dtype)))
    return None


@dtypes
def test_forged_scales_and_numbers_of_int8_are_corrupt(dtype: str) -> None:
    form = float_format(dtype)
    sign = form.magnitude + 1
    for scales in (form.largest + 1, INFINITY[dtype], INFINITY[dtype] + 1, sign | 0x3C00, sign, form.magnitude):
        assert forged("lossy-int8", dtype, scales=scales), hex(scales)
    assert forged("lossy-int8", dtype, number=0x80)
    assert not forged("lossy-int8", dtype, number=0x81)
    assert not forged("lossy-int8", dtype, scales=form.largest, number=0x81)
    assert not forged("lossy-int8", dtype, scales=0)


@pytest.mark.parametrize("name", ["exponent16", "exponent32", *LOSSY])
def test_a_codec_that_the_dtype_cannot_have_is_corrupt(name: str) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=1, kv_heads=1, head_dim=3, dtype="float8_e5m2")
    record, codec = np.zeros(256, dtype=np.uint8), codec_by_name(name)
    assert [codec.num_frames(run, 1) for run in layout.runs] == [2, 2]
    size = write_header(record, info_of(1), layout, codec, [1, 2, 1, 2])
    out = np.empty(layout.block_bytes, dtype=np.uint8)
    lossy_codec = name if codec.is_lossy else ""
    with pytest.raises(CorruptBlockError, match=r"does not decode|a rest of 2 bytes"):
        decode_record(record[:size], out, expected=info_of(1), layout=layout, lossy_codec=lossy_codec)


def test_a_lossy_namespace_is_another_one_and_says_in_what() -> None:
    exact = Namespace(weights="w", layout=COLD_LAYOUT)
    lossy = {name: replace(exact, lossy_codec=name) for name in LOSSY}
    assert len({exact.digest, *(each.digest for each in lossy.values())}) == 1 + len(LOSSY)
    for each in lossy.values():
        assert differing_fields(each.identity(), exact.identity()) == ["lossy_codec"]


def test_the_digests_of_exact_namespaces_are_what_they_were_before_there_were_lossy_ones() -> None:
    assert Namespace(weights="w", layout=COLD_LAYOUT).digest.hex() == "43299252d490ac1fd9135182cd84cff7"


@names
def test_verify_finds_lossy_bytes_in_a_namespace_that_does_not_say_so(name: str, tmp_path: Path) -> None:
    exact = Namespace(weights="w", layout=COLD_LAYOUT)
    block = normal_block(COLD_LAYOUT)
    with open_store(tmp_path) as store:
        for namespace, is_sound in ((replace(exact, lossy_codec=name), True), (exact, False)):
            store.open_namespace(namespace)
            info = info_of(16, namespace.digest)
            record = encode_record(info, block, layout=COLD_LAYOUT, codec=codec_by_name(name))
            assert store.put([record]) == [PutOutcome.STORED]
            report = store.verify()
            assert report.is_sound is is_sound
        assert "does not say so" in report.damaged[info.block_hash]


FIT = {  # what a namespace names -> the codecs that its records may have
    "": {codec.name for codec in CODECS if not codec.is_lossy},
    **{name: {name, "raw"} for name in LOSSY},
}


@pytest.mark.parametrize("lossy_codec", FIT, ids=lambda name: name or "exact")
@pytest.mark.parametrize("codec", [codec.name for codec in CODECS])
def test_a_record_is_decoded_only_if_its_codec_fits_the_namespace(codec: str, lossy_codec: str) -> None:
    layout = layout_of("float32" if codec == "exponent32" else "bfloat16")
    record = coded(np.zeros(layout.block_bytes, dtype=np.uint8), layout, codec)
    assert record.codec == codec
    out = np.empty(layout.block_bytes, dtype=np.uint8)

    def decode() -> object:
        return decode_record(record.data, out, expected=record.info, layout=layout, lossy_codec=lossy_codec)

    assert fits_namespace(codec, lossy_codec) is (codec in FIT[lossy_codec])
    if codec in FIT[lossy_codec]:
        assert decode() is None
    else:
        with pytest.raises(CorruptBlockError, match=f"a record of {codec} in a namespace"):
            decode()


@names
def test_a_lossy_record_is_refused_where_frames_stay_coded_and_as_a_partial_block(name: str) -> None:
    layout = layout_of("bfloat16")
    for num_tokens in (5, layout.block_size):
        record = coded(normal_block(layout), layout, name, num_tokens)
        out = np.empty(layout.block_bytes, dtype=np.uint8)
        with pytest.raises(CorruptBlockError, match="is exact"):
            decode_record(record.data, out, expected=record.info, layout=layout, coded=CodedBlock())
    exact = coded(normal_block(layout), layout, "exponent16")
    with pytest.raises(CorruptBlockError, match="a record of exponent16"):
        decode_record(
            exact.data, out, expected=exact.info, layout=layout, lossy_codec=name, coded=(left := CodedBlock())
        )
    assert not left.frame_sizes


@names
def test_a_store_refuses_a_lossy_record_of_an_exact_namespace_whatever_others_say_of_it(
    name: str, tmp_path: Path
) -> None:
    exact = Namespace(weights="w", layout=COLD_LAYOUT)
    record = encode_record(
        info_of(16, exact.digest), normal_block(COLD_LAYOUT), layout=COLD_LAYOUT, codec=codec_by_name(name)
    )
    with open_store(tmp_path) as store:
        put_unchecked(store, record)
    lies = [b"{}", b"no JSON", replace(exact, lossy_codec=name).describe(), exact.describe()]
    for description in lies:
        with open_store(tmp_path) as store:
            with contextlib.suppress(TierKVError):
                store.register_namespace(exact.digest, description)
            assert read(store, record.info) is MissReason.CORRUPT
            assert store.read_record(record.info.block_hash) is None
    with open_store(tmp_path) as store:
        assert store.lookup(record.info.block_hash) is None, "it went with the next write, for its namespace is known"


@names
def test_an_exact_record_takes_the_place_of_a_lossy_one_under_the_same_exact_namespace(
    name: str, tmp_path: Path
) -> None:
    exact = Namespace(weights="w", layout=COLD_LAYOUT)
    block, info = normal_block(COLD_LAYOUT), info_of(16, exact.digest)
    with open_store(tmp_path) as store:
        store.open_namespace(exact)
        put_unchecked(store, encode_record(info, block, layout=COLD_LAYOUT, codec=codec_by_name(name)))
        assert store.put([encode_record(info, block, layout=COLD_LAYOUT)]) == [PutOutcome.STORED]
        assert np.array_equal(read(store, info), block)
        assert store.verify().is_sound


def test_a_store_opened_for_reading_knows_a_lossy_namespace_and_one_that_is_not_described(tmp_path: Path) -> None:
    lossy = Namespace(weights="w", layout=COLD_LAYOUT, lossy_codec="lossy-int8")
    block, info = normal_block(COLD_LAYOUT), info_of(16, lossy.digest)
    with open_store(tmp_path) as store:
        put_unchecked(store, encode_record(info, block, layout=COLD_LAYOUT, codec=codec_by_name("lossy-int8")))
    with open_store(tmp_path, read_only=True) as store:
        assert read(store, info) is MissReason.CORRUPT, "nobody has described this namespace"
        store.open_namespace(lossy)
        assert isinstance(read(store, info), np.ndarray)
    with open_store(tmp_path) as store:
        store.open_namespace(lossy)
    with open_store(tmp_path, read_only=True) as store:
        assert isinstance(read(store, info), np.ndarray), "the store itself has the description now"
        assert store.read_record(info.block_hash) is not None


@names
def test_a_state_file_refuses_a_lossy_record_of_an_exact_namespace(name: str, tmp_path: Path) -> None:
    exact = Namespace(weights="w", layout=COLD_LAYOUT)
    for namespace in (exact, replace(exact, lossy_codec=name)):
        info = info_of(16, namespace.digest)
        record = encode_record(info, normal_block(COLD_LAYOUT), layout=COLD_LAYOUT, codec=codec_by_name(name))
        path = tmp_path / f"{namespace.lossy_codec}.tkv"
        path.write_bytes(state_of(namespace, [record.data.tobytes()]))
        out = np.empty(COLD_LAYOUT.block_bytes, dtype=np.uint8)
        with StateFile(path) as state:
            reason = state.read_into(info, out, layout=COLD_LAYOUT)
            assert reason is (None if namespace.lossy_codec else MissReason.CORRUPT)


def put_unchecked(store: ColdStore, record: EncodedRecord) -> None:
    """Put a record as a program that does not look at its codec would."""
    raw = encode_record(record.info, normal_block(COLD_LAYOUT), layout=COLD_LAYOUT, codec=codec_by_name("raw"))
    with store._writer.batch() as batch:
        assert batch.insert(raw) is PutOutcome.STORED
        value = bytearray(batch.txn.get(record.info.block_hash, db=batch.databases.blocks))
        value[: record.stored_bytes] = record.data.tobytes()
        batch.txn.put(record.info.block_hash, bytes(value), db=batch.databases.blocks)


REMOVED = bytes.fromhex(  # a record of lossy-fp8-e4m3, codec 5, as tierkv wrote it while it had that codec
    "544b5642020000000886b18064ceae1a999411b80cd855e40a4aaf4d105463f857b39d78de5b3daac3c8adb10e47db94"
    "57b39d78de5b3daac3c8adb10e47db940400000004000000050001000400000080000000000000004400000000000000"
    "0401000000000000c0000000020000008bbd8642d4b2ec606bd92bb9099b69a900000000010000000200000003000000"
    "200000000200000020000000020000000000000000000000000000000000000000000000000000000000000000000000"
    "f8f8f7f6fefefdfcf4f4f3f2fafaf9f8f0efeeedf4f3f2f1e8e6e4e2e8e4e0d872710058606460626466707172736c6d"
    "6e6f7878797a727273747c7c7d7e767677787172"
)


def test_a_record_of_the_removed_codec_is_a_miss_that_is_counted_and_stays(tmp_path: Path) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=2, head_dim=4, dtype="bfloat16")
    namespace = Namespace(weights="w", layout=layout, lossy_codec="lossy-fp8-e4m3")
    info, out = info_of(4, namespace.digest), np.empty(layout.block_bytes, dtype=np.uint8)
    with pytest.raises(ConfigError, match="no codec named 'lossy-fp8-e4m3'"):
        codec_by_name(namespace.lossy_codec)
    with open_store(tmp_path / "store") as store:
        store.open_namespace(namespace)
        put_unchecked(store, encode_record(info, normal_block(layout), layout=layout, codec=codec_by_name("raw")))
        with store._writer.batch() as batch:
            entry = batch.entry(info.block_hash)
            assert entry is not None
            batch.txn.put(info.block_hash, REMOVED, db=batch.databases.blocks)
            batch.write_entry(info.block_hash, replace(entry, codec="unknown codec 5"))
        assert store.read_into(info, out, layout=layout) is MissReason.FORMAT
        store.flush()
        assert store.stats().misses[MissReason.FORMAT] == 1
        assert store.verify().other_formats.keys() == {info.block_hash}
        assert store.evict(to_bytes=0).blocks == 1
    path = tmp_path / "state.tkv"
    position = state_start(namespace.describe())
    row = (info.block_hash, info.parent, position, len(REMOVED), info.num_tokens, 0)
    body = REMOVED + bytes(-len(REMOVED) % ALIGN_BYTES)
    path.write_bytes(craft(namespace.digest, namespace.describe(), body, [row]))
    with StateFile(path) as state:
        assert state.read_into(info, out, layout=layout) is MissReason.FORMAT
        assert state.read_record(info.block_hash) is None
