"""What the descriptions of a store's namespaces say: the lossy codec of their blocks, and their tenant."""

from __future__ import annotations

from functools import lru_cache

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.cold_rows import NAMESPACE_PREFIX, Databases, NamespaceRow, unpack_row
from tierkv.storage.lmdb_env import ReadTransaction
from tierkv.values.block import BlockHash
from tierkv.values.namespace import parse_description

__all__ = ["lossy_codec_in", "read_lossy_codec", "salt_digest_in", "tenant_of_row"]


@lru_cache(maxsize=64)
def lossy_codec_in(description: bytes, digest: BlockHash) -> str | None:
    """Return the lossy codec that a namespace's description names, "" for an exact namespace.

    None where it is unknown: the description is lost, or the digest was computed of another description.
    """
    try:
        parsed = parse_description(description)
    except ConfigError:
        return None
    return parsed.lossy_codec if parsed.digest == digest else None


def read_lossy_codec(txn: ReadTransaction, databases: Databases, digest: BlockHash) -> str | None:
    """Return the lossy codec of a stored namespace as `lossy_codec_in` does; None also where it is not stored."""
    packed = txn.get(NAMESPACE_PREFIX + digest, db=databases.meta)
    try:
        return None if packed is None else lossy_codec_in(unpack_row(packed).description, digest)
    except CorruptBlockError:
        return None


@lru_cache(maxsize=1024)
def salt_digest_in(description: bytes, digest: BlockHash) -> str | None:
    """Return the salt's hex digest that a namespace's description has; None as for `lossy_codec_in`."""
    try:
        parsed = parse_description(description)
    except ConfigError:
        return None
    return parsed.salt_digest if parsed.digest == digest else None


def tenant_of_row(row: NamespaceRow, digest: BlockHash) -> str | None:
    """Return the tenant of a namespace; None if its row does not have it and its description is lost."""
    return row.tenant if row.tenant is not None else salt_digest_in(row.description, digest)
