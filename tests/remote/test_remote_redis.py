"""Redis as it is used: passwords, TLS, clusters, sentinels, and servers that stop, die, evict and lie."""

from __future__ import annotations

import binascii
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from remote_servers import HostileServer, Redis, SlowProxy, free_port, need, start_redis, wait_until

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteDamageError, RemoteKey
from tierkv.remote_tiers.remotes import open_client
from tierkv.remote_tiers.urls import RemoteUrl

KEYS = [RemoteKey(bytes(16), bytes([number]) * 16) for number in range(64)]
VALUE = np.arange(200, dtype=np.uint8)
SECRET = "pass-word-42"


def deadline(base_s: float = 10.0) -> Deadline:
    return Deadline(CallTime(base_s=base_s))


def client_of(url: str) -> RemoteClient:
    return open_client(RemoteUrl.parse(url))


def roundtrip(client: RemoteClient, count: int = 8) -> None:
    for key in KEYS[:count]:
        assert client.write(key, VALUE, deadline(), replace=True)
    assert client.prefix(KEYS, deadline()) == count
    client.touch(KEYS[:count], deadline())
    for key in KEYS[:count]:
        found = client.read(key, deadline(), most_bytes=1000)
        assert found is not None and np.array_equal(found, VALUE)


def test_keys_name_the_format_the_namespace_and_the_block(redis_server: Redis) -> None:
    client = client_of(redis_server.url)
    client.write(KEYS[1], VALUE, deadline(), replace=False)
    assert redis_server.command("KEYS", "*") == [b"tkv2:" + b"00" * 16 + b":" + b"01" * 16]
    client.close()


def test_a_hit_refreshes_the_life_of_a_value(redis_server: Redis) -> None:
    client = client_of(f"{redis_server.url}?ttl_s=500")
    roundtrip(client, 2)
    name = KEYS[0].text()
    redis_server.command("PEXPIRE", name, 10_000)
    client.read(KEYS[0], deadline(), most_bytes=1000)
    assert int(redis_server.command("PTTL", name)) > 400_000
    redis_server.command("PEXPIRE", name, 10_000)
    client.touch(KEYS[:1], deadline())
    assert int(redis_server.command("PTTL", name)) > 400_000
    client.close()


def test_a_user_with_few_rights_is_enough_and_a_wrong_password_is_refused(tmp_path: Path) -> None:
    rights = "+exists +get +getex +set +touch +pexpire"
    users = f"user app on >{SECRET} ~tkv2:* resetchannels -@all {rights}\nuser default off\n"
    (tmp_path / "users").write_text(users)
    with start_redis(tmp_path / "redis", "--aclfile", str(tmp_path / "users")) as server:
        where = server.url.removeprefix("redis://")
        for life in ("", "?ttl_s=60"):
            client = client_of(f"redis://app:{SECRET}@{where}{life}")
            roundtrip(client)
            client.close()
        for user_info in (f"app:wrong-{SECRET}@", "", f"nobody:{SECRET}@"):
            client = client_of(f"redis://{user_info}{where}")
            with pytest.raises(RemoteRefusedError) as caught:
                client.ping(deadline())
            assert SECRET not in str(caught.value)
            assert caught.value.code in ("WRONGPASS", "NOAUTH")
            client.close()


def test_a_refused_batch_leaves_no_answer_to_the_next_call(tmp_path: Path) -> None:
    users = f"user app on >{SECRET} ~tkv2:* -@all +exists +get +set\nuser default off\n"
    (tmp_path / "users").write_text(users)
    with start_redis(tmp_path / "redis", "--aclfile", str(tmp_path / "users")) as server:
        client = client_of(f"redis://app:{SECRET}@127.0.0.1:{server.port}")
        client.write(KEYS[0], VALUE, deadline(), replace=False)
        for _ in range(3):
            with pytest.raises(RemoteRefusedError) as caught:
                client.touch(KEYS[:5], deadline())
            assert caught.value.code == "NOPERM"
            found = client.read(KEYS[0], deadline(), most_bytes=1000)
            assert found is not None and np.array_equal(found, VALUE)
        client.close()


def test_tls_is_used_and_a_server_with_another_certificate_is_refused(tmp_path: Path) -> None:
    openssl = need("openssl")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    files = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate)]
    options = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", *files]
    with start_redis(tmp_path / "redis", *options, plain=False, port=port):
        client = client_of(f"rediss://127.0.0.1:{port}?ca={certificate}")
        roundtrip(client)
        big = np.random.default_rng(0).integers(0, 256, 9 << 20, dtype=np.uint8)
        client.write(KEYS[40], big, deadline(), replace=False)
        found = client.read(KEYS[40], deadline(), most_bytes=16 << 20)
        assert found is not None and np.array_equal(found, big)
        client.close()
        for url in (f"rediss://127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
            client = client_of(url)
            with pytest.raises(RemoteError):
                client.ping(deadline(2.0))
            client.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Redis]]:
    """A cluster of three."""
    servers: list[Redis] = []
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
    try:
        while len(servers) < 3:
            port = free_port()
            if port < 55_000:  # the bus of a cluster is 10,000 higher
                servers.append(Redis(tmp_path / str(port), *options, port=port))
        where = [f"127.0.0.1:{server.port}" for server in servers]
        subprocess.run(
            [need("redis-cli"), "--cluster", "create", *where, "--cluster-yes"], check=True, capture_output=True
        )
        wait_until(lambda: all(b"cluster_state:ok" in server.command("CLUSTER", "INFO") for server in servers))
        yield servers
    finally:
        for server in servers:
            server.resume()
            server.kill()


def test_a_cluster_spreads_the_blocks_of_one_prompt_and_a_moved_slot_is_followed(cluster: list[Redis]) -> None:
    pytest.importorskip("redis")
    client = client_of(f"redis://127.0.0.1:{cluster[0].port},127.0.0.1:{cluster[1].port}?cluster=true&ttl_s=60")
    roundtrip(client, 32)
    sizes = [int(server.command("DBSIZE")) for server in cluster]
    assert sum(sizes) == 32 and min(sizes) > 0
    node = cluster[2].command("CLUSTER", "MYID")
    assert isinstance(node, bytes)
    subprocess.run(
        [
            *(need("redis-cli"), "--cluster", "reshard", f"127.0.0.1:{cluster[1].port}", "--cluster-from", "all"),
            *("--cluster-slots", "1000", "--cluster-to", node.decode(), "--cluster-pipeline", "500", "--cluster-yes"),
        ],
        check=True,
        capture_output=True,
    )
    assert client.prefix(KEYS, deadline()) == 32
    roundtrip(client, 32)
    lost = next(key for key in KEYS if _owns(cluster[1], key))
    cluster[1].kill()
    with pytest.raises(RemoteError):
        client.read(lost, deadline(1.0), most_bytes=1000)
    client.close()


def test_a_cluster_answers_no_probe_while_one_of_its_servers_is_stopped(cluster: list[Redis]) -> None:
    """Else the breaker would close, and each request would wait for that server again."""
    client = client_of(f"redis://127.0.0.1:{cluster[0].port}?cluster=true")
    roundtrip(client, 8)
    cluster[2].pause()
    with pytest.raises(RemoteError):
        client.ping(deadline(0.5))
    cluster[2].resume()
    wait_until(lambda: _answers(client))
    roundtrip(client, 8)
    client.close()


def _owns(server: Redis, key: RemoteKey) -> bool:
    keys = server.command("KEYS", "*")
    assert isinstance(keys, list)
    return key.text().encode() in keys


def test_sentinels_name_the_server_that_takes_writes(own_redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "sentinel.conf").write_text(f"sentinel monitor cache 127.0.0.1 {own_redis.port} 1\n")
    port = free_port()
    command = [need("redis-server"), str(tmp_path / "sentinel.conf"), "--sentinel", "--port", str(port)]
    process = subprocess.Popen([*command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
    try:
        client = client_of(f"redis://127.0.0.1:1,127.0.0.1:{port}?sentinel=cache")
        wait_until(lambda: _answers(client))
        roundtrip(client)
        client.close()
        client = client_of(f"redis://127.0.0.1:{port}?sentinel=unknown")
        with pytest.raises(RemoteError):
            client.ping(deadline(2.0))
        client.close()
    finally:
        process.kill()
        process.wait(10)


def _answers(client: RemoteClient) -> bool:
    try:
        client.ping(deadline(1.0))
    except RemoteError:
        return False
    return True


def test_a_stopped_server_costs_the_deadline_and_no_more(own_redis: Redis) -> None:
    client = client_of(own_redis.url)
    roundtrip(client)
    own_redis.pause()
    for call in (lambda: client.prefix(KEYS, deadline(0.2)), lambda: client.read(KEYS[0], deadline(0.2), most_bytes=9)):
        begin = time.monotonic()
        with pytest.raises(RemoteError, match="in time"):
            call()
        assert time.monotonic() - begin < 2.0, "redis-py's own retries take 6.8 s"
    own_redis.resume()
    roundtrip(client)
    client.close()


def test_a_server_that_was_killed_and_starts_empty_is_used_again(own_redis: Redis) -> None:
    client = client_of(own_redis.url)
    roundtrip(client)
    own_redis.kill()
    with pytest.raises(RemoteError):
        client.read(KEYS[0], deadline(1.0), most_bytes=1000)
    own_redis.start()
    assert client.prefix(KEYS, deadline()) == 0
    roundtrip(client)
    client.close()


def test_connections_that_the_server_has_closed_are_not_used(redis_server: Redis) -> None:
    client = client_of(redis_server.url)
    roundtrip(client)
    redis_server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    roundtrip(client)
    client.close()


def test_a_full_server_refuses_writes_and_answers_reads(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis", "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        client = client_of(server.url)
        client.write(KEYS[0], VALUE, deadline(), replace=False)
        filler = np.zeros(1 << 20, dtype=np.uint8)

        def fill() -> None:
            for key in KEYS[1:10]:
                client.write(key, filler, deadline(), replace=False)

        with pytest.raises(RemoteRefusedError) as caught:
            fill()
        assert caught.value.code == "OOM"
        assert client.read(KEYS[0], deadline(), most_bytes=1000) is not None
        client.close()


def test_an_evicting_server_ends_the_prefix_where_a_parent_is_gone(tmp_path: Path) -> None:
    with start_redis(tmp_path / "redis", "--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru") as server:
        client = client_of(server.url)
        big = np.random.default_rng(0).integers(0, 256, 512 << 10, dtype=np.uint8)
        for key in KEYS[:30]:
            client.write(key, big, deadline(), replace=False)
        there = [client.read(key, deadline(), most_bytes=1 << 20) is not None for key in KEYS[:30]]
        assert not all(there) and any(there)
        assert client.prefix(KEYS[:30], deadline()) == there.index(False)
        client.close()


def test_a_key_of_another_type_is_damage_that_a_write_replaces(redis_server: Redis) -> None:
    client = client_of(redis_server.url)
    redis_server.command("RPUSH", KEYS[0].text(), "a")
    with pytest.raises(RemoteDamageError):
        client.read(KEYS[0], deadline(), most_bytes=1000)
    assert client.write(KEYS[0], VALUE, deadline(), replace=True)
    assert client.read(KEYS[0], deadline(), most_bytes=1000) is not None
    client.close()


def test_a_gap_is_found_in_one_round_trip() -> None:
    """The server answers nothing before all keys have been asked for."""
    pytest.importorskip("redis")
    asked: list[bytes] = []

    def exists(words: list[bytes]) -> bytes:
        asked.append(words[1])
        return b"" if len(asked) < len(KEYS) else b":1\r\n" * 20 + b":0\r\n" + b":1\r\n" * (len(KEYS) - 21)

    server = HostileServer({b"EXISTS": exists})
    client = client_of(server.url)
    assert client.prefix(KEYS, deadline(5.0)) == 20
    assert asked == [key.text().encode() for key in KEYS]
    client.close()
    server.close()


def test_all_servers_of_a_cluster_are_asked_before_the_first_answers() -> None:
    pytest.importorskip("redis")
    servers: list[HostileServer] = []
    asked: list[list[bytes]] = [[], []]
    all_asked = threading.Event()

    def exists_on(number: int) -> Callable[[list[bytes]], Iterator[bytes]]:
        def exists(words: list[bytes]) -> Iterator[bytes]:
            asked[number].append(words[1])
            if sum(map(len, asked)) == len(KEYS):
                all_asked.set()
            yield from ()
            if asked[number][-1] == last[number]:
                assert all_asked.wait(5)
                yield b":1\r\n" * len(asked[number])

        return exists

    def slots(_: list[bytes]) -> bytes:
        nodes = [b"*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % server.port for server in servers]
        return b"*2\r\n*3\r\n:0\r\n:8191\r\n%s*3\r\n:8192\r\n:16383\r\n%s" % tuple(nodes)

    names = [key.text().encode() for key in KEYS]
    halves = [[name for name in names if binascii.crc_hqx(name, 0) % 16384 // 8192 == half] for half in (0, 1)]
    last = [half[-1] for half in halves]
    for number in (0, 1):
        servers.append(HostileServer({b"CLUSTER": slots, b"EXISTS": exists_on(number)}))
    client = client_of(f"redis://127.0.0.1:{servers[0].port}?cluster=true")
    assert client.prefix(KEYS, deadline(5.0)) == len(KEYS)
    assert asked == halves
    client.close()
    for server in servers:
        server.close()


def test_a_stopped_sentinel_leaves_time_for_the_next_one(own_redis: Redis) -> None:
    host = b"127.0.0.1"
    port = str(own_redis.port).encode()
    there = HostileServer(
        {b"SENTINEL": lambda _: b"*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(host), host, len(port), port)}
    )
    with socket.create_server(("127.0.0.1", 0)) as stopped:  # takes connections and answers nothing
        client = client_of(f"redis://127.0.0.1:{stopped.getsockname()[1]},127.0.0.1:{there.port}?sentinel=cache")
        client.ping(deadline(3.0))
        client.close()
    there.close()


def test_answers_of_a_call_that_failed_never_reach_the_next_call(redis_server: Redis) -> None:
    """Only a connection whose answers are all received is used again."""
    proxy = SlowProxy(redis_server.port, delay_s=0.0)
    client = client_of(f"redis://127.0.0.1:{proxy.port}")
    values = [np.full(300, number, dtype=np.uint8) for number in range(8)]
    for key, value in zip(KEYS, values, strict=False):
        client.write(key, value, deadline(), replace=False)
    proxy.delay_s = 0.15
    for key in KEYS[:4]:
        with pytest.raises(RemoteError):
            client.read(key, deadline(0.1), most_bytes=1000)
    proxy.delay_s = 0.0
    for key, value in zip(KEYS, values, strict=False):
        found = client.read(key, deadline(), most_bytes=1000)
        assert found is not None and np.array_equal(found, value)
    client.close()
    proxy.close()


def test_many_threads_share_one_client(redis_server: Redis) -> None:
    client = client_of(redis_server.url)
    roundtrip(client, 32)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for key in KEYS[:32]:
                found = client.read(key, deadline(), most_bytes=1000)
                assert found is not None and np.array_equal(found, VALUE)
        except BaseException as exc:  # noqa: BLE001 - the test raises it
            failures.append(exc)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    client.close()
