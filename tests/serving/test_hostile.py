"""Whatever comes over the network is bounded and answered, and never a 500."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import ScriptedEngine, scripted_server

from tierkv.serving.limits import ServeLimits

Serve = Callable[..., str]
CHAT = "/v1/chat/completions"
GOOD = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def serve(model_path: Path) -> Iterator[Serve]:
    """Return a function that starts a scripted server and returns its address."""
    with ExitStack() as stack:

        def start(engine: ScriptedEngine | None = None, **options: Any) -> str:
            engine = engine or ScriptedEngine([1, 2, 3])
            url, _ = stack.enter_context(scripted_server(model_path, engine, **options))
            return url

        yield start


@pytest.fixture(scope="module")
def shared(model_path: Path) -> Iterator[str]:
    with scripted_server(model_path, ScriptedEngine([1, 2, 3])) as (url, service):
        yield url
        assert service.num_active == 0
        assert service.monitor.statuses[500] == 0


def send(url: str, body: bytes, *, path: str = CHAT, method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
    """Return status, JSON and headers of an answer."""
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(url + path, data=body if method == "POST" else None, headers=sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read()), exc.headers


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def raw(url: str, data: bytes, *, timeout_s: float = 20.0) -> bytes:
    """Send bytes as they are; return all that comes until the server closes the connection."""
    with socket.create_connection(address_of(url), timeout=timeout_s) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass
        return received


def assert_error(status: int, body: Any) -> None:
    assert 400 <= status < 500, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and len(body["error"]["message"]) < 2000


BODIES = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b"null",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    json.dumps({**GOOD, "temperature": float("nan")}).encode(),
    json.dumps({**GOOD, "temperature": float("inf")}).encode(),
    json.dumps({**GOOD, "max_tokens": 10**40}).encode(),
    json.dumps({**GOOD, "seed": 10**40}).encode(),
    json.dumps(GOOD).encode().replace(b"3}", b"1e400}"),
    json.dumps(GOOD).encode().replace(b"3}", b"9" * 5000 + b"}"),
    json.dumps({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
    json.dumps({**GOOD, "model": "\ud800"}).encode(),
    json.dumps(GOOD).encode().replace(b"hi", b"\xff\xfe"),
    json.dumps(GOOD).encode("utf-16"),
    json.dumps({**GOOD, "messages": "hi"}).encode(),
    json.dumps({**GOOD, "messages": [["user", "hi"]]}).encode(),
    json.dumps({**GOOD, "messages": [{"role": "root", "content": "hi"}]}).encode(),
    json.dumps({**GOOD, "stop": [""]}).encode(),
    json.dumps({**GOOD, "stop": ["a"] * 100}).encode(),
    json.dumps({**GOOD, "stop_token_ids": [-1]}).encode(),
    json.dumps({**GOOD, "n": 0}).encode(),
    json.dumps({**GOOD, "n": True}).encode(),
    json.dumps({**GOOD, "stream": "yes"}).encode(),
    json.dumps({**GOOD, "stream_options": {"include_usage": True}}).encode(),
    json.dumps({**GOOD, "deadline_s": 0}).encode(),
    json.dumps({**GOOD, "chat_template_kwargs": {"messages": "x", "tokenize": True}}).encode(),
    json.dumps({**GOOD, "chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}).encode(),
    json.dumps({**GOOD, "chat_template_kwargs": {"add_generation_prompt": False}}).encode(),
    json.dumps({**GOOD, "messages": [{"role": "user", "content": ""}] * 2000}).encode(),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:40]))
def test_a_body_that_is_no_request_is_refused(shared: str, body: bytes) -> None:
    status, answer, _ = send(shared, body)
    assert_error(status, answer)
    assert send(shared, json.dumps(GOOD).encode())[0] == 200, "and the next one is answered"


KEYS = ["role", "content", "type", "text", "function", "name", "x"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "function", "auto", "\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    *("messages", "prompt", "n", "stop", "seed", "stream", "tools", "tool_choice", "logprobs", "top_logprobs", "top_k"),
    *("temperature", "top_p", "max_tokens", "stop_token_ids", "response_format", "stream_options", "logit_bias"),
    *("chat_template_kwargs", "priority", "deadline_s", "user", "metadata", "echo", "best_of", "anything"),
]


@settings(max_examples=150)
@given(st.sampled_from([CHAT, "/v1/completions"]), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_no_field_of_any_value_is_a_server_error(shared: str, path: str, fields: dict[str, Any]) -> None:
    base = GOOD if path == CHAT else {"model": "scripted", "prompt": "x", "max_tokens": 3}
    body = json.dumps({**base, **fields}).encode()
    request = urllib.request.Request(shared + path, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            assert_error(exc.code, json.loads(exc.read()))


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_http_close_the_connection_and_nothing_else(shared: str, data: bytes) -> None:
    received = raw(shared, data + b"\r\n\r\n\r\n")
    assert b" 500 " not in received.split(b"\r\n")[0]


def test_a_type_that_pages_may_send_unasked_is_refused(shared: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert_error(*send(shared, json.dumps(GOOD).encode(), Content_Type=kind)[:2])


def test_pages_of_other_sites_may_not_ask(shared: str) -> None:
    body = json.dumps(GOOD).encode()
    assert send(shared, body, Origin="https://evil.example")[0] == 403
    assert send(shared, body, Origin="null")[0] == 403
    assert send(shared, body, Origin=shared)[0] == 200
    _, _, headers = send(shared, body)
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_server_for_this_machine_answers_under_local_names_only(serve: Serve) -> None:
    url = serve(needs_local_host=True)
    body = json.dumps(GOOD).encode()
    for host, status in (("evil.example:80", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8000", 200)):
        assert send(url, body, Host=host)[0] == status, host
    assert send(url, body, Host="[")[0] in (400, 403)


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(shared: str) -> None:
    status, body, _ = send(shared, b"", path="/v1/embeddings")
    assert status == 404
    assert_error(status, body)
    status, body, headers = send(shared, b"", method="GET")
    assert status == 405 and "POST" in headers["Allow"]
    assert_error(status, body)
    assert send(shared, b"", path="/v1/models", method="DELETE")[0] == 405
    assert send(shared, b"", path="/../../etc/passwd", method="GET")[0] == 404
    assert send(shared, b"", path="/page/..%2f__init__.py", method="GET")[0] == 404


def test_a_body_beyond_the_limit_is_413_also_without_a_length(serve: Serve) -> None:
    url = serve(limits=ServeLimits(max_body_bytes=5000))
    large = json.dumps({**GOOD, "user": "x" * 6000}).encode()
    status, body, _ = send(url, large)
    assert status == 413 and body["error"]["code"] == "request_too_large"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(8))
    assert b" 413 " in raw(url, head.encode() + chunks + b"0\r\n\r\n").split(b"\r\n")[0]
    endless = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    )
    started = time.monotonic()
    assert b" 413 " in raw(url, endless.encode() + b"x" * 30_000).split(b"\r\n")[0]
    assert time.monotonic() - started < 10


def test_a_slow_body_is_given_a_time(serve: Serve) -> None:
    url = serve(limits=ServeLimits(body_s=0.3))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    received = raw(url, head.encode())
    assert b" 408 " in received.split(b"\r\n")[0]
    assert b"request_timeout" in received


def test_slow_headers_are_given_a_time_also_on_a_used_connection(serve: Serve) -> None:
    url = serve(limits=ServeLimits(header_s=0.3))
    started = time.monotonic()
    assert raw(url, b"") == b""
    assert raw(url, b"POST / HTTP/1.1\r\nHost: ") == b""
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert raw(url, first + b"GET / HT").count(b"HTTP/1.1") == 1
    with socket.create_connection(address_of(url), timeout=20) as connection:
        connection.sendall(first)
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        connection.sendall(b"G")
        assert connection.recv(65536) == b""
    assert time.monotonic() - started < 15


def test_too_many_or_too_long_headers_are_refused(shared: str) -> None:
    many = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 100) for number in range(2000))
    received = raw(shared, b"GET /health HTTP/1.1\r\nHost: x\r\n" + many + b"\r\n")
    assert received == b"" or b" 400 " in received.split(b"\r\n")[0]
    assert send(shared, b"", path="/health", method="GET")[0] == 200


def test_more_connections_than_the_limit_are_closed(serve: Serve) -> None:
    url = serve(limits=ServeLimits(max_connections=5))
    time.sleep(0.3)  # until the connection that saw it start has ended
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(address_of(url), timeout=20)) for _ in range(8)]
        time.sleep(0.3)
        closed = 0
        for connection in opened:
            connection.settimeout(0.2)
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
        assert closed == 3
    time.sleep(0.2)
    assert send(url, b"", path="/health", method="GET")[0] == 200


def test_a_client_that_does_not_read_is_given_a_time(serve: Serve) -> None:
    engine = ScriptedEngine([1] * 4000)
    url = serve(engine, limits=ServeLimits(stall_s=0.5, max_new_tokens=4000))
    body = json.dumps({**GOOD, "max_tokens": 4000, "n": 30, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address_of(url))
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while engine.closed < 30 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert engine.closed == 30


def test_without_the_key_only_the_page_and_health_answer(serve: Serve) -> None:
    url = serve(api_key="sesame")
    body = json.dumps(GOOD).encode()
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "sesame"},
        {"Authorization": "Bearer \xff"},
    ):
        status, answer, answered = send(url, body, **headers)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert answered["WWW-Authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/status"):
        assert send(url, b"", path=path, method="GET")[0] == 401
    assert send(url, body, Authorization="Bearer sesame")[0] == 200
    assert send(url, b"", path="/health", method="GET")[0] == 200
    for path in ("/", "/page/page.js"):
        with urllib.request.urlopen(url + path, timeout=10) as page:
            assert "script-src 'self'" in page.headers["Content-Security-Policy"]


def test_slow_clients_do_not_delay_others(serve: Serve) -> None:
    url = serve(limits=ServeLimits(body_s=5))
    stop = threading.Event()

    def drip() -> None:
        with socket.create_connection(address_of(url), timeout=20) as connection:
            connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n")
            stop.wait(10)

    threads = [threading.Thread(target=drip) for _ in range(30)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    assert send(url, json.dumps(GOOD).encode())[0] == 200
    assert time.monotonic() - started < 4
    stop.set()
    for thread in threads:
        thread.join()
