"""Counters, tokens as text and bytes, limits, the day of --date, and what keeps a silent stream open."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_server import ScriptedEngine, scripted_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tierkv.errors import ConfigError
from tierkv.serving import responses
from tierkv.serving.api_errors import ApiError
from tierkv.serving.limits import ServeLimits
from tierkv.serving.monitor import Monitor
from tierkv.serving.server import bind
from tierkv.serving.token_text import TokenTexts
from tierkv.tools import serve as serve_command
from tierkv.tools.options import parse_day


def record(monitor: Monitor, prompt: int, cached: int, ttft_s: float) -> None:
    monitor.record(outcome="length", prompt_tokens=prompt, cached_tokens=cached, new_tokens=1, ttft_s=ttft_s)


def test_seconds_saved_are_those_of_computing_the_prompt_less_those_it_took() -> None:
    monitor = Monitor()
    record(monitor, 1000, 990, 0.1)
    assert monitor.saved_s == 0, "nothing has been computed that would say what a token costs"
    record(monitor, 1000, 0, 4.0)
    record(monitor, 1000, 0, 2.0)
    record(monitor, 1000, 0, 9.0)
    record(monitor, 1000, 900, 0.5)
    assert monitor.saved_s == pytest.approx(1000 * 0.002 - 0.5), "by the least time for a token so far"
    record(monitor, 1000, 900, 50.0)
    assert monitor.saved_s == pytest.approx(1.5), "a request that waited saves nothing, and takes nothing away"
    assert monitor.status()["cached_tokens"] == 990 + 900 + 900


def test_a_first_token_counts_in_every_bucket_that_holds_it() -> None:
    monitor = Monitor()
    for seconds in (0.005, 0.3, 100.0):
        record(monitor, 10, 0, seconds)
    buckets = dict(monitor._cumulative())
    assert (buckets["0.01"], buckets["0.25"], buckets["0.5"], buckets["60.0"], buckets["+Inf"]) == (1, 1, 2, 2, 3)


def test_a_token_that_is_a_part_of_a_character_has_its_own_bytes() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    texts = TokenTexts(tokenizer)
    text = "é 你\n\u0000"
    ids = tokenizer.encode(text)
    assert bytes(byte for token_id in ids for byte in texts.bytes(token_id)) == text.encode()
    assert texts.text(ids[0]) == "\ufffd"
    assert texts.bytes(tokenizer.eos_token_id) == list(b"<end>")


@pytest.mark.parametrize(
    "values", [{"max_requests": 0}, {"max_seconds": 0}, {"stop_s": float("nan")}, {"max_body_bytes": -1}]
)
def test_limits_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ServeLimits(**values)  # type: ignore[arg-type]


def test_a_day_is_a_date_or_today() -> None:
    assert parse_day("today") is None
    assert str(parse_day("2031-02-03")) == "2031-02-03"
    with pytest.raises(ConfigError, match="is not a date"):
        parse_day("yesterday")


def test_a_stream_that_waits_sends_comments(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_PING_S", 0.05)
    gate = threading.Event()
    with scripted_server(model_path, ScriptedEngine([1, 2], gate=gate)) as (url, _):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        body = {"model": "scripted", "messages": [{"role": "user", "content": "x"}], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        lines = []
        while len(comments := [line for line in lines if line.startswith(b":")]) < 3:
            lines.append(answer.readline())
        gate.set()
        rest = answer.read()
        connection.close()
    assert comments[0] == b": the answer is not ready\n"
    assert rest.endswith(b"data: [DONE]\n\n")


def test_clients_that_go_away_leave_no_task_behind(model_path: Path) -> None:
    gate = threading.Event()
    with scripted_server(model_path, ScriptedEngine([1] * 50, gate=gate)) as (url, service):
        loop = service.loop  # type: ignore[attr-defined]

        def count() -> int:
            async def tasks() -> int:
                return len(asyncio.all_tasks())

            return asyncio.run_coroutine_threadsafe(tasks(), loop).result(10)

        before = count()
        for number in range(30):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
            body = {"model": "scripted", "messages": [{"role": "user", "content": "x"}], "n": 3, "stream": True}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if number % 2:
                connection.getresponse().readline()
            connection.close()
        asyncio.run_coroutine_threadsafe(service.wait_idle(20), loop).result(30)
        for _ in range(100):
            if count() <= before:
                break
            threading.Event().wait(0.05)
        assert count() <= before
        assert service.num_active == 0


def test_the_address_is_printed_once_clients_can_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind("127.0.0.1", 0)
    address = bound.getsockname()
    printed = []

    def connect(text: str, **_: Any) -> None:
        socket.create_connection(address, timeout=5).close()
        printed.append(text)

    async def serve(*_: Any) -> None:
        pass

    service = SimpleNamespace(close=lambda: None, started=0.0)
    serving = SimpleNamespace(Service=lambda *_, **__: service, make_app=lambda *_, **__: None, serve=serve)
    monkeypatch.setattr(serve_command, "print", connect, raising=False)
    unused: Any = SimpleNamespace(day=None)
    with bound:
        asyncio.run(serve_command._serve(serving, unused, unused, "m", ServeLimits(), unused, "key", bound))
    assert printed == [f"tierkv serves m at http://127.0.0.1:{address[1]}"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_leaves_the_limit_before_its_last_event_is_sent(fails: bool, model_path: Path) -> None:
    """A client that has read the last event may ask again; a server that stops waits until that event is sent."""
    seen: list[tuple[bytes, bool]] = []

    async def values() -> AsyncGenerator[dict[str, Any], None]:
        yield {"at": 1}
        if fails:
            raise ConfigError("broken")

    async def run(service: Any) -> None:
        async def send(message: Any) -> None:
            assert service.num_active == 1
            with suppress(ApiError), service.one_request():
                seen.append((message.get("body", b""), True))
                return
            seen.append((message.get("body", b""), False))

        with ExitStack() as resources:
            answered = resources.enter_context(service.one_request())
            stream = responses.EventStream(values(), resources.pop_all())
        stream.before_last = answered
        await stream({"type": "http"}, asyncio.Event().wait, send)
        assert service.num_active == 0
        with service.one_request():
            pass

    with scripted_server(model_path, ScriptedEngine(), limits=ServeLimits(max_requests=1)) as (_, service):
        asyncio.run(run(service))
    _, (first, _), (last, may_ask), end = seen
    assert first == b'data: {"at":1}\n\n'
    assert (b'"error"' if fails else b"[DONE]") in last and may_ask
    assert end == (b"", True)
