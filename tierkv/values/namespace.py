"""The namespace: all that must match for a block's bytes to be reusable. Its digest is the root of every chain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from tierkv.errors import ConfigError
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.layout import BlockLayout

__all__ = [
    "DESCRIPTION_LIMIT_BYTES",
    "DIGEST_IDENTITY",
    "FORMAT_VERSION",
    "IDENTITY",
    "NAME_LIMIT",
    "REPLICATED",
    "Namespace",
    "NamespaceDescription",
    "differing_fields",
    "has_rows",
    "parse_description",
]

FORMAT_VERSION = 1
"""Version of the bytes of a block and of what the digest covers."""

DESCRIPTION_LIMIT_BYTES = 1 << 16
"""Bounds what a store and a daemon keep of each namespace."""

NAME_LIMIT = 128
"""Characters of a namespace's name that are kept."""

IDENTITY = "identity"
DIGEST_IDENTITY = "digest"
"""The architecture's field that says what blocks are named by, and its value for digests."""

REPLICATED = "replicated"
"""The architecture's field that is true for blocks which every rank of a split model computes as a whole."""

_DEPTH_LIMIT = 100


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Identity of a model's keys and values. Hashable, and neither it nor its fields can change.

    weights: digest of the weights that computed them, not a name or a path.
    architecture: class and configuration that decide K and V, rope parameters included, as JSON values; copied.
    adapter: digest of a LoRA or other adapter's content, "" for none.
    salt: separates tenants; only its sha256 is stored, never the salt itself.
    tp_rank, tp_size: the tensor-parallel slice of heads that the blocks hold: 0 of 1 if they hold all heads, also
    where every rank of a split model holds them; the architecture then says so in REPLICATED.
    lossy_codec: the codec that changed the bytes, "" for bytes as they were computed.
    name: for humans, not part of the identity.
    Raises ConfigError for fields that make no namespace.

    >>> layout = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
    >>> one, other = (Namespace(weights="a digest", layout=layout, salt=tenant) for tenant in ("one", "other"))
    >>> one.digest == other.digest  # so neither tenant finds the blocks of the other
    False
    """

    weights: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    layout: BlockLayout
    adapter: str = ""
    salt: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    lossy_codec: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError("a namespace needs the digest of the model's weights")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ConfigError(f"tp_rank {self.tp_rank} is not in [0, {self.tp_size})")
        object.__setattr__(self, "architecture", _frozen(self.architecture))

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the digest, as JSON values; of the salt only its sha256."""
        return {
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "architecture": _as_json_value(self.architecture),
            **self.layout.to_dict(),
            "adapter": self.adapter,
            "salt": hashlib.sha256(self.salt.encode(errors="surrogatepass")).hexdigest() if self.salt else "",
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            # Left out for exact bytes, so that namespaces from before lossy codecs keep their digests.
            **({"lossy_codec": self.lossy_codec} if self.lossy_codec else {}),
        }

    @property
    def is_replicated(self) -> bool:
        """Whether every rank of a split model has the same blocks, which are then stored once."""
        return self.architecture.get(REPLICATED) is True

    @cached_property
    def digest(self) -> BlockHash:
        """16 bytes of sha256, so it cannot be forged: the parent of every chain's first block."""
        return _digest(self.identity())

    def describe(self) -> bytes:
        """Return JSON from which `parse_description` computes the digest, for a store or a daemon.

        Raises ConfigError if it is longer than DESCRIPTION_LIMIT_BYTES.
        """
        name = self.name.encode(errors="backslashreplace").decode()[:NAME_LIMIT]
        text = _canonical({"name": name, **self.identity()})
        if len(text) > DESCRIPTION_LIMIT_BYTES:
            raise ConfigError(f"the namespace's description has {len(text)} bytes, {DESCRIPTION_LIMIT_BYTES} at most")
        return text


def has_rows(architecture: Mapping[str, Any]) -> bool:
    """Return whether a namespace's blocks are rows, which an engine names by digests; others are named by tokens.

    A row has no parent but the namespace, and none of its own follow it.
    """
    return architecture.get(IDENTITY) == DIGEST_IDENTITY


class _FrozenDict(dict[Any, Any]):
    """A dictionary that is hashable and refuses changes. Its values are frozen too."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _FrozenDict, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a namespace cannot change: make another one with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def _frozen(value: Any, depth: int = 0) -> Any:
    """Copy a JSON value into one that is hashable and cannot change. Raises ConfigError for another value."""
    if depth > _DEPTH_LIMIT:
        raise ConfigError(f"a namespace has more than {_DEPTH_LIMIT} levels of nested values")
    if isinstance(value, Mapping):
        return _FrozenDict({key: _frozen(each, depth + 1) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(each, depth + 1) for each in value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(f"a namespace must be JSON values, got {type(value).__name__}")


def _as_json_value(value: Any) -> Any:
    """Copy a frozen value into plain dictionaries and lists."""
    if isinstance(value, dict):
        return {key: _as_json_value(each) for key, each in value.items()}
    return list(map(_as_json_value, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceDescription:
    """A checked description of a namespace. `digest` is computed from the fields, not read.

    fields: the whole description as JSON values, for humans. salt_digest: hex, "" without a salt.
    """

    digest: BlockHash
    name: str
    layout: BlockLayout
    salt_digest: str
    lossy_codec: str
    fields: dict[str, Any]


def parse_description(text: bytes) -> NamespaceDescription:
    """Read the text of `Namespace.describe` from an untrusted client, store or state file.

    Raises ConfigError unless it is JSON of at most DESCRIPTION_LIMIT_BYTES with exactly the known fields.
    """
    if len(text) > DESCRIPTION_LIMIT_BYTES:
        raise ConfigError(f"a namespace's description has {len(text)} bytes, {DESCRIPTION_LIMIT_BYTES} at most")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise ConfigError("a namespace's description is not JSON") from exc
    if not isinstance(fields, dict):
        raise ConfigError("a namespace's description is not a JSON object")
    unknown = fields.keys() - _FIELDS.keys()
    if unknown:
        raise ConfigError(f"a namespace's description has unknown fields: {', '.join(map(ascii, sorted(unknown)))}")
    for key, kind in _FIELDS.items():
        value = fields.get(key, "" if key == "lossy_codec" else None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"a namespace's description has no valid {key}")
    if fields["format_version"] != FORMAT_VERSION:
        raise ConfigError(f"a namespace's description has format {fields['format_version']}, known is {FORMAT_VERSION}")
    if not fields["weights"] or not 0 <= fields["tp_rank"] < fields["tp_size"] or fields.get("lossy_codec") == "":
        raise ConfigError("a namespace's description has no weights, an impossible rank or an empty codec")
    try:
        digest = _digest({key: value for key, value in fields.items() if key != "name"})
        fields["name"].encode()
    except (UnicodeEncodeError, ConfigError) as exc:
        raise ConfigError("a namespace's description is not Unicode text") from exc
    return NamespaceDescription(
        digest=digest,
        name=fields["name"][:NAME_LIMIT],
        layout=BlockLayout.from_dict(fields),
        salt_digest=fields["salt"],
        lossy_codec=fields.get("lossy_codec", ""),
        fields=fields,
    )


_FIELDS = {
    "name": str,
    "format_version": int,
    "weights": str,
    "architecture": dict,
    "block_size": int,
    "dtype": str,
    "layers": list,
    "adapter": str,
    "salt": str,
    "tp_rank": int,
    "tp_size": int,
    "lossy_codec": str,
}


def _canonical(value: dict[str, Any]) -> bytes:
    """Return the canonical JSON of a value: the same for the value and for its parsed JSON."""
    try:
        as_parsed = json.loads(json.dumps(value))  # turns all keys into strings before the sort
        text = json.dumps(as_parsed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"a namespace must be JSON values and Unicode text: {str(exc)!a}") from exc
    return text


def _digest(identity: dict[str, Any]) -> BlockHash:
    return hashlib.sha256(_canonical(identity)).digest()[:HASH_BYTES]


def differing_fields(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the fields, except the name, in which two descriptions differ."""
    names: list[str] = []
    for key in sorted(left.keys() | right.keys()):
        if not prefix and key == "name":
            continue
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names
