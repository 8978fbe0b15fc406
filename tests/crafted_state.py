"""State files made by hand, with right checksums: what the writer of tierkv would never write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from tierkv.storage.record import read_header
from tierkv.storage.state_format import ALIGN_BYTES, ROW, StateHeader
from tierkv.values.block import BlockHash
from tierkv.values.namespace import Namespace

Row = tuple[bytes, bytes, int, int, int, int]


def state_of(namespace: Namespace, records: Sequence[bytes]) -> bytes:
    """Return a state file of records, whatever they are."""
    rows: list[Row] = []
    body = bytearray()
    start = state_start(namespace.describe())
    for record in records:
        info = read_header(record).info
        rows.append((info.block_hash, info.parent, start + len(body), len(record), info.num_tokens, 0))
        body += record + bytes(-len(record) % ALIGN_BYTES)
    return craft(namespace.digest, namespace.describe(), bytes(body), sorted(rows))


def state_start(description: bytes) -> int:
    """Return where the first record of a state file with this description begins."""
    return ALIGN_BYTES + len(description) + (-len(description) % ALIGN_BYTES)


def craft(digest: BlockHash, description: bytes, body: bytes, rows: Sequence[Row], **lies: Any) -> bytes:
    """Return a state file of these parts, as they are. lies: of the header's fields; `rows_claimed` for its `rows`."""
    if "rows_claimed" in lies:
        lies["rows"] = lies.pop("rows_claimed")
    index = np.array(rows, dtype=ROW).tobytes()
    text = description + bytes(-len(description) % ALIGN_BYTES)
    honest = StateHeader(
        file_bytes=ALIGN_BYTES + len(text) + len(body) + len(index),
        description_bytes=len(description),
        index_offset=ALIGN_BYTES + len(text) + len(body),
        rows=len(rows),
        namespace=digest,
        checksum=xxhash.xxh3_64_intdigest(description + index),
    )
    packed = replace(honest, **lies).pack()
    return packed + bytes(ALIGN_BYTES - len(packed)) + text + body + index
