from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tierkv.errors import ConfigError, StoreError
from tierkv.files import check_path, open_regular


def test_a_regular_file_is_opened_and_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    fd = open_regular(tmp_path / "a")
    try:
        assert os.read(fd, 10) == b"text"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    try:
        for name, flags in (("fifo", os.O_RDONLY), ("fifo", os.O_WRONLY), ("fifo", os.O_RDWR), ("link", os.O_RDONLY)):
            with pytest.raises(StoreError, match="FIFO"):
                open_regular(tmp_path / name, flags)
        with pytest.raises(StoreError, match="directory"):
            open_regular(tmp_path / "folder")
        with pytest.raises(StoreError, match="socket"):
            open_regular(tmp_path / "socket")
        with pytest.raises(StoreError, match="device"):
            open_regular("/dev/null", os.O_WRONLY)
    finally:
        listener.close()


def test_a_symlink_is_followed_only_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.close(open_regular(tmp_path / "link"))
    with pytest.raises(StoreError, match="symbolic link"):
        open_regular(tmp_path / "link", os.O_WRONLY | os.O_TRUNC, follow_links=False)
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_file_of_several_names_is_not_taken_for_an_own_one_and_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    os.link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(StoreError, match="several names"):
        open_regular(tmp_path / "b", os.O_WRONLY | os.O_TRUNC, own=True)
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


@pytest.mark.parametrize("path", ["a\0b", "", "\ud800"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        check_path(path)
