"""What every engine must do, against the real ones: redis-server, SeaweedFS' S3, a directory."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from remote_servers import Redis, answers, free_port, need, wait_until

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.objects import ObjectsClient, ObstoreTransfer
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.redis_client import RedisClient
from tierkv.remote_tiers.remotes import open_client
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes

NAMESPACE = bytes(range(16))
KEYS = [RemoteKey(NAMESPACE, bytes([number + 1]) * 16) for number in range(128)]
LONG = CallTime(base_s=20.0)


def deadline() -> Deadline:
    return Deadline(LONG)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket on a SeaweedFS of this test run, which checks signatures."""
    obstore = pytest.importorskip("obstore")
    stores, errors = pytest.importorskip("obstore.store"), pytest.importorskip("obstore.exceptions")
    folder = tmp_path_factory.mktemp("weed")
    ports = {name: free_port() for name in ("master.port", "volume.port", "filer.port", "s3.port")}
    command = [need("weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-filer", "-s3", "-volume.max=4"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # their ports are fixed: a second server would not start
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-{name.split('.')[0]}.port.grpc={free_port()}" for name in ports]
    credentials = [{"accessKey": "any", "secretKey": "key"}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command.append(f"-s3.config={folder / 's3.json'}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    url = f"s3://tests/folder?endpoint={endpoint}&allow_http=true&region=us-east-1"
    try:
        wait_until(lambda: answers(ports["s3.port"]), timeout_s=60)
        patch = pytest.MonkeyPatch()
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "key")

        options = {"endpoint": endpoint, "region": "us-east-1", "client_options": {"allow_http": True}}

        def put() -> bool:
            try:
                where = f"http://127.0.0.1:{ports['filer.port']}/buckets/tests/"
                urllib.request.urlopen(urllib.request.Request(where, method="POST"), timeout=5).close()
                obstore.put(stores.S3Store("tests", retry_config={"max_retries": 0}, **options), "probe", b"x")
            except (errors.BaseError, OSError):
                return False
            return True

        wait_until(put, timeout_s=60)
        yield url
        patch.undo()
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(params=["redis", "redis-ttl", "dir", "s3", "s3 by obstore"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteClient]:
    """A client of each kind; Google's and Azure's objects go through obstore alone."""
    if request.param == "dir":
        url = f"dir://{tmp_path}"
    elif request.param.startswith("s3"):
        url = request.getfixturevalue("bucket").replace("/folder", f"/{tmp_path.name}")
    else:
        server: Redis = request.getfixturevalue("redis_server")
        url = server.url + ("?ttl_s=600" if request.param == "redis-ttl" else "")
    opened = open_client(RemoteUrl.parse(url))
    if request.param == "s3 by obstore":
        assert isinstance(opened, ObjectsClient)
        opened._transfer = ObstoreTransfer(opened._obstore, opened._store)
    yield opened
    opened.close()


def value(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def put(client: RemoteClient, count: int, size: int = 100) -> None:
    for number in range(count):
        assert client.write(KEYS[number], value(size, number), deadline(), replace=False)


def test_a_value_comes_back_as_it_was_written(client: RemoteClient) -> None:
    client.ping(deadline())
    for number, size in enumerate([1, 5000, (1 << 20) + 3, (16 << 20) + 5, 33 << 20]):
        data = value(size, number)
        assert client.write(KEYS[number], data, deadline(), replace=False)
        found = client.read(KEYS[number], deadline(), most_bytes=64 << 20)
        assert found is not None and np.array_equal(found, data)
    assert client.read(KEYS[9], deadline(), most_bytes=64) is None


def test_writing_creates_only_and_replaces_only_on_demand(client: RemoteClient) -> None:
    first, second = value(100, 1), value(50, 2)
    assert client.write(KEYS[0], first, deadline(), replace=False)
    assert not client.write(KEYS[0], second, deadline(), replace=False)
    found = client.read(KEYS[0], deadline(), most_bytes=100)
    assert found is not None and np.array_equal(found, first)
    assert client.write(KEYS[0], second, deadline(), replace=True)
    found = client.read(KEYS[0], deadline(), most_bytes=100)
    assert found is not None and np.array_equal(found, second)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 127, 128])
def test_the_prefix_ends_at_the_first_gap(client: RemoteClient, count: int) -> None:
    put(client, count)
    assert client.prefix(KEYS, deadline()) == count
    assert client.prefix(KEYS[:count], deadline()) == count
    assert client.prefix([], deadline()) == 0


def test_a_value_longer_than_any_record_is_not_read(client: RemoteClient) -> None:
    client.write(KEYS[0], value(1 << 20), deadline(), replace=False)
    with pytest.raises(RemoteDamageError):
        client.read(KEYS[0], deadline(), most_bytes=(1 << 20) - 1)
    client.write(KEYS[1], value(10), deadline(), replace=False)
    assert client.read(KEYS[1], deadline(), most_bytes=10) is not None, "the connection is in step again"


def test_touches_and_descriptions_are_taken(client: RemoteClient) -> None:
    put(client, 3)
    client.touch(KEYS[:5], deadline())
    client.describe(NAMESPACE, b'{"name": "model"}', deadline())
    client.describe(NAMESPACE, b'{"name": "model"}', deadline())
    assert client.prefix(KEYS, deadline()) == 3
    assert client.descriptions(deadline()) in ([], [b'{"name": "model"}'])
    if not isinstance(client, RedisClient):
        assert client.descriptions(deadline())


def test_a_deadline_that_is_over_ends_every_call(client: RemoteClient) -> None:
    put(client, 1)

    def over() -> Deadline:
        return Deadline(CallTime(base_s=0.0))

    for call in (
        lambda: client.prefix(KEYS, over()),
        lambda: client.read(KEYS[0], over(), most_bytes=1000),
        lambda: client.write(KEYS[1], value(10), over(), replace=False),
    ):
        with pytest.raises(RemoteError, match="in time"):
            call()


@pytest.mark.parametrize("by_obstore", [False, True])
def test_an_object_store_refuses_a_wrong_secret(bucket: str, monkeypatch: pytest.MonkeyPatch, by_obstore: bool) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    client = open_client(RemoteUrl.parse(bucket))
    assert isinstance(client, ObjectsClient)
    if by_obstore:
        client._transfer = ObstoreTransfer(client._obstore, client._store)
    for call in (
        lambda: client.prefix(KEYS, deadline()),
        lambda: client.read(KEYS[0], deadline(), most_bytes=1000),
        lambda: client.write(KEYS[1], value(10), deadline(), replace=False),
    ):
        with pytest.raises(RemoteRefusedError) as caught:
            call()
        assert caught.value.code == "PermissionDenied" and "wrong-secret" not in str(caught.value)
    client.close()


def test_closing_twice_is_no_error(client: RemoteClient) -> None:
    client.close()
    client.close()
