"""The codecs there are, by name and by the id that a record holds."""

from __future__ import annotations

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.codec import Codec
from tierkv.storage.codecs_exact import ExponentCodec, RawCodec, ZstdCodec
from tierkv.storage.codecs_lossy import LossyCodec
from tierkv.storage.frames import LEVEL_3, LITERALS_ONLY
from tierkv.storage.quantisers import Fp8Quantiser, Int8Quantiser

__all__ = [
    "CODECS",
    "RAW",
    "Codec",
    "check_codec",
    "codec_by_id",
    "codec_by_name",
    "default_codec",
    "fits_namespace",
]

RAW = RawCodec()
CODECS: tuple[Codec, ...] = (
    RAW,
    ZstdCodec(name="zstd", codec_id=1, parameters=LEVEL_3),
    ExponentCodec(name="exponent16", codec_id=2, item_bytes=2),
    ExponentCodec(name="exponent32", codec_id=3, item_bytes=4),
    ZstdCodec(name="huffman", codec_id=4, parameters=LITERALS_ONLY),
    LossyCodec(name="lossy-fp8-e4m3", codec_id=5, quantiser=Fp8Quantiser(), is_coded=True),
    LossyCodec(name="lossy-int8", codec_id=6, quantiser=Int8Quantiser(), is_coded=False),
)
"""Every codec this version reads. An id is never given away again."""

_DEFAULTS = {
    "bfloat16": "exponent16",
    "float16": "exponent16",
    "float32": "exponent32",
    "float64": "zstd",
    "float8_e4m3fn": "huffman",
    "float8_e5m2": "huffman",
}


def default_codec(dtype: str) -> Codec:
    """Return the codec that suits a layout's dtype best."""
    return codec_by_name(_DEFAULTS[dtype])


def codec_by_name(name: str) -> Codec:
    """Return the codec of this name. Raises ConfigError."""
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise ConfigError(f"no codec named {name!r}", hint=f"one of {', '.join(c.name for c in CODECS)}")


def codec_by_id(codec_id: int) -> Codec | None:
    """Return the codec that a record names, or None if this version has none of that id."""
    return next((codec for codec in CODECS if codec.codec_id == codec_id), None)


def fits_namespace(codec: str, lossy_codec: str) -> bool:
    """Tell whether a namespace may have records of a codec. Every reader and every writer of records asks this.

    codec: its name. lossy_codec: the namespace's, "" if it is exact. An exact namespace has records of every lossless
    codec; a lossy one has those of its own codec, and raw ones, which are the blocks that its codec cannot hold.
    """
    if lossy_codec:
        return codec in (lossy_codec, RAW.name)
    return any(known.name == codec and not known.is_lossy for known in CODECS)


def check_codec(codec: str, lossy_codec: str) -> None:
    """Raise CorruptBlockError unless `fits_namespace`: a record that does not fit is damage, and a miss."""
    if not fits_namespace(codec, lossy_codec):
        kind = f"is of {lossy_codec}" if lossy_codec else "is exact"
        raise CorruptBlockError(f"a record of {codec} in a namespace that {kind}")
