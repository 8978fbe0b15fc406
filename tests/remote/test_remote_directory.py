"""A shared directory: full, read only, hanging, unmounted, with strange files, and swept by one owner."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers import directory
from tierkv.remote_tiers.directory import DirectoryClient
from tierkv.remote_tiers.directory_sweep import sweep
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.urls import RemoteUrl

KEYS = [RemoteKey(bytes(16), bytes([number]) * 16) for number in range(40)]
VALUE = np.arange(200, dtype=np.uint8)


def deadline(base_s: float = 10.0) -> Deadline:
    return Deadline(CallTime(base_s=base_s))


def open_at(path: Path, options: str = "") -> DirectoryClient:
    return DirectoryClient(RemoteUrl.parse(f"dir://{path}{options}"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[DirectoryClient]:
    opened = open_at(tmp_path)
    yield opened
    opened.close()


def write(client: DirectoryClient, count: int, size: int = 200) -> None:
    for key in KEYS[:count]:
        assert client.write(key, np.zeros(size, dtype=np.uint8), deadline(), replace=False)


def test_a_record_has_a_file_of_its_own_in_one_of_256_folders(client: DirectoryClient, tmp_path: Path) -> None:
    client.write(KEYS[7], VALUE, deadline(), replace=False)
    client.describe(bytes(16), b"{}", deadline())
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [f"tkv2/{'00' * 16}/07/{'07' * 16}", f"tkv2/{'00' * 16}/namespace.json"]


def test_a_directory_where_nothing_is_mounted_is_not_filled(tmp_path: Path) -> None:
    client = open_at(tmp_path / "missing")
    for call in (lambda: client.ping(deadline()), lambda: client.write(KEYS[0], VALUE, deadline(), replace=False)):
        with pytest.raises(RemoteError):
            call()
    assert not (tmp_path / "missing").exists()
    client.close()


def test_a_file_server_that_hangs_costs_the_deadline_and_its_late_bytes_reach_nothing(
    client: DirectoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(client, 1)
    gate, entered = threading.Event(), threading.Event()
    read = os.preadv

    def hang(*arguments: object) -> int:
        entered.set()
        gate.wait(20)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(directory.os, "preadv", hang)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="in time"):
        client.read(KEYS[0], deadline(0.1), most_bytes=1000)
    assert time.monotonic() - begin < 5 and entered.is_set()
    gate.set()
    assert client.read(KEYS[0], deadline(), most_bytes=1000) is not None


@pytest.mark.parametrize("kind", ["directory", "symbolic link", "FIFO"])
def test_what_is_no_regular_file_is_damage(client: DirectoryClient, tmp_path: Path, kind: str) -> None:
    path = tmp_path / KEYS[0].path()
    path.parent.mkdir(parents=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/etc/passwd")
    with pytest.raises(RemoteDamageError):
        client.read(KEYS[0], deadline(), most_bytes=10_000_000)


def test_too_little_free_room_refuses_writes(tmp_path: Path) -> None:
    client = open_at(tmp_path, "?min_free_bytes=1e18")
    with pytest.raises(RemoteRefusedError) as caught:
        client.write(KEYS[0], VALUE, deadline(), replace=False)
    assert caught.value.code == "FULL"
    client.close()


@pytest.fixture
def loop_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB on a loop device."""
    image, place = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no loop mount here: {exc}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_file_system_refuses_writes_and_keeps_no_half_file(loop_mount: Path) -> None:
    client = open_at(loop_mount)
    big = np.ones(600_000, dtype=np.uint8)
    codes: list[str] = []
    for key in KEYS[:12]:
        try:
            client.write(key, big, deadline(), replace=False)
        except RemoteRefusedError as exc:
            codes.append(exc.code)
    refused = len(codes)
    assert 0 < refused < 12 and set(codes) == {"FULL"}
    files = [path for path in loop_mount.rglob("*") if path.is_file()]
    assert len(files) == 12 - refused and all(path.stat().st_size == 600_000 for path in files)
    assert client.read(KEYS[0], deadline(), most_bytes=1 << 20) is not None
    client.close()


def set_times(root: Path, count: int) -> None:
    for number, key in enumerate(KEYS[:count]):
        os.utime(root / key.path(), (1e9 - number, 1e9 - number))


def test_a_sweep_removes_what_was_used_longest_ago(client: DirectoryClient, tmp_path: Path) -> None:
    write(client, 20)
    client.describe(bytes(16), b"{}", deadline())
    set_times(tmp_path, 20)
    client.touch(KEYS[:20:2], deadline())
    assert sweep(tmp_path, most_bytes=3000) == 7
    left = [at for at in range(20) if (tmp_path / KEYS[at].path()).exists()]
    assert set(range(0, 20, 2)) <= set(left) and len(left) == 13
    assert left[-3:] != [17, 18, 19], "the children go first"
    assert (tmp_path / "tkv2" / ("00" * 16) / "namespace.json").exists()
    assert sweep(tmp_path, most_bytes=3000) == 0
    assert not (tmp_path / ".sweep-lease").exists()


def test_one_owner_sweeps_at_a_time_and_a_dead_owner_is_replaced(client: DirectoryClient, tmp_path: Path) -> None:
    write(client, 10)
    lease = tmp_path / ".sweep-lease"
    lease.write_text("another machine")
    assert sweep(tmp_path, most_bytes=1000) == 0
    os.utime(lease, (1e9, 1e9))
    assert sweep(tmp_path, most_bytes=1000) == 6
    assert not lease.exists()


def test_a_sweep_removes_what_a_dead_writer_left(client: DirectoryClient, tmp_path: Path) -> None:
    write(client, 1)
    folder = (tmp_path / KEYS[0].path()).parent
    old, new = folder / ".writing-old", folder / ".writing-new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    sweep(tmp_path, most_bytes=1 << 20)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("place", ["tkv2", "tkv9", "tkv2/" + "00" * 16, f"tkv2/{'00' * 16}/00"])
def test_a_sweep_follows_no_link_to_another_folder(client: DirectoryClient, tmp_path: Path, place: str) -> None:
    """A stranger who may write in the directory names what the owner of the sweep removes."""
    root, others = tmp_path / "shared", tmp_path / "home"
    root.mkdir()
    files = [others / name / ("0a" * 16) for name in ("", "00", "00/11", f"{'00' * 16}/00")]
    files += [others / ".writing-mine", others / "00" / ".writing-mine"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9, 1e9))
    link = root / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(others)
    sweep(root, most_bytes=10)
    assert all(path.exists() for path in files)


def test_a_sweep_counts_and_removes_only_files_at_a_records_place(client: DirectoryClient, tmp_path: Path) -> None:
    write(client, 2)
    folder = (tmp_path / KEYS[0].path()).parent
    others = [folder / ("x" * 32), tmp_path / "tkv2" / ("ab" * 16), tmp_path / ("ab" * 16)]
    deep = folder.joinpath(*["d" * 200] * 3)
    deep.mkdir(parents=True)
    for path in others:
        path.write_bytes(bytes(1000))
        os.utime(path, (1e9, 1e9))
    assert sweep(tmp_path, most_bytes=300) == 1
    assert all(path.exists() for path in others)


def test_a_lease_of_a_time_to_come_is_not_for_ever(client: DirectoryClient, tmp_path: Path) -> None:
    """The file server's clock was wrong when an owner died."""
    write(client, 10)
    lease = tmp_path / ".sweep-lease"
    lease.write_text("another machine")
    os.utime(lease, (4e9, 4e9))
    assert sweep(tmp_path, most_bytes=1000) == 6


def test_a_lease_that_is_a_link_to_nothing_is_not_for_ever(client: DirectoryClient, tmp_path: Path) -> None:
    write(client, 10)
    lease = tmp_path / ".sweep-lease"
    lease.symlink_to("nowhere")
    os.utime(lease, (1e9, 1e9), follow_symlinks=False)
    assert sweep(tmp_path, most_bytes=1000) == 6


def test_a_description_is_not_written_through_a_link(client: DirectoryClient, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "tkv2" / ("00" * 16)
    folder.mkdir(parents=True)
    for number in range(10):
        (folder / f".writing-{socket.gethostname()}-{os.getpid()}-{number}").symlink_to(mine)
    client.describe(bytes(16), b"{}", deadline())
    assert mine.read_text() == "mine"
    assert (folder / "namespace.json").read_bytes() == b"{}"


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_a_strange_description_hides_no_other(client: DirectoryClient, tmp_path: Path, kind: str) -> None:
    strange = tmp_path / "tkv2" / ("00" * 16) / "namespace.json"
    strange.parent.mkdir(parents=True)
    if kind == "link":
        strange.symlink_to("nowhere")
    else:
        (os.mkfifo if kind == "fifo" else os.mkdir)(strange)
    client.describe(bytes([7] * 16), b"{}", deadline())
    assert client.descriptions(deadline()) == [b"{}"]


def test_two_writers_of_one_key_in_one_process_do_not_share_the_unfinished_file(
    client: DirectoryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, outcomes = open_at(tmp_path), []
    replace = os.replace

    def write_meanwhile(*paths: object) -> None:
        monkeypatch.setattr(directory.os, "replace", replace)
        outcomes.append(other.write(KEYS[0], VALUE, deadline(), replace=True))
        replace(*paths)  # type: ignore[arg-type]

    monkeypatch.setattr(directory.os, "replace", write_meanwhile)
    outcomes.append(client.write(KEYS[0], VALUE, deadline(), replace=True))
    assert outcomes == [True, True]
    other.close()


def test_writing_more_than_the_size_starts_a_sweep(tmp_path: Path) -> None:
    client = open_at(tmp_path, "?max_bytes=2000")
    write(client, 30)
    deadline_s = time.monotonic() + 20
    while sum(path.stat().st_size for path in tmp_path.rglob("0*") if path.is_file()) > 2000:
        assert time.monotonic() < deadline_s
        client.write(KEYS[31], VALUE, deadline(), replace=True)
        time.sleep(0.02)
    client.close()
