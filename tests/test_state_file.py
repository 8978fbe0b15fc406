"""State files: what is written, what of a file is believed, and what is refused."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import LAYOUT, NAMESPACE, OTHER, block_bytes, chain_of, record_of
from crafted_state import Row, craft, state_of, state_start

from tierkv.errors import CapacityError, ConfigError, CorruptBlockError, StoreError
from tierkv.storage import state_file as state_file_module
from tierkv.storage import state_format, state_writer, unfinished_file
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.storage.state_files import StateFiles
from tierkv.values.block import BlockHash
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

TEXT = NAMESPACE.describe()
START = state_start(TEXT)


def save(path: Path, records: list[bytes]) -> state_writer.SavedState:
    return write_state_file(path, namespace=NAMESPACE.digest, description=TEXT, records=records)


def bytes_of(chain: list[EncodedRecord]) -> list[bytes]:
    return [record.data.tobytes() for record in chain]


def read(state: StateFile, info: BlockInfo) -> np.ndarray | MissReason:
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    return state.read_into(info, out, layout=LAYOUT) or out


# -- what is yielded -----------------------------------------------------------------------------------


def test_a_block_that_is_saved_twice_is_there_once(tmp_path: Path) -> None:
    records = bytes_of(chain_of(12))
    assert save(tmp_path / "state", records * 2).blocks == 12
    with StateFile(tmp_path / "state") as state:
        assert len(state) == 12
        assert list(state.iter_records()) == records


def test_what_one_file_has_yielded_another_leaves_out(tmp_path: Path) -> None:
    records = bytes_of(chain_of(4))
    save(tmp_path / "short", records[:2])
    save(tmp_path / "long", records)
    seen: set[bytes] = set()
    with StateFile(tmp_path / "short") as short, StateFile(tmp_path / "long") as long:
        assert list(short.iter_records(seen)) == records[:2]
        assert list(long.iter_records(seen)) == records[2:]
        assert len(seen) == 4


def test_damaged_records_are_left_out_and_those_behind_them_are_not(tmp_path: Path) -> None:
    chain = chain_of(5)
    data = bytearray(state_of(NAMESPACE, bytes_of(chain)))
    for number in (0, 3):
        data[data.find(chain[number].data.tobytes()) + 300] ^= 1
    (tmp_path / "state").write_bytes(data)
    with StateFile(tmp_path / "state") as state:
        assert list(state.iter_records()) == bytes_of([chain[1], chain[2], chain[4]])
        assert [type(read(state, record.info)) for record in chain].count(MissReason) == 2
        assert read(state, chain[0].info) is MissReason.CORRUPT
        assert state.read_record(chain[0].info.block_hash) is None


def test_chains_without_a_beginning_and_rings_are_yielded_once_parents_first(tmp_path: Path) -> None:
    orphans = bytes_of(chain_of(6)[2:])
    one, other = BlockHash(b"\1" * 16), BlockHash(b"\2" * 16)
    ring = [
        encode_record(
            replace(record_of(99).info, block_hash=block_hash, parent=parent), block_bytes(), layout=LAYOUT
        ).data.tobytes()
        for block_hash, parent in ((one, other), (other, one))
    ]
    (tmp_path / "state").write_bytes(state_of(NAMESPACE, [*orphans, *ring]))
    with StateFile(tmp_path / "state") as state:
        found = list(state.iter_records())
        assert sorted(found) == sorted([*orphans, *ring])
        assert [record for record in found if record in orphans] == orphans


def test_a_row_that_speaks_of_another_record_yields_none(tmp_path: Path) -> None:
    first, second = chain_of(2)
    stranger = record_of(7, namespace=OTHER)
    strangers = [(stranger.data.tobytes(), stranger.info), (second.data.tobytes(), first.info)]
    for data, info in strangers:
        row = (info.block_hash, NAMESPACE.digest, START, len(data), info.num_tokens, 0)
        (tmp_path / "state").write_bytes(craft(NAMESPACE.digest, TEXT, padded(data), [row]))
        with StateFile(tmp_path / "state") as state:
            assert list(state.iter_records()) == []
            assert isinstance(read(state, replace(info, namespace=NAMESPACE.digest)), MissReason)


def test_a_record_of_another_namespace_in_a_file_is_damage(tmp_path: Path) -> None:
    info = record_of(7).info
    data = encode_record(replace(info, namespace=OTHER.digest), block_bytes(), layout=LAYOUT).data.tobytes()
    row = (info.block_hash, info.parent, START, len(data), info.num_tokens, 0)
    (tmp_path / "state").write_bytes(craft(NAMESPACE.digest, TEXT, padded(data), [row]))
    with StateFile(tmp_path / "state") as state:
        assert read(state, info) is MissReason.CORRUPT


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % state_format.ALIGN_BYTES)


# -- what is refused -----------------------------------------------------------------------------------

CHAIN = chain_of(3)
BODY = b"".join(padded(record.data.tobytes()) for record in CHAIN)
ROWS: list[Row] = []
for _record in CHAIN:
    _at = START + sum(len(padded(bytes(each[3]))) for each in ROWS)
    ROWS.append((_record.info.block_hash, _record.info.parent, _at, _record.stored_bytes, 16, 0))
ROWS.sort()


def with_row(number: int, **fields: int) -> list[Row]:
    names = ("key", "parent", "offset", "size", "tokens", "pad")
    rows = [dict(zip(names, row, strict=True)) for row in ROWS]
    rows[number].update(fields)
    return [tuple(row.values()) for row in rows]  # type: ignore[misc]


OVERLAP = max(row[2] for row in ROWS) - state_format.ALIGN_BYTES
CRAFTED: dict[str, Callable[[], bytes]] = {
    "rows that are not sorted": lambda: craft(NAMESPACE.digest, TEXT, BODY, ROWS[::-1]),
    "a block twice": lambda: craft(NAMESPACE.digest, TEXT, BODY, [ROWS[0], ROWS[0], ROWS[2]]),
    "an offset in the header": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=0)),
    "an offset in the description": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=4096)),
    "an offset off the border": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=START + 64)),
    "an offset behind the records": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=1 << 40)),
    "an offset that overflows": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=(1 << 64) - 4096)),
    "a size that overflows": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, size=(1 << 64) - 1)),
    "a size of nothing": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, size=0)),
    "a size of more than a block": lambda: craft(
        NAMESPACE.digest, TEXT, bytes(8 << 20), with_row(1, offset=START + (1 << 20), size=2 << 20)
    ),
    "records that overlap": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, offset=OVERLAP, size=8192)),
    "too many tokens": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, tokens=17)),
    "as many tokens as there can be": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, tokens=(1 << 32) - 1)),
    "no tokens": lambda: craft(NAMESPACE.digest, TEXT, BODY, with_row(1, tokens=0)),
    "a description that is no JSON": lambda: craft(NAMESPACE.digest, b"\xff\xfe", BODY, ROWS),
    "no description": lambda: craft(NAMESPACE.digest, b"", BODY, []),
    "a description that is no object": lambda: craft(NAMESPACE.digest, b"[]", BODY, []),
    "a description nested too deep": lambda: craft(NAMESPACE.digest, b"[" * 60_000, BODY, []),
    "another namespace's description": lambda: craft(NAMESPACE.digest, OTHER.describe(), BODY, ROWS),
    "a lossy namespace's description": lambda: craft(
        NAMESPACE.digest, replace(NAMESPACE, lossy_codec="lossy-int8").describe(), BODY, ROWS
    ),
    "a description that is too long": lambda: craft(NAMESPACE.digest, TEXT + b" " * DESCRIPTION_LIMIT_BYTES, BODY, []),
    "a header that counts fewer rows": lambda: craft(NAMESPACE.digest, TEXT, BODY, ROWS, rows_claimed=2),
    "a header that counts more rows": lambda: craft(NAMESPACE.digest, TEXT, BODY, ROWS, rows_claimed=4),
    "an index in the header": lambda: craft(
        NAMESPACE.digest, TEXT, BODY, ROWS, index_offset=0, rows_claimed=(START + len(BODY) + 168) // 56
    ),
    "a wrong checksum": lambda: craft(NAMESPACE.digest, TEXT, BODY, ROWS, checksum=1),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1 << 20),
    "text": lambda: b"not a state file\n" * 1000,
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_file_that_contradicts_itself_or_its_layout_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "good").write_bytes(craft(NAMESPACE.digest, TEXT, BODY, ROWS))
    with StateFile(tmp_path / "good") as state:
        assert list(state.iter_records()) == bytes_of(CHAIN)
    (tmp_path / "state").write_bytes(CRAFTED[what]())
    before = open_files()
    with pytest.raises(CorruptBlockError, match="state"):
        StateFile(tmp_path / "state")
    assert open_files() == before


@pytest.mark.parametrize("rows", [state_format.ROW_LIMIT + 1, 1_000_000_000])
def test_an_index_of_a_sparse_file_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path, rows: int) -> None:
    index_offset = 1 << 43  # room for a record of 4 KiB for each row, and a file system's limit
    header = state_format.StateHeader(
        file_bytes=index_offset + rows * 56,
        description_bytes=len(TEXT),
        index_offset=index_offset,
        rows=rows,
        namespace=NAMESPACE.digest,
        checksum=1,
    )
    path = tmp_path / "sparse"
    path.write_bytes(header.pack())
    with contextlib.suppress(OSError):  # a file system that has no files of that size
        os.truncate(path, header.file_bytes)
    with pytest.raises(CorruptBlockError, match=r"claims to have|cut short"):
        StateFile(path)
    with pytest.raises(CorruptBlockError, match="claims to have"):
        state_format.StateHeader.unpack(header.pack(), actual_bytes=header.file_bytes)


def test_a_description_that_is_too_long_is_refused_before_it_is_read() -> None:
    header = state_format.StateHeader(
        file_bytes=1 << 40,
        description_bytes=(1 << 40) - 8192,
        index_offset=1 << 40,
        rows=0,
        namespace=NAMESPACE.digest,
        checksum=1,
    )
    with pytest.raises(CorruptBlockError, match="a description of 1099511619584 bytes"):
        state_format.StateHeader.unpack(header.pack(), actual_bytes=1 << 40)


def test_a_record_is_never_read_further_than_its_layout_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long records may be by a layout of an attacker's choice, an index bounds each by its own size."""
    monkeypatch.setattr("tierkv.storage.state_format._RECORD_LIMIT_BYTES", CHAIN[0].stored_bytes - 1)
    (tmp_path / "state").write_bytes(craft(NAMESPACE.digest, TEXT, BODY, ROWS))
    with pytest.raises(CorruptBlockError, match="of a size"):
        StateFile(tmp_path / "state")


def test_hashes_that_agree_in_half_their_bytes_are_distinguished(tmp_path: Path) -> None:
    same, records = b"\7" * 8, []
    hashes = [BlockHash(same + bytes([last]) + bytes(7)) for last in (3, 0, 255, 16)]
    for number, block_hash in enumerate(hashes):
        info = replace(record_of(number).info, block_hash=block_hash, parent=hashes[number - 1])
        records.append(encode_record(info, block_bytes(number), layout=LAYOUT).data.tobytes())
    (tmp_path / "state").write_bytes(state_of(NAMESPACE, records))
    with StateFile(tmp_path / "state") as state:
        for number, block_hash in enumerate(hashes):
            assert state.read_record(block_hash) == records[number]
            assert state.children(hashes[number - 1]) == [block_hash]
        assert state.lookup(BlockHash(same + bytes([4]) + bytes(7))) is None
        assert state.children(NAMESPACE.digest) == []


# -- what changes while it is open ---------------------------------------------------------------------


def test_a_file_that_is_cut_or_replaced_while_it_is_open_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save(path, bytes_of(CHAIN))
    save(tmp_path / "other", [])
    with StateFile(path) as state:
        os.replace(tmp_path / "other", path)
        assert isinstance(read(state, CHAIN[0].info), np.ndarray), "it is the file that was opened"
    save(path, bytes_of(CHAIN))
    with StateFile(path) as state:
        os.truncate(path, START + 100)
        assert {read(state, record.info) for record in CHAIN} == {MissReason.TRUNCATED}
        assert list(state.iter_records()) == []
        assert state.find_longest_run(NAMESPACE.digest, CHAIN[0].info.token_bytes) is None
        os.truncate(path, 1 << 20)  # zeros now
        assert {read(state, record.info) for record in CHAIN} == {MissReason.CORRUPT}


def test_a_disk_that_fails_is_a_miss_of_that_kind_and_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "state", bytes_of(CHAIN))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with StateFile(tmp_path / "state") as state:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            patch.setattr(os, "pread", fail)
            assert read(state, CHAIN[0].info) is MissReason.IO_ERROR
            assert state.read_record(CHAIN[0].info.block_hash) is None
        assert isinstance(read(state, CHAIN[0].info), np.ndarray)


def test_closing_waits_for_no_read_and_closes_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "state", bytes_of(CHAIN))
    before = open_files()
    state = StateFile(tmp_path / "state")
    reading, may_go_on = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(*args: object) -> int:
        reading.set()
        assert may_go_on.wait(30)
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(read(state, CHAIN[0].info)))
    reader.start()
    assert reading.wait(30)
    state.close()
    assert open_files() == before + 1, "its number could be another file's by the time of the read"
    may_go_on.set()
    reader.join(30)
    assert isinstance(found[0], np.ndarray)
    assert open_files() == before
    assert read(state, CHAIN[0].info) is MissReason.ABSENT
    state.close()


def test_of_very_many_children_only_some_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record_of(number) for number in range(6)]
    save(tmp_path / "state", bytes_of(records))
    with StateFile(tmp_path / "state") as state:
        assert all(state.find_longest_run(NAMESPACE.digest, record.info.token_bytes) for record in records)
        monkeypatch.setattr(state_file_module, "CHILDREN_LIMIT", 4)
        found = [state.find_longest_run(NAMESPACE.digest, record.info.token_bytes) for record in records]
        assert sum(each is not None for each in found) == 4


# -- where and how it is written -----------------------------------------------------------------------


def test_what_is_no_sound_record_of_the_namespace_is_not_written(tmp_path: Path) -> None:
    good = CHAIN[0].data.tobytes()
    flipped = bytearray(good)
    flipped[300] ^= 1
    lossy = encode_record(CHAIN[0].info, block_bytes(), layout=LAYOUT, codec=codec_by_name("lossy-int8"))
    bad = [bytes(flipped), good[:200], b"", record_of(1, namespace=OTHER).data.tobytes(), lossy.data.tobytes()]
    saved = save(tmp_path / "state", [*bad, good, *bad])
    assert (saved.blocks, saved.left_out) == (1, 10)
    with StateFile(tmp_path / "state") as state:
        assert list(state.iter_records()) == [good]


@pytest.mark.parametrize("description", [b"", b"{}", b"\xff", OTHER.describe()])
def test_a_namespace_whose_description_is_not_its_own_is_not_saved(tmp_path: Path, description: bytes) -> None:
    with pytest.raises(StoreError, match="cannot be saved"):
        write_state_file(tmp_path / "state", namespace=NAMESPACE.digest, description=description, records=[])
    assert not list(tmp_path.iterdir())


def make_link(path: Path) -> None:
    (path.parent / "mine").write_text("mine")
    path.symlink_to(path.parent / "mine")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # the path may be longer than a socket's
        listener.bind(path.name)


NO_TARGETS: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "symbolic link": make_link,
    "symbolic link ": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", NO_TARGETS)
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    NO_TARGETS[kind](tmp_path / "state")
    before = sorted((path.name, path.lstat().st_mode) for path in tmp_path.iterdir())
    with pytest.raises(StoreError, match=kind.strip()):
        save(tmp_path / "state", bytes_of(CHAIN))
    assert sorted((path.name, path.lstat().st_mode) for path in tmp_path.iterdir()) == before
    assert kind != "symbolic link" or (tmp_path / "mine").read_text() == "mine"


def test_a_device_and_a_root_are_not_replaced() -> None:
    with pytest.raises(StoreError, match="device"):
        save(Path("/dev/null"), [])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(StoreError, match="directory"):
        save(Path("/"), [])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("a\0b", ConfigError),
        ("x" * 300, StoreError),
        ("no/such/directory", StoreError),
        ("file/state", StoreError),
        ("\ud800", ConfigError),
    ],
)
def test_a_path_that_cannot_be_is_refused_by_an_error_of_our_own(
    tmp_path: Path, name: str, error: type[Exception]
) -> None:
    (tmp_path / "file").write_text("mine")
    for use in (lambda path: save(path, []), StateFile):
        with pytest.raises(error):
            use(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_the_longest_name_that_a_file_may_have_is_written(tmp_path: Path) -> None:
    save(tmp_path / ("x" * 255), bytes_of(CHAIN))
    assert [len(name) for name in os.listdir(tmp_path)] == [255]


def test_a_directory_that_may_be_written_to_and_not_read_is_written_to(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every directory")
    tmp_path.chmod(0o300)
    try:
        save(tmp_path / "state", bytes_of(CHAIN))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "replace"])
def test_a_full_or_failing_disk_leaves_the_target_as_it_was(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    save(path, bytes_of(CHAIN[:1]))
    before = path.read_bytes()
    monkeypatch.setattr(unfinished_file, "_SYNC_BYTES", 1)

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match="No space left"):
            save(path, bytes_of(CHAIN))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_may_not_grow_so_far_is_an_error_of_our_own(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(StoreError, match="too large"):
            save(tmp_path / "state", bytes_of(CHAIN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not os.listdir(tmp_path)


def unfinished(path: Path, begin: bytes = unfinished_file.UNFINISHED_MAGIC) -> Path:
    found = path / f".tierkv-save-{random.Random(len(os.listdir(path))).getrandbits(128):032x}"
    found.write_bytes(begin + bytes(100))
    return found


def test_only_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    remains = [unfinished(tmp_path), unfinished(tmp_path, b"TKVSTATE"), unfinished(tmp_path)]
    remains[2].write_bytes(b"")
    others = [unfinished(tmp_path, b"a text that somebody wrote")]
    for name in (".state.swp", ".state.abcdefgh", ".tierkv-save-", ".tierkv-save-xyz", ".tierkv-save-" + "0" * 31):
        others.append(tmp_path / name)
        others[-1].write_bytes(unfinished_file.UNFINISHED_MAGIC)
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(others[0])):
        others.append(unfinished(tmp_path))
        others[-1].unlink()
        make(others[-1])
    others.append(unfinished(tmp_path))
    os.link(others[-1], tmp_path / "its other name")
    save(tmp_path / "state", bytes_of(CHAIN))
    assert not any(path.exists() for path in remains)
    assert all(os.path.lexists(path) for path in others)


def test_another_users_file_and_one_that_is_being_written_are_no_remains(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes files of other users")
    foreign = unfinished(tmp_path)
    os.chown(foreign, 12345, -1)
    written: list[str] = []

    def records():
        yield CHAIN[0].data.tobytes()
        save(tmp_path / "other", [])
        written.extend(name for name in os.listdir(tmp_path) if name.startswith(".tierkv-save-"))

    write_state_file(tmp_path / "state", namespace=NAMESPACE.digest, description=TEXT, records=records())
    assert len(written) == 2 and foreign.name in written
    assert sorted(os.listdir(tmp_path)) == sorted(["state", "other", foreign.name])


def test_a_file_that_another_save_took_for_a_remainder_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = unfinished_file.lock_file
    removed: list[Path] = []

    def remove_first(fd: int) -> None:
        if not removed:
            removed.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
            unfinished_file.remove_unfinished(tmp_path)
            assert not removed[0].exists()
        lock(fd)

    monkeypatch.setattr(unfinished_file, "lock_file", remove_first)
    save(tmp_path / "state", bytes_of(CHAIN))
    assert removed and os.listdir(tmp_path) == ["state"]


def test_a_state_file_has_a_bounded_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "ROW_LIMIT", 2)
    with pytest.raises(StoreError, match="at most 2 blocks"):
        save(tmp_path / "state", bytes_of(CHAIN))
    assert not os.listdir(tmp_path)


# -- several files -------------------------------------------------------------------------------------


def test_the_same_file_is_taken_once_by_whatever_name(tmp_path: Path) -> None:
    save(tmp_path / "state", bytes_of(CHAIN))
    os.link(tmp_path / "state", tmp_path / "again")
    (tmp_path / "link").symlink_to("state")
    before = open_files()
    files = StateFiles()
    first = files.add(StateFile(tmp_path / "state"))
    for name in ("state", "again", "link"):
        assert files.add(StateFile(tmp_path / name)) is first
    assert files.add(first) is first
    assert len(files) == 1 and open_files() == before + 1
    assert isinstance(read(first, CHAIN[0].info), np.ndarray)
    files.close()
    assert open_files() == before
    files.add(StateFile(tmp_path / "state"))
    assert open_files() == before, "one that comes late is closed too"


def test_another_file_at_the_same_path_takes_its_place(tmp_path: Path) -> None:
    files = StateFiles(limit=1)
    before = open_files()
    for number in range(4):
        save(tmp_path / "state", bytes_of(chain_of(number)))
        assert len(files.add(StateFile(tmp_path / "state"))) == number
        assert len(files) == 1 and open_files() == before + 1
    with open(tmp_path / "state", "r+b") as file:  # the same file, rewritten in place
        file.write(craft(NAMESPACE.digest, TEXT, BODY[:4096], []))
        file.truncate()
    assert len(files.add(StateFile(tmp_path / "state"))) == 0
    assert len(files) == 1
    files.close()


def test_more_files_than_the_limit_are_refused_and_closed(tmp_path: Path) -> None:
    files = StateFiles(limit=2)
    for number in range(3):
        save(tmp_path / f"{number}", bytes_of(CHAIN))
    files.add(StateFile(tmp_path / "0"))
    files.add(StateFile(tmp_path / "1"))
    before = open_files()
    with pytest.raises(CapacityError, match="2 state files are loaded"):
        files.add(StateFile(tmp_path / "2"))
    assert open_files() == before and len(files) == 2
    files.close()


def open_files() -> int:
    """Count this process's descriptors, without those of earlier tests that wait for the collector."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
