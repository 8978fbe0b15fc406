"""Keys of blocks: from token ids, for an engine that knows them, or from a digest, for one that gives only a hash.

The two are never mixed in one namespace. `digest_namespace` makes a namespace for digests; every other one is for
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

from tierkv.errors import ConfigError
from tierkv.values.block import (
    TOKEN_BYTES,
    BlockHash,
    ContentDigest,
    HashFunction,
    TokenIds,
    as_token_array,
    chain_content_digest,
    hash_block,
)
from tierkv.values.checks import check_count
from tierkv.values.layout import DTYPE_BYTES, BlockLayout, LayerLayout
from tierkv.values.namespace import DIGEST_IDENTITY, IDENTITY, Namespace, has_rows

__all__ = ["BlockKey", "BlockKeys", "digest_key", "digest_namespace", "is_digest_namespace"]

_DIGEST_TOKENS = 16
_ROW_ITEMS = 2 * _DIGEST_TOKENS
_LEAST_DIGEST_BYTES = 32
_MOST_DIGEST_BYTES = (_DIGEST_TOKENS - 1) * TOKEN_BYTES
_MOST_GROUP = 1 << 24


class BlockKey(NamedTuple):
    """The identity of one block within a namespace. Two blocks are the same only if all four fields are equal.

    parent_hash: of the block before it, or the namespace digest. token_bytes: the block's token ids as little-endian
    uint32; of a digest key the digest itself. content_digest: of these and of all blocks before it.
    """

    block_hash: BlockHash
    parent_hash: BlockHash
    content_digest: ContentDigest
    token_bytes: bytes


class BlockKeys(Sequence[BlockKey]):
    """The keys of the whole blocks of one token sequence. The engine keeps them with its request and extends them.

    root: the namespace digest. Extending costs time for the new tokens only.

    >>> keys = BlockKeys(namespace.digest, 4)
    >>> keys.extend([1, 2, 3, 4, 5])
    >>> keys.extend([6, 7, 8])
    >>> len(keys), keys.num_tokens
    (2, 8)
    """

    def __init__(self, root: BlockHash, block_size: int, *, hash_function: HashFunction = hash_block) -> None:
        self._root = root
        self._block_bytes = block_size * TOKEN_BYTES
        self._hash = hash_function
        self._keys: list[BlockKey] = []
        self._rest = b""

    def extend(self, token_ids: TokenIds) -> None:
        """Add tokens; those that fill no block wait for the next call. Raises ConfigError for what is no token id."""
        token_bytes = self._rest + as_token_array(token_ids).tobytes()
        parent, digest = self._keys[-1][0:3:2] if self._keys else (self._root, self._root)
        size = self._block_bytes
        end = len(token_bytes) // size * size
        for start in range(0, end, size):
            tokens = token_bytes[start : start + size]
            block_hash = self._hash(parent, tokens)
            digest = chain_content_digest(digest, tokens)
            self._keys.append(BlockKey(block_hash, parent, digest, tokens))
            parent = block_hash
        self._rest = token_bytes[end:]

    @property
    def num_tokens(self) -> int:
        """All tokens given so far, those of the last partial block included."""
        return (len(self._keys) * self._block_bytes + len(self._rest)) // TOKEN_BYTES

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, at: int) -> BlockKey: ...
    @overload
    def __getitem__(self, at: slice) -> list[BlockKey]: ...
    def __getitem__(self, at: int | slice) -> BlockKey | list[BlockKey]:
        return self._keys[at]


def digest_namespace(
    *,
    weights: str,
    row_bytes: int,
    dtype: str,
    architecture: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Namespace:
    """Return a namespace whose blocks are opaque rows that an engine names by digests.

    row_bytes: bytes of one row, a multiple of 32 items of `dtype`, which the codecs are chosen by.
    architecture: all else that decides a row's bytes: config, layout, strides, page size, groups, ranks, engine.
    fields: further fields of `Namespace`. Raises ConfigError.
    """
    row_bytes = check_count("row_bytes", row_bytes, least=1)
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}")
    items = row_bytes // DTYPE_BYTES[dtype]
    if row_bytes % (_ROW_ITEMS * DTYPE_BYTES[dtype]):
        raise ConfigError(f"a row of {row_bytes} bytes is no multiple of {_ROW_ITEMS} numbers of {dtype}")
    dim = items // _ROW_ITEMS
    layer = LayerLayout(kv_heads=1, k_dim=dim, v_dim=dim)
    layout = BlockLayout(block_size=_DIGEST_TOKENS, dtype=dtype, layers=(layer,))
    described = {**(architecture or {}), IDENTITY: DIGEST_IDENTITY}
    return Namespace(weights=weights, architecture=described, layout=layout, **fields)


def is_digest_namespace(namespace: Namespace) -> bool:
    """Return whether a namespace's blocks are named by digests, not by tokens."""
    return has_rows(namespace.architecture)


def digest_key(root: BlockHash, digest: bytes, group: int = 0) -> BlockKey:
    """Return the key of a row that an engine names by a digest, which the store keeps and compares whole.

    digest: a cryptographic one of 32 to 60 bytes that covers all tokens up to the row's end. group: the KV cache group.
    Raises ConfigError for another length: a short hash can be met by chance, or forged.
    """
    digest = bytes(digest)
    if not _LEAST_DIGEST_BYTES <= len(digest) <= _MOST_DIGEST_BYTES:
        raise ConfigError(
            f"a digest has {_LEAST_DIGEST_BYTES} to {_MOST_DIGEST_BYTES} bytes, this one {len(digest)}",
            hint="have the engine use sha256",
        )
    if check_count("group", group) >= _MOST_GROUP:
        raise ConfigError(f"group must be below {_MOST_GROUP}, got {group}")
    head = (len(digest) << 24 | group).to_bytes(TOKEN_BYTES, "little")
    token_bytes = (head + digest).ljust(_DIGEST_TOKENS * TOKEN_BYTES, b"\0")
    return BlockKey(hash_block(root, token_bytes), root, chain_content_digest(root, token_bytes), token_bytes)
