"""The codec of new blocks, and the namespace that names it where it changes bytes."""

from __future__ import annotations

from dataclasses import replace

from tierkv.errors import ConfigError
from tierkv.storage.codecs import Codec, codec_by_name, default_codec
from tierkv.storage.codecs_lossy import float_format
from tierkv.values.namespace import Namespace

__all__ = ["codec_of", "namespace_of"]


def codec_of(name: str, namespace: Namespace) -> Codec:
    """Return the codec of a name, "auto" for the best. Raises ConfigError if it does not fit dtype or namespace."""
    dtype = namespace.layout.dtype
    codec = default_codec(dtype) if name == "auto" else codec_by_name(name)
    if codec.is_lossy:
        float_format(dtype)
    if namespace.lossy_codec not in ("", codec.name):
        raise ConfigError(
            f"the namespace is of blocks that went through {namespace.lossy_codec}, the codec is {codec.name}",
            hint="leave lossy_codec to the cache",
        )
    return codec


def namespace_of(namespace: Namespace, codec: Codec) -> Namespace:
    """Return the namespace of blocks that go through a codec: another one for bytes that it changes."""
    return replace(namespace, lossy_codec=codec.name if codec.is_lossy else "")
