"""Users without a home, paths with ~, and values that make no sense: one line and exit code 2."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.storage.cold import ColdStore
from tierkv.tools import prompt_choice
from tierkv.tools.options import cache_directory, default_socket, default_store, parse_size

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("environment", "store"),
    [
        ({"TIERKV_STORE": "~/s", "HOME": "/h"}, "/h/s"),
        ({"TIERKV_STORE": "", "XDG_CACHE_HOME": "/x"}, "/x/tierkv/store"),
        ({"XDG_CACHE_HOME": "~/x", "HOME": "/h"}, "/h/x/tierkv/store"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/tierkv/store"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/tierkv/store"),
        ({"TIERKV_STORE": "here", "HOME": "/h"}, "here"),
    ],
)
def test_the_store_is_where_the_environment_says(environment: dict[str, str], store: str) -> None:
    assert default_store(environment) == Path(store)


@pytest.mark.parametrize(
    ("environment", "socket"),
    [
        ({"TIERKV_SOCKET": "~/d.sock", "HOME": "/h"}, "/h/d.sock"),
        ({"TIERKV_SOCKET": "", "XDG_RUNTIME_DIR": "/r"}, "/r/tierkv/daemon.sock"),
        ({"XDG_RUNTIME_DIR": "relative", "HOME": "/h"}, "/h/.cache/tierkv/daemon.sock"),
    ],
)
def test_the_socket_is_where_the_environment_says(environment: dict[str, str], socket: str) -> None:
    assert default_socket(environment) == Path(socket)


def test_a_user_without_a_home_is_told_what_to_set(homeless: None) -> None:
    for ask in (cache_directory, default_store, default_socket):
        with pytest.raises(ConfigError, match="set HOME or XDG_CACHE_HOME"):
            ask({})
    for ask, option in ((default_store, "--store or TIERKV_STORE"), (default_socket, "--socket or TIERKV_SOCKET")):
        with pytest.raises(ConfigError, match=option) as refused:
            ask({})
        assert str(refused.value).count("(") == 1, "one hint"
    assert default_store({"TIERKV_STORE": "/s"}) == Path("/s")
    assert default_socket({"TIERKV_SOCKET": "/d"}) == Path("/d")


def test_commands_that_need_no_home_work_without_one(command: Command, tmp_path: Path, homeless: None) -> None:
    with ColdStore(tmp_path / "s", quota_bytes=64 << 20, min_free_bytes=0):
        pass
    for words in (["stats"], ["inspect"], ["verify"], ["top", "--once"]):
        assert command(*words, "--store", "s").code == 0
        if words != ["top", "--once"]:
            refused = command(*words)
            assert refused.code == 2 and "XDG_CACHE_HOME" in refused.err and refused.err.count("\n") == 1
    assert command("daemon", "status").code == 2
    assert command("warm", "-h").code == 0


def test_every_option_that_is_a_path_expands_the_tilde_and_refuses_what_is_no_path(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for words in (
        *(["stats", "--store"], ["inspect", "--store"], ["verify", "--store"], ["compact", "--store"]),
        *(["evict", "--to", "1", "--store"], ["top", "--once", "--store"], ["top", "--once", "--socket"]),
        *(["daemon", "status", "--socket"], ["daemon", "stop", "--socket"], ["stats", "--socket"]),
        *(["warm"], ["report"], ["replay"], ["daemon", "prefetch"], ["run", "x", "--system"], ["run", "x", "--model"]),
        *(["daemon", "start", "--warm-file"], ["save", "f", "--store"], ["verify", "--socket"], ["load"]),
        *(["replay", "--policy", "lru"], ["replay", "f", "--policy", "learned:"]),
    ):
        *first, last = words
        joined = [*first, last, "{}"] if last != "learned:" else [*first, last + "{}"]
        known = command(*(word.format("~/missing/x") for word in joined))
        assert known.code == 2 and str(tmp_path / "home/missing") in known.err.replace("~", str(tmp_path / "home")), (
            words
        )
        for text in ("~nobody-of-this-name/x", "a\0b", "\ud800"):
            refused = command(*(word.format(text) for word in joined))
            assert refused.code == 2 and refused.err.count("\n") == 1 and not refused.out, words
            assert "no user" in refused.err or "not a path" in refused.err, words
    assert not (tmp_path / "~").exists()


def test_a_home_that_is_a_file_or_cannot_be_written_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "p.txt").write_text("Be kind.")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("TIERKV_STORE")
    for words in (["stats"], ["warm", "p.txt"], ["run", "x"]):
        refused = command(*words)
        assert refused.code == 2 and str(tmp_path / "file") in refused.err and refused.err.count("\n") == 1


HOSTILE = [
    (["top", "--once", "--store", "s", "--interval", value], "--interval")
    for value in ("nan", "inf", "-1", "0", "1e300", "x", "")
]
HOSTILE += [
    (["top", "--once", "--url", value], "is not an address")
    for value in ("", "http://", "http://[", "file:///etc/hosts", "localhost:99999", "h:x", "http://é", "http://\ud800")
]
HOSTILE += [
    (["top", "--once", "--store", "s", "--prefixes", "-1"], "--prefixes"),
    (["daemon", "start", "--metrics-port", "-1"], "--metrics-port"),
    (["daemon", "start", "--metrics-port", "65536"], "--metrics-port"),
    (["daemon", "start", "--warm-file", "/dev/null"], "not a regular file"),
    (["run", "\ud800"], "not valid Unicode"),
    (["run", "x", "--top-p", "nan"], "--top-p"),
    (["run", "x", "--temperature", "inf"], "temperature"),
    (["run", "x", "--hot", "9" * 400], "too large a size"),
    (["run", "x", "--system", "p.txt", "--nth", "-1"], "no number -1"),
    (["report", "p.txt", "--rounds", "0"], "--rounds"),
    (["report", "p.txt", "--rounds", str(10**30)], "--rounds"),
    (["report", "p.txt", "--output", "p.txt"], "cannot write to p.txt"),
    (["report", "p.txt", "--output", "p.txt/x"], "cannot write to p.txt/x"),
    (["replay", "t", "--block-tokens", str(10**30)], "--block-tokens"),
    (["train-policy", "t", "--out", "o", "--seed", "-1"], "--seed"),
    (["stats", "--store", "p.txt"], "there is no store"),
    (["stats", "--store", "s", "--socket", "d"], "not both"),
]


@pytest.mark.parametrize(
    ("words", "reason"), HOSTILE, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_a_value_that_makes_no_sense_is_refused_in_one_line(
    command: Command, tmp_path: Path, words: list[str], reason: str
) -> None:
    (tmp_path / "p.txt").write_text("Be kind.")
    refused = command(*words)
    assert refused.code == 2 and not refused.out and refused.err.count("\n") == 1
    assert refused.err.startswith("tierkv: ") and reason in refused.err and "unexpected" not in refused.err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"hash_ids": [1], "timestamp": NaN}', "finite"),
        ('{"hash_ids": [1], "timestamp": 1e400}', "finite"),
        ('{"hash_ids": [1], "input_length": 1e400}', "line 2: not a request"),
        ('{"hash_ids": [true]}', "list of integers"),
        ("[" * 100_000, "line 2: not a request"),
        ('{"hash_ids": [1]}\xff', "line 2"),
        ("\0", "binary file"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(
    command: Command, tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"hash_ids": [1], "x": "\xe2\x80\xa8"}\r\n' + line.encode("latin-1"))
    for words in (["replay", "t.jsonl", "--policy", "lru"], ["train-policy", "t.jsonl", "--out", "o"]):
        refused = command(*words)
        assert refused.code == 2 and reason in refused.err and refused.err.count("\n") == 1


def test_a_line_separator_inside_a_trace_ends_no_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"hash_ids": [1, 2], "x": "\u2028\x85"}\n' * 2)
    done = command("replay", "t.jsonl", "--policy", "lru", "--capacity", 2, "--json")
    assert json.loads(done.out)["requests"] == 2


@pytest.mark.parametrize("name", ["memory_profile.html", "trace.json"])
def test_a_report_waits_for_no_reader_of_a_fifo(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "p.txt").write_text("Be kind.")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / name)
    done = command("report", "p.txt", "--rounds", 1, "--max-new-tokens", 1, "--no-plots", "--output", "out")
    assert done.code == 2 and f"out/{name}: No such device or address" in done.err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e9", "", "٣G", "0.0001", "1.5.5", "8 X"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_a_size_is_exact_and_bounded() -> None:
    assert parse_size("1.5GiB") == 3 << 29 and parse_size(" 4096 ") == 4096
    assert parse_size("9007199254740993") == 9007199254740993  # more than a float has place for
    for text in ("9" * 400, "999999999T", "1" + "0" * 5000 + ".5K"):
        with pytest.raises(ConfigError, match="too large a size"):
            parse_size(text)


@pytest.fixture
def answer() -> Iterator[Callable[[bytes], str]]:
    """Return a function that lets a local web server answer with these bytes, and gives its address."""
    content = [b""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if content[0].startswith(b"HTTP"):
                self.wfile.write(content[0])
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content[0])

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def serve(data: bytes) -> str:
        content[0] = data
        return f"127.0.0.1:{server.server_port}"

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_answers_like_no_cache_is_refused(command: Command, answer: Callable[[bytes], str]) -> None:
    for data in (
        *(b"", b"\xff", b"[" * 100_000, b"5", b'{"tiers": 5}', b'{"tiers": {"hot": 5}}', b'{"tiers": {"hot": {}}}'),
        *(b'{"tiers": {}, "prefixes": [5], "bytes_file": 1}', b'{"tiers": {}}', b"HTTP/1.1 nonsense\r\n\r\n"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    ):
        refused = command("top", "--once", "--url", answer(data))
        assert refused.code == 2 and refused.err.count("\n") == 1 and not refused.out, data
        assert "not tierkv" in refused.err or "not the status" in refused.err or "nothing answers" in refused.err, data


def test_the_text_of_an_argument_is_read_by_its_bytes_where_the_locale_is_not_utf8() -> None:
    assert prompt_choice._text_of(os.fsencode("é").decode("ascii", "surrogateescape")) == "é"
    with pytest.raises(ConfigError, match="not valid Unicode"):
        prompt_choice._text_of("\ud800")
