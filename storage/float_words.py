"""Floats as the integers that hold them, and to float32 and back, in numpy alone: it has no bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError

__all__ = ["FloatFormat", "FloatWords", "Floats", "float_format"]

Floats: TypeAlias = "npt.NDArray[np.float32]"
FloatWords: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

_HALF_OF_BFLOAT16 = np.uint32(0x8000)
_SIXTEEN = np.uint32(16)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """How a dtype's numbers lie in unsigned integers.

    word: the integer. magnitude: the bits of it beside the sign; as integers they are ordered as the numbers are.
    largest: the magnitude of the largest number of three mantissa bits; infinities and NaNs lie above it.
    """

    name: str
    word: np.dtype[np.unsignedinteger[Any]]
    magnitude: int
    largest: int

    def widen(self, words: FloatWords, out: Floats) -> None:
        """Write the numbers of contiguous `words` [n] into `out` [n]."""
        if self.name == "bfloat16":
            bits = out.view(np.uint32)
            np.copyto(bits, words)
            np.left_shift(bits, _SIXTEEN, out=bits)
        else:
            np.copyto(out, words.view(np.float16 if self.name == "float16" else np.float32))

    def narrow(self, floats: Floats, out: FloatWords) -> None:
        """Write the nearest numbers of this format into contiguous `out` [n]; `floats` [n] is overwritten."""
        if self.name == "bfloat16":
            bits = floats.view(np.uint32)
            np.add(bits, _HALF_OF_BFLOAT16, out=bits)
            np.right_shift(bits, _SIXTEEN, out=bits)
            np.copyto(out, bits, casting="unsafe")
        else:
            np.copyto(out.view(np.float16 if self.name == "float16" else np.float32), floats, casting="same_kind")


_FORMATS = (
    FloatFormat("bfloat16", np.dtype(np.uint16), 0x7FFF, 0x7F70),
    FloatFormat("float16", np.dtype(np.uint16), 0x7FFF, 0x7B80),
    FloatFormat("float32", np.dtype(np.uint32), 0x7FFF_FFFF, 0x7F70_0000),
)


def float_format(dtype: str) -> FloatFormat:
    """Return the format of a layout's dtype. Raises ConfigError for one that the lossy codecs do not take."""
    for known in _FORMATS:
        if known.name == dtype:
            return known
    names = ", ".join(known.name for known in _FORMATS)
    raise ConfigError(f"no lossy codec takes {dtype}", hint=f"they take {names}; choose a lossless codec")
