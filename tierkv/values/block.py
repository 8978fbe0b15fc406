"""The block: `block_size` tokens of K and V of every layer, its hash and its content digest.

A block hash is chained: xxh3-128 of the parent's block hash and the block's token ids as little-endian uint32. The
parent of a first block is the namespace digest, so equal tokens of two models have different hashes.
xxh3 is fast but can be forged in minutes. So a block found by its hash is also compared by its tokens and those
before it: the index walks its entries, and all others compare the block's *content digest*. That is chained sha256:
equal content digests mean equal tokens after equal tokens in the same namespace.

Source: hash chaining as in vLLM's prefix caching; comparing tokens as in nano-vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import ConfigError

__all__ = [
    "CONTENT_DIGEST_BYTES",
    "HASH_BYTES",
    "TOKEN_BYTES",
    "BlockHash",
    "ContentDigest",
    "HashFunction",
    "Tier",
    "TokenIds",
    "as_token_array",
    "as_token_bytes",
    "chain_content_digest",
    "common_run",
    "hash_block",
    "iter_chain",
]

HASH_BYTES = 16
CONTENT_DIGEST_BYTES = 16
TOKEN_BYTES = 4
_TOKEN = np.dtype("<u4")

BlockHash: TypeAlias = bytes
"""16 bytes: the chained hash of a block, or the namespace digest at the root of a chain."""

ContentDigest: TypeAlias = bytes
"""16 bytes that identify a block and all blocks before it; of a namespace, its digest."""

HashFunction: TypeAlias = Callable[[BlockHash, bytes], BlockHash]
"""(parent's block hash, token ids as little-endian uint32) -> block hash. Tests inject weaker ones."""

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer]"


class Tier(Enum):
    """The tiers, from fast to slow.

    >>> cache.evict(Tier.HOT)  # each block is written to the warm tier first
    2
    >>> cache.match(token_ids).tokens[Tier.WARM]
    8
    """

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"

    if not TYPE_CHECKING:  # Enum's own hash is Python code, and tiers are keys in hot loops
        __hash__ = object.__hash__


def hash_block(parent: BlockHash, token_bytes: bytes) -> BlockHash:
    """Return the chained hash of one block: 16 bytes, the same on every machine."""
    return xxhash.xxh3_128_digest(parent + token_bytes)


def chain_content_digest(parent: ContentDigest, token_bytes: bytes) -> ContentDigest:
    """Return the chained content digest of one block, whole or partial: 16 bytes that cannot be forged.

    parent: the content digest of the block before it, or the namespace digest. It takes 1 to 3 us for 256 token ids,
    20 times the hash: so a block gets one only when it leaves or enters the index.
    """
    return hashlib.sha256(parent + token_bytes).digest()[:CONTENT_DIGEST_BYTES]


def as_token_array(token_ids: TokenIds) -> npt.NDArray[np.uint32]:
    """Return token ids as a contiguous little-endian uint32 array (no copy if they are one).

    `array` converts a list in a quarter of numpy's time: 0.12 ms for 32,768 token ids.
    Raises ConfigError for anything but a flat sequence of integers in [0, 2**32).
    """
    if isinstance(token_ids, list) and token_ids:
        # Refused below, with a better message. numpy before 2.3 only warns of its booleans.
        with contextlib.suppress(TypeError, OverflowError, DeprecationWarning):
            found = np.frombuffer(array("I", token_ids), dtype=np.uint32).astype("<u4", copy=False)
            _refuse_booleans(token_ids, found)
            return found
    if type(token_ids) is np.ndarray and token_ids.dtype == _TOKEN and token_ids.ndim == 1:
        return np.ascontiguousarray(token_ids)
    try:
        ids = np.asarray(token_ids)
    except (ValueError, TypeError, OverflowError, RuntimeError) as exc:  # a GPU tensor raises TypeError
        raise ConfigError(f"token ids must be a flat sequence of integers: {exc}") from exc
    if ids.size == 0:
        return np.empty(0, dtype="<u4")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"token ids must be a flat sequence of integers, got {ids.dtype} of shape {ids.shape}")
    if not isinstance(token_ids, np.ndarray):
        _refuse_booleans(token_ids, ids)
    if ids.dtype != _TOKEN:
        if int(ids.min()) < 0 or int(ids.max()) >= 1 << 32:
            raise ConfigError("token ids must lie in [0, 2**32)")
        ids = ids.astype("<u4")
    return np.ascontiguousarray(ids)


def as_token_bytes(token_ids: TokenIds) -> bytes:
    """Return token ids as little-endian uint32 bytes. Raises as `as_token_array`.

    Of a list of one token, as each decode step of each sequence has it, in a tenth of the time.
    """
    if type(token_ids) is list and len(token_ids) == 1 and type(token_ids[0]) is int and 0 <= token_ids[0] < 1 << 32:
        return token_ids[0].to_bytes(TOKEN_BYTES, "little")
    return as_token_array(token_ids).tobytes()


def _refuse_booleans(token_ids: Sequence[object], found: npt.NDArray[np.integer]) -> None:
    """Raise ConfigError if a number was True or False. Checks zeros and ones only: most prompts have few."""
    for position in np.flatnonzero(found <= 1):
        if isinstance(token_ids[int(position)], bool | np.bool_):
            raise ConfigError(f"token ids must be integers, number {position} is {token_ids[int(position)]!r}")


def iter_chain(
    root: BlockHash,
    token_bytes: bytes,
    block_size: int,
    hash_function: HashFunction = hash_block,
    *,
    start: int = 0,
    end: int | None = None,
) -> Iterator[tuple[BlockHash, bytes]]:
    """Yield (block hash, token bytes) of every whole block of a sequence, first to last.

    token_bytes: the whole sequence as little-endian uint32. A partial block at its end is left out.
    start, end: the bytes of it that count; `root` is the hash before `start`.
    """
    step = block_size * TOKEN_BYTES
    parent = root
    for at in range(start, (len(token_bytes) if end is None else end) - step + 1, step):
        tokens = token_bytes[at : at + step]
        parent = hash_function(parent, tokens)
        yield parent, tokens


def common_run(left: bytes, right: bytes) -> int:
    """Return how many leading token ids two runs of token bytes have in common."""
    size = min(len(left), len(right)) // TOKEN_BYTES
    if left[: size * TOKEN_BYTES] == right[: size * TOKEN_BYTES]:
        return size
    a = np.frombuffer(left, dtype="<u4", count=size)
    b = np.frombuffer(right, dtype="<u4", count=size)
    return int(np.argmax(a != b))
