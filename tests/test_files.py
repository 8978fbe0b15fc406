from __future__ import annotations

import os
import pwd
import socket
import threading
from pathlib import Path

import pytest

from tierkv.errors import ConfigError, StoreError
from tierkv.values.files import check_path, home_directory, open_regular, read_whole, user_path, write_whole


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


def no_such_user(number: int) -> pwd.struct_passwd:
    raise KeyError(number)


def test_home_is_the_environments_then_the_password_files(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Path(pwd.getpwuid(os.getuid()).pw_dir)
    assert home_directory({"HOME": "/somewhere"}) == Path("/somewhere")
    for odd in ({}, {"HOME": ""}, {"HOME": "relative"}):
        assert home_directory(odd) == known
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    assert home_directory({"HOME": ""}) is None


def test_a_tilde_is_expanded_only_at_the_beginning_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = pwd.getpwuid(os.getuid()).pw_name
    environment = {"HOME": "/home/of/me"}
    for text, path in {
        "~": "/home/of/me",
        "~/a": "/home/of/me/a",
        "~//a": "/home/of/me/a",
        f"~{name}/a": f"{pwd.getpwnam(name).pw_dir}/a",
        "a/~/b": "a/~/b",
        "./~/a": f"{tmp_path}/~/a",
        "relative": "relative",
    }.items():
        assert user_path(text, environment) == Path(path)
        assert user_path(user_path(text, environment), environment) == Path(path)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/a", "~\udcff/a", "", "a\0b", "\ud800"])
def test_what_cannot_be_expanded_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        user_path(text)


def test_a_tilde_without_a_home_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    with pytest.raises(ConfigError, match="set HOME"):
        user_path("~/a", {})


def test_reading_waits_for_the_writer_of_a_pipe_and_for_no_one_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert read_whole(tmp_path / "fifo", limit_bytes=10) == b""
    reader, writer = os.pipe()
    late = threading.Timer(0.1, lambda: (os.write(writer, b"late"), os.close(writer)))
    late.start()
    try:
        assert read_whole(f"/dev/fd/{reader}", limit_bytes=10) == b"late"
    finally:
        late.join()
        os.close(reader)


def test_reading_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than"):
        read_whole("/dev/zero", limit_bytes=1 << 20)
    with pytest.raises(IsADirectoryError):
        read_whole(tmp_path, limit_bytes=1)


def test_writing_to_a_fifo_that_no_program_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device"):
        write_whole(tmp_path / "fifo", b"text")
    write_whole(tmp_path / "file", b"text")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
