"""The process: it finds its prompts again after a restart, warms a file first, and ends in time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT
from serve_process import Start, running_server

openai = pytest.importorskip("openai")

LONG = "You answer questions about our billing system. " * 20
MESSAGES = [{"role": "system", "content": LONG}, {"role": "user", "content": "Why was I charged twice?"}]


def ask(client: Any, name: Path, messages: Any = None, **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=str(name), messages=messages or MESSAGES, **options)


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_a_second_process_finds_what_the_first_one_computed(start: Start, model_path: Path) -> None:
    first = start()
    with first.client() as client:
        answer = ask(client, model_path)
        assert cached(answer) == 0
    assert first.stop() < 5
    assert first.process.returncode == 0
    second = start()
    with second.client() as client:
        again = ask(client, model_path)
        assert cached(again) == again.usage.prompt_tokens - 1, again.tierkv
        assert again.tierkv["cached_tokens"]["cold"] == cached(again)
        assert again.choices[0].message.content == answer.choices[0].message.content
        conversation = [
            *MESSAGES,
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "And then?"},
        ]
        assert cached(ask(client, model_path, conversation)) == answer.usage.prompt_tokens + 11


def test_a_warm_files_prompts_are_found_by_the_first_request(start: Start, model_path: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\n---\nAnother one. {LONG}\n---\n{'too long ' * 2000}")
    running = start("--warm-file", str(prompts))
    with running.client() as client:
        assert cached(ask(client, model_path)) > len(LONG)
    log = running.log.read_text()
    assert "warmed 2 prompts" in log and "1 were too large" in log


def test_what_tierkv_warm_stored_is_found_by_the_server(start: Start, model_path: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    prompts.write_text(json.dumps({"system": LONG, "tools": tools}))
    command = [sys.executable, "-m", "tierkv", "warm", str(prompts), "--model", str(model_path), "--block-size", "16"]
    command += [
        "--store",
        str(tmp_path / "store"),
        "--cold",
        "256M",
        "--min-free",
        "0",
        "--hot",
        "32M",
        "--warm",
        "16M",
    ]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    with start().client() as client:
        answer = ask(client, model_path, tools=tools)
        assert cached(answer) > len(LONG), answer.usage
        assert cached(ask(client, model_path)) < 100, "without the tools it is another prompt"


def test_sigterm_ends_running_answers_in_time_and_refuses_new_ones(start: Start, model_path: Path) -> None:
    running = start()
    with running.client() as client:
        streams = [
            ask(client, model_path, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}) for _ in range(3)
        ]
        ends: list[Any] = []

        def read(stream: Any) -> None:
            ends.append([chunk.choices[0] for chunk in stream][-1])

        readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for reader in readers:
            reader.start()
        time.sleep(0.5)
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, model_path)
        assert refused.value.status_code == 503
        running.process.wait(30)
        assert time.monotonic() - started < (5 if os.getloadavg()[0] <= 2 * (os.cpu_count() or 1) else 60)
        for reader in readers:
            reader.join(10)
    assert running.process.returncode == 0
    assert [(end.finish_reason, end.stop_reason) for end in ends] == [("length", "shutdown")] * 3
    assert "Traceback" not in running.log.read_text()


def test_ctrl_c_twice_ends_at_once(start: Start, model_path: Path) -> None:
    running = start("--stop-seconds", "30")
    with running.client() as client:
        stream = ask(client, model_path, max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        started = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        running.process.wait(30)
        assert time.monotonic() - started < 8
        stream.close()


def test_a_clients_deadline_ends_its_answer(start: Start, model_path: Path) -> None:
    with start().client() as client:
        extra = {"ignore_eos": True, "deadline_s": 0.5}
        answer = ask(client, model_path, max_tokens=3000, extra_body=extra)
        assert answer.choices[0].stop_reason == "deadline"
        assert answer.choices[0].finish_reason == "length"
        assert 0 < len(answer.choices[0].message.content) < 3000


def test_the_api_key_comes_from_the_environment(start: Start, model_path: Path) -> None:
    running = start(TIERKV_API_KEY="sesame")
    with running.client() as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with running.client(api_key="sesame") as client:
        assert client.models.list().data


def test_metrics_and_status_are_those_of_the_cache_and_the_server(start: Start, model_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    running = start("--served-name", "mine")
    with running.client() as client:
        for _ in range(2):
            ask(client, Path("mine"))
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#") and " " in line}
    assert values['tierkv_serve_answers_total{outcome="length"}'] == 2
    assert values["tierkv_serve_new_tokens_total"] == 24
    assert values["tierkv_serve_cached_tokens_total"] == values['tierkv_hit_tokens_total{tier="hot"}'] + sum(
        values[f'tierkv_hit_tokens_total{{tier="{tier}"}}'] for tier in ("warm", "cold")
    )
    assert values["tierkv_serve_first_token_seconds_count"] == 2
    assert values["tierkv_serve_saved_seconds_total"] > 0
    command = [sys.executable, "-m", "tierkv", "top", "--once", "--url", running.url]
    shown = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    assert "2 requests" in shown


def test_a_taken_port_is_said_before_the_model_is_loaded(model_path: Path, start: Start) -> None:
    port = start().url.rpartition(":")[2]
    command = [sys.executable, "-m", "tierkv", "serve", str(model_path), "--port", port]
    failed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "Address already in use" in failed.stderr


def test_without_the_extra_the_command_says_what_to_install(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')")
    path = os.pathsep.join((str(tmp_path), ENVIRONMENT["PYTHONPATH"]))
    command = [sys.executable, "-m", "tierkv", "serve", str(model_path)]
    failed = subprocess.run(
        command, env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert "serving needs uvicorn (pip install 'tierkv[serve]')" in failed.stderr


def test_a_daemons_tiers_serve_as_the_own_ones(model_path: Path, tmp_path: Path) -> None:
    socket = tmp_path / "d" / "daemon.sock"
    daemon = [sys.executable, "-m", "tierkv", "daemon"]
    options = ["--socket", str(socket), "--store", str(tmp_path / "store"), "--warm", "32M", "--cold", "256M"]
    subprocess.run(
        [*daemon, "start", "--detach", "--min-free", "0", *options],
        env=ENVIRONMENT, check=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        answers = []
        for _ in range(2):
            with (
                running_server(model_path, tmp_path / "server", "--socket", str(socket)) as running,
                running.client() as client,
            ):
                answers.append(ask(client, model_path))
                assert running.stop() < 5
        assert [cached(answer) for answer in answers] == [0, answers[1].usage.prompt_tokens - 1]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    finally:
        subprocess.run([*daemon, "stop", "--socket", str(socket)], env=ENVIRONMENT, check=True, capture_output=True)


def test_the_log_has_start_refusals_and_stop_and_no_text_of_a_request(start: Start) -> None:
    name = f"tierkv-test-serve-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(60)
        running = start("--log-format", "json", NOTIFY_SOCKET=f"@{name}")
        assert manager.recv(4096).startswith(b"READY=1\n")
        with running.client() as client, pytest.raises(Exception, match=r"400|404"):
            client.completions.create(model="secret words", prompt="secret words", max_tokens=-1)
        running.stop()
        assert manager.recv(4096) == b"STOPPING=1"
    text = running.log.read_text()
    serving, *rest = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert serving["msg"] == "serving" and serving["address"] == running.url and serving["pid"] == running.pid
    (refused,) = (each for each in rest if each["msg"] == "refused")
    assert refused["level"] == "warning" and refused["path"] == "/v1/completions" and refused["status"] in (400, 404)
    assert [each["msg"] for each in rest[-2:]] == ["stopping", "stopped"] and rest[-2]["uptime_s"] > 0
    assert "secret" not in text
