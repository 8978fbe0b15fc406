"""What must match for a block's bytes to be reusable; its digest is the root of every chain."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tierkv.block import HASH_BYTES, BlockHash
from tierkv.errors import ConfigError
from tierkv.layout import BlockLayout

__all__ = ["FORMAT_VERSION", "Namespace", "differing_fields"]

FORMAT_VERSION = 1
"""Version of the bytes of a block and of what the digest covers."""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Identity of a model's keys and values.

    weights: digest of the weights that computed them, not a name or a path.
    architecture: class and configuration that decide K and V, rope parameters among them; JSON values.
    adapter: digest of a LoRA or other adapter's content, "" for none.
    salt: keeps tenants apart; stored only inside the digest, so it never lies on disk in the clear.
    tp_rank, tp_size: the tensor-parallel slice of heads that the blocks hold.
    lossy_codec: what the bytes have gone through if it changed them, "" if they are as they were computed.
    name: for humans, not part of the identity.
    """

    weights: str
    architecture: dict[str, Any] = field(default_factory=dict)
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

    def identity(self) -> dict[str, Any]:
        """Return every field that decides the digest, as JSON values; the salt only as its own digest."""
        return {
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "architecture": self.architecture,
            **self.layout.to_dict(),
            "adapter": self.adapter,
            "salt": hashlib.sha256(self.salt.encode(errors="surrogatepass")).hexdigest()[:16] if self.salt else "",
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            **({"lossy_codec": self.lossy_codec} if self.lossy_codec else {}),  # so exact ones keep their digests
        }

    @property
    def digest(self) -> BlockHash:
        """16 bytes: the parent of every chain's first block. sha256, so it cannot be forged."""
        text = json.dumps({**self.identity(), "salt": self.salt}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]

    def describe(self) -> bytes:
        """Return the JSON that a store keeps beside the digest, so that `inspect` can say what differs."""
        return json.dumps({"name": self.name, **self.identity()}, sort_keys=True).encode()


def differing_fields(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two described namespaces differ, name aside."""
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
