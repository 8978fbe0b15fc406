"""State files that have, or share, the same blocks."""

from __future__ import annotations

from pathlib import Path

from cold_blocks import NAMESPACE, chain_of

from tierkv.storage.state_file import StateFile, write_state_file


def test_a_block_that_lies_in_a_file_twice_is_yielded_once(tmp_path: Path) -> None:
    records = [record.data.tobytes() for record in chain_of(12)]
    save(tmp_path / "state", records * 2)
    with StateFile(tmp_path / "state") as state:
        assert list(state.iter_records()) == records


def test_what_one_file_has_yielded_another_leaves_out(tmp_path: Path) -> None:
    records = [record.data.tobytes() for record in chain_of(4)]
    save(tmp_path / "short", records[:2])
    save(tmp_path / "long", records)
    seen: set[bytes] = set()
    with StateFile(tmp_path / "short") as short, StateFile(tmp_path / "long") as long:
        assert list(short.iter_records(seen)) == records[:2]
        assert list(long.iter_records(seen)) == records[2:]
        assert len(seen) == 4


def save(path: Path, records: list[bytes]) -> None:
    write_state_file(path, namespace=NAMESPACE.digest, description=NAMESPACE.describe(), records=records)
