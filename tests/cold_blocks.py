"""Small blocks of known content for tests of the cold store, here and in tests/crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=16, kv_heads=2, head_dim=32, dtype="bfloat16")
NAMESPACE = Namespace(weights="w", layout=LAYOUT, name="model")
OTHER = Namespace(weights="other", layout=LAYOUT)
QUOTA = 8 << 20


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def open_store(path: Path, clock: FakeClock | None = None, **options: Any) -> ColdStore:
    options = {"quota_bytes": QUOTA, "min_free_bytes": 0, **options}
    return ColdStore(path / "cold", clock=clock or FakeClock(), **options)


def record_of(
    tokens: int | list[int], parent: BlockInfo | None = None, *, namespace: Namespace = NAMESPACE, seed: int = 0
) -> EncodedRecord:
    ids = [tokens] * 16 if isinstance(tokens, int) else tokens
    token_bytes = np.array(ids, dtype="<u4").tobytes()
    info = parent.next(token_bytes) if parent else BlockInfo.first(token_bytes, namespace=namespace.digest)
    info = replace(info, namespace=namespace.digest)
    return encode_record(info, block_bytes(seed), layout=LAYOUT, cost_s=0.25)


def block_bytes(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(LAYOUT.block_bytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def chain_of(length: int, *, first: int = 0, namespace: Namespace = NAMESPACE) -> list[EncodedRecord]:
    records: list[EncodedRecord] = []
    for number in range(length):
        parent = records[-1].info if records else None
        records.append(record_of(first + number, parent, namespace=namespace, seed=first + number))
    return records


def read(store: ColdStore, info: BlockInfo) -> np.ndarray | MissReason:
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    reason = store.read_into(info, out, layout=LAYOUT)
    return out if reason is None else reason


def damage_record(store: ColdStore, block_hash: BlockHash, *, offset: int = 130, cut: int | None = None) -> None:
    """Flip a bit of a stored record, or cut it short."""
    with store._writer.batch() as batch:
        value = bytearray(batch.txn.get(block_hash, db=batch.databases.blocks))
        value[offset] ^= 1
        batch.txn.put(block_hash, bytes(value[:cut]), db=batch.databases.blocks)
