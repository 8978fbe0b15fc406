"""Rows that an engine names by digests: what the adapters of vLLM's tiers and SGLang's HiCache build on."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cold_blocks import damage_record

from tierkv import BlockKey, Buffers, ColdStore, ConfigError
from tierkv.block_store.keys import digest_namespace
from tierkv.integrations.rows import DigestRows, store_config

ROW = 4096
DIGESTS = [sha256(bytes([i])).digest() for i in range(12)]
CONTENT = [np.random.default_rng(i).integers(0, 256, ROW, dtype=np.uint8) for i in range(12)]


def open_rows(path: Path, *, weights: str = "weights", **options: Any) -> DigestRows:
    namespace = digest_namespace(weights=weights, row_bytes=ROW, dtype="bfloat16")
    options = {"path": str(path / "store"), "warm_bytes": 64 * ROW, "min_free_bytes": 0, **options}
    return DigestRows(store_config(options, row_bytes=ROW), namespace)


def keys_of(rows: DigestRows, digests: list[bytes] = DIGESTS) -> list[BlockKey]:
    keys = [rows.key(digest) for digest in digests]
    assert None not in keys
    return keys  # type: ignore[return-value]


def save(rows: DigestRows, which: range = range(12)) -> list[bool]:
    keys = keys_of(rows)
    return rows.save([keys[i] for i in which], lambda at, end: Buffers([CONTENT[i] for i in which][at:end]))


def load(rows: DigestRows, **options: Any) -> tuple[list[bool], list[bool]]:
    """Load all rows. Return which came, and which are right."""
    out = [np.zeros(ROW, dtype=np.uint8) for _ in CONTENT]
    came = rows.load(keys_of(rows), lambda at, end: Buffers(out[at:end]), **options)
    right = [bool((target == content).all()) for target, content in zip(out, CONTENT, strict=True)]
    untouched = [bool((target == 0).all()) for target in out]
    assert all(
        is_right if is_here else is_clean for is_here, is_right, is_clean in zip(came, right, untouched, strict=True)
    )
    return came, right


def damage(path: Path, at: int) -> None:
    rows = open_rows(path)
    block_hash = rows.store.key_of_digest(DIGESTS[at]).block_hash
    rows.close()
    with ColdStore(path / "store") as cold:
        damage_record(cold, block_hash, offset=400)


def test_rows_come_back_after_a_restart(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    assert rows.found(keys_of(rows)) == [False] * 12
    assert save(rows) == [True] * 12
    assert load(rows) == ([True] * 12, [True] * 12)
    rows.close()
    rows = open_rows(tmp_path)
    assert rows.found(keys_of(rows)) == [True] * 12 and rows.count(keys_of(rows)) == 12
    assert load(rows)[0] == [True] * 12
    assert (rows.counts.loaded, rows.counts.not_loaded) == (12, 0)
    rows.close()


def test_each_row_has_its_own_answer(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    assert save(rows, range(0, 12, 3)) == [True] * 4
    expected = [i % 3 == 0 for i in range(12)]
    assert rows.found(keys_of(rows)) == expected and rows.count(keys_of(rows)) == 1
    assert load(rows)[0] == expected
    assert load(rows, stop_at_gap=True)[0] == [True] + [False] * 11
    rows.close()


def test_a_damaged_row_is_lost_alone_and_the_next_save_replaces_it(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    save(rows)
    rows.close()
    damage(tmp_path, 4)
    rows = open_rows(tmp_path)
    expected = [i != 4 for i in range(12)]
    assert load(rows)[0] == expected
    assert rows.found(keys_of(rows)) == expected, "what was found damaged is not there"
    assert save(rows) == [True] * 12
    assert load(rows)[0] == [True] * 12
    rows.close()
    rows = open_rows(tmp_path)
    assert load(rows)[0] == [True] * 12, "the disk has it again"
    rows.close()


def test_more_rows_than_the_memory_holds_are_saved_and_loaded(tmp_path: Path) -> None:
    rows = open_rows(tmp_path, warm_bytes=0)
    many = [sha256(i.to_bytes(4, "big")).digest() for i in range(200)]
    content = [np.full(ROW, i, dtype=np.uint8) for i in range(200)]
    keys = keys_of(rows, many)
    assert all(rows.save(keys, lambda at, end: Buffers(content[at:end])))
    out = [np.zeros(ROW, dtype=np.uint8) for _ in many]
    assert all(rows.load(keys, lambda at, end: Buffers(out[at:end])))
    assert all((target == content[i]).all() for i, target in enumerate(out))
    rows.close()


def test_a_closed_store_has_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    save(rows)
    keys = keys_of(rows)
    rows.close()
    rows.close()
    assert rows.count(keys) == 0 and rows.found(keys) == [False] * 12
    assert save(rows) == [False] * 12 and load(rows)[0] == [False] * 12
    rows.touch(keys)


def test_a_full_disk_is_a_miss(tmp_path: Path) -> None:
    rows = open_rows(tmp_path, min_free_bytes=1 << 60)
    save(rows)
    rows.store.flush()
    assert sum(rows.store.stats().skip_reasons.values()) == 12
    rows.close()
    rows = open_rows(tmp_path)
    assert rows.found(keys_of(rows)) == [False] * 12 and load(rows)[0] == [False] * 12
    rows.close()


def test_what_is_no_digest_is_counted_and_has_no_key(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    assert rows.key(b"\1" * 16) is None and rows.key(b"") is None
    assert rows.counts.refused == 2
    assert rows.found([None, keys_of(rows)[0], None]) == [False] * 3
    rows.close()


def test_groups_and_weights_do_not_meet(tmp_path: Path) -> None:
    rows = open_rows(tmp_path)
    save(rows)
    assert rows.found([rows.key(DIGESTS[0], 1)]) == [False]
    rows.close()
    rows = open_rows(tmp_path, weights="other")
    assert rows.found(keys_of(rows)) == [False] * 12
    rows.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "path is missing"),
        ({"path": ""}, "path is missing"),
        ({"cold_byte": 1}, "unknown options: cold_byte"),
        ({"cold_path": "x"}, "unknown options: cold_path"),
        ({"warm_bytes": "much"}, "warm_bytes"),
        ({"codec": "lossy-int8"}, "lossy"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        store_config({"path": "store", **options}, row_bytes=ROW)
