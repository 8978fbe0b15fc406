"""What a client says of its namespace is computed again: who claims something else is refused, at once, and told."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from daemon_process import BLOCK_BYTES, Start
from one_command import Command
from pattern_engine import tiny_layout
from raw_client import LAYOUT, NAMESPACE, connect, hello
from test_commands import tierkv  # noqa: F401 - a fixture
from test_safety import assert_healthy

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.messages import Flush, Hello, Status, StatusReport
from tierkv.daemon.protocol import printable
from tierkv.errors import ConfigError, DaemonError, DaemonGoneError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_reader import StoredNamespace
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES, Namespace, parse_description


def changed(**fields: Any) -> bytes:
    """Return the honest description with some fields changed; None leaves one out."""
    own = json.loads(NAMESPACE.describe()) | fields
    return json.dumps({key: value for key, value in own.items() if value is not None}).encode()


def claim(description: bytes, **fields: Any) -> Hello:
    """Return a Hello with a description, and the honest digest unless that is given too."""
    message = hello()
    message.description = description
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def true_claim(description: bytes) -> Hello:
    return claim(description, namespace=parse_description(description).digest)


OTHER = replace(NAMESPACE, layout=tiny_layout(block_size=8))
ODD = {
    "another model's digest": claim(OTHER.describe(), block_bytes=OTHER.layout.block_bytes),
    "a digest of nothing": claim(NAMESPACE.describe(), namespace=b"x" * 16),
    "a short digest": claim(NAMESPACE.describe(), namespace=NAMESPACE.digest[:15]),
    "a long digest": claim(NAMESPACE.describe(), namespace=NAMESPACE.digest * 1000),
    "an exact namespace's digest and a lossy codec": claim(changed(lossy_codec="lossy-int8")),
    "a codec that there is not": true_claim(changed(lossy_codec="lossy-nothing")),
    "an exact codec as the lossy one": true_claim(changed(lossy_codec="zstd")),
    "a codec that is a list": claim(changed(lossy_codec=["lossy-int8"])),
    "a description that is deep": claim(b"[" * 60_000),
    "a description with a deep field": claim(changed(architecture=json.loads("[" * 900 + "]" * 900))),
    "a description that is no object": claim(b"7"),
    "a description that is no JSON": claim(b"{"),
    "a description that is no text": claim(b"\xff\xfe"),
    "an empty description": claim(b""),
    "a long description": claim(changed(name="x" * DESCRIPTION_LIMIT_BYTES)),
    "an unknown field": claim(changed(more=1)),
    "a missing field": claim(changed(weights=None)),
    "a number with a fraction": claim(changed(block_size=4.0)),
    "a truth as a number": claim(changed(tp_size=True)),
    "an endless number": claim(NAMESPACE.describe().replace(b'"block_size":4', b'"block_size":' + b"9" * 5000)),
    "a number that is none": claim(NAMESPACE.describe().replace(b'"block_size":4', b'"block_size":NaN')),
    "a rank that cannot be": claim(changed(tp_rank=-1)),
    "layers of strings": claim(changed(layers=[["1", "1", "1"]])),
    "no layers": claim(changed(layers=[])),
    "a name with a lone surrogate": claim(changed(name="\ud800")),
    "a salt with a lone surrogate": claim(changed(salt="\ud800")),
    "blocks of another size": claim(NAMESPACE.describe(), block_bytes=LAYOUT.block_bytes + 1),
    "blocks of a negative size": claim(NAMESPACE.describe(), block_bytes=-(1 << 63)),
}


def test_each_odd_greeting_is_answered_at_once_and_costs_nobody_else_anything(start_daemon: Start) -> None:
    daemon = start_daemon()
    for what, message in ODD.items():
        begin = time.monotonic()
        with pytest.raises(DaemonError) as refusal:
            DaemonClient(daemon.socket, message, timeout_s=20)
        assert not isinstance(refusal.value, DaemonGoneError), f"{what}: {refusal.value}"
        assert time.monotonic() - begin < 5, what
    assert_healthy(daemon.socket)
    report = daemon.status()
    assert [tenant.namespace for tenant in report.tenants] == [NAMESPACE.digest.hex()]


def test_a_greeting_longer_than_any_decent_one_ends_the_connection(start_daemon: Start) -> None:
    daemon = start_daemon(store=False)
    with pytest.raises(DaemonError, match=r"longer than|Broken pipe|reset"):
        DaemonClient(daemon.socket, claim(b"x" * (4 << 20)))
    assert_healthy(daemon.socket)


def test_names_are_shown_as_one_line_whatever_signs_they_have(
    start_daemon: Start,
    tierkv: Command,  # noqa: F811
) -> None:
    daemon = start_daemon(store=False)
    odd = replace(NAMESPACE, name="[/red]\x1b[31m\nnext\u202eline", salt="\ud800")
    message = hello(odd)
    message.client = "[bold]\r\nmore\x00" * 100
    with DaemonClient(daemon.socket, message):
        shown = daemon.status().tenants[0].name
        assert shown == "[/red]?[31m?next?line"
        code, out, err = tierkv("daemon", "status", "--socket", str(daemon.socket))
        assert (code, err) == (0, "") and "[/red]" in out
        with pytest.raises(DaemonError):
            DaemonClient(daemon.socket, claim(b"", client="two\nlines"))
    assert "two\n" not in daemon.log and "two?lines" in daemon.log


def test_a_text_of_a_client_becomes_one_line_of_unicode() -> None:
    assert printable("a\nb\x1b\ud800" + "x" * 100, 12) == "a?b?\\ud800xx"
    printable("\udcff" * 100, 64).encode()


def test_a_cache_whose_name_is_not_unicode_is_served(start_daemon: Start, short_path: Path) -> None:
    daemon = start_daemon(store=False)
    config = CacheConfig(block_size=4, hot_bytes=16 * BLOCK_BYTES, socket=daemon.socket)
    namespace = Namespace(weights="w", layout=tiny_layout(), name="caf\udce9")
    with TierCache(config, namespace=namespace):
        assert len(daemon.status().tenants) == 1


def test_a_path_that_cannot_be_told_to_clients_is_refused(tmp_path: Path) -> None:
    for paths in ({"socket": Path("/tmp/\udcff"), "store": None}, {"socket": Path("/tmp/d"), "store": Path("/\udcff")}):
        with pytest.raises(ConfigError, match="not UTF-8"):
            DaemonConfig(warm_bytes=1, cold_bytes=1, **paths)


def test_the_store_learns_of_a_namespace_with_its_first_block(start_daemon: Start, short_path: Path) -> None:
    from raw_client import tokens_of, write_prompt

    from tierkv.daemon.messages import Done

    daemon = start_daemon()
    with connect(daemon.socket, OTHER), connect(daemon.socket) as client:
        write_prompt(client, tokens_of(4))
        client.call(Flush(), Done)
    daemon.kill()
    first = the_namespace_in(short_path / "store")
    daemon.start()
    with connect(daemon.socket, OTHER), connect(daemon.socket) as client:
        client.call(Flush(), Done)
        assert client.call(Status(), StatusReport).cold["blocks"] == 1
    daemon.kill()
    again = the_namespace_in(short_path / "store")
    for known in (first, again):
        assert (known.digest, known.description["name"]) == (NAMESPACE.digest, "raw")
    assert again.last_used > first.last_used, "who only reads uses it too"


def the_namespace_in(path: Path) -> StoredNamespace:
    with ColdStore(path, quota_bytes=64 << 20, min_free_bytes=0) as store:
        (known,) = store.namespaces()
        return known
