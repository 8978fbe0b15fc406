"""Many streams at once, some of which vanish: equal tokens to the engine alone, and nothing is left behind.

TIERKV_STREAMS_S: seconds that it takes, 10 by default. From 60 on, there are 200 streams at the same time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serve_process import Start, descriptors_of, resident_bytes, threads_of

from tierkv.config import CacheConfig
from tierkv.engine.models import load_model
from tierkv.engine.prompts import PromptRequest, render_tokens
from tierkv.engine.runner import GenerationOptions, open_runner
from tierkv.engine.sampling import SamplingOptions

openai = pytest.importorskip("openai")

SECONDS = float(os.environ.get("TIERKV_STREAMS_S", "10"))
STREAMS = 200 if SECONDS >= 60 else 24
SYSTEMS = ("You answer in rhymes, and never twice the same. " * 3, "Be brief. ", "")
MOST = 96
HOT_TOKENS = 2048  # far less than all streams need: requests are preempted


@dataclass(frozen=True)
class Case:
    """One request, and the tokens that the engine alone generates for it."""

    messages: tuple[tuple[str, str], ...]
    seed: int | None
    token_ids: tuple[int, ...]


def make_cases(model_path: Path) -> tuple[list[Case], Any]:
    loaded = load_model(str(model_path), device="cpu")
    cases = []
    with open_runner(loaded, CacheConfig(block_size=16, hot_bytes=32 << 20, warm_bytes=1 << 20)) as runner:
        for at, system in enumerate(SYSTEMS):
            for question in range(8):
                text = f"Question {question} about {'cats' * (question + at)}?"
                tokens = render_tokens(loaded.tokenizer, PromptRequest(system=system), text)
                for seed in (None, 11):
                    sampling = SamplingOptions(temperature=0.0 if seed is None else 1.0, seed=seed)
                    options = GenerationOptions(max_new_tokens=MOST, sampling=sampling, use_cache=False)
                    (answer,) = runner.generate([tokens], options)
                    messages = (("system", system), ("user", text)) if system else (("user", text),)
                    cases.append(Case(messages, seed, tuple(answer.token_ids)))
    return cases, loaded.tokenizer


class Client:
    """Asks at random until the time is over, and compares."""

    def __init__(self, client: Any, name: str, cases: list[Case], tokenizer: Any, seed: int) -> None:
        self.client = client
        self.name = name
        self.cases = cases
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.done = dict.fromkeys(("whole", "streamed", "stopped", "vanished"), 0)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            await self.ask(self.random.choice(self.cases), self.random.choice([*self.done]))

    async def ask(self, case: Case, kind: str) -> None:
        count = self.random.randint(1, MOST)
        text = self.tokenizer.decode(case.token_ids[:count], skip_special_tokens=True)
        stop = None
        if kind == "stopped" and len(text) > 6:
            begin = self.random.randrange(3, len(text) - 2)
            stop = text[begin : begin + 2]
            text = text[: text.index(stop)]
        options = {
            "model": self.name,
            "messages": [{"role": role, "content": content} for role, content in case.messages],
            "max_tokens": count,
            "temperature": 0 if case.seed is None else 1,
            "seed": case.seed,
            "stop": stop,
            "extra_body": {"priority": self.random.randint(-1, 1)},
        }
        if kind == "whole":
            answer = await self.client.chat.completions.create(**options)
            got = answer.choices[0].message.content
        else:
            got = ""
            left = self.random.randint(0, 20) if kind == "vanished" else -1
            stream = await self.client.chat.completions.create(stream=True, **options)
            async for chunk in stream:
                got += chunk.choices[0].delta.content or ""
                left -= 1
                if left == 0:
                    await stream.close()
                    break
            if left == 0:
                assert text.startswith(got), (case, text, got)
                text = got
        assert got == text, (kind, case, stop)
        self.done[kind] += 1


async def run_clients(url: str, name: str, cases: list[Case], tokenizer: Any, seconds: float) -> list[Client]:
    until = time.monotonic() + seconds
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        clients = [Client(client, name, cases, tokenizer, seed) for seed in range(STREAMS)]
        await asyncio.gather(*(each.run(until) for each in clients))
    return clients


def status_of(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/status", timeout=60) as answer:
        return json.loads(answer.read())


def wait_idle(url: str) -> Any:
    deadline = time.monotonic() + 60
    while True:
        status = status_of(url)
        serving = status["serving"]
        if not serving["active"] and not serving["engine"]["running"] and not serving["engine"]["waiting"]:
            return status
        assert time.monotonic() < deadline, serving
        time.sleep(0.1)


def test_many_streams_of_which_some_vanish_leave_nothing_behind(start: Start, model_path: Path) -> None:
    cases, tokenizer = make_cases(model_path)
    block_bytes = 16 * 2 * 2 * 64 * 4  # 16 tokens, 2 layers, K and V, a head of 64 float32
    hot = f"{HOT_TOKENS // 16 * block_bytes // 1024}K"
    server = start("--hot", hot, "--served-name", "tiny")
    asyncio.run(run_clients(server.url, "tiny", cases, tokenizer, SECONDS * 0.3))
    wait_idle(server.url)
    time.sleep(1)
    before = (descriptors_of(server.pid), threads_of(server.pid))
    memory = resident_bytes(server.pid)
    clients = asyncio.run(run_clients(server.url, "tiny", cases, tokenizer, SECONDS * 0.7))
    status = wait_idle(server.url)
    time.sleep(1)
    done = {kind: sum(client.done[kind] for client in clients) for kind in clients[0].done}
    print(done, {name: status["serving"]["engine"][name] for name in ("preempted", "finished", "cancelled", "failed")})
    assert min(done.values()) > 0
    assert status["serving"]["engine"]["failed"] == 0
    assert status["serving"]["engine"]["cancelled"] > 0
    assert set(status["serving"]["statuses"]) == {"200"}
    after = (descriptors_of(server.pid), threads_of(server.pid))
    growth = resident_bytes(server.pid) - memory
    print(f"descriptors and threads {before} -> {after}, memory {memory >> 20} MiB + {growth / (1 << 20):.1f}")
    assert after[0] <= before[0] + 2 and after[1] <= before[1] + 1
    assert growth < 48 << 20
    # A block that is still pinned would leave no room for a prompt as long as the pool.
    with server.client() as client:
        prompt = [7] * (HOT_TOKENS - 32)
        assert client.completions.create(model="tiny", prompt=prompt, max_tokens=16).choices[0].finish_reason
        if SECONDS >= 60:
            running = [
                client.completions.create(model="tiny", prompt="x", max_tokens=1500, stream=True) for _ in range(50)
            ]
            assert len(running) == 50
        assert server.stop() < 5
    assert server.process.returncode == 0
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
