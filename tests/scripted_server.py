"""A server in this process whose engine says what a test wants, so that a test decides the model's words and faults."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from transformers import AutoTokenizer

from tierkv.config import CacheConfig
from tierkv.engine.engine import EngineStats
from tierkv.engine.generation import Generation, GenerationOptions, TokenEvent
from tierkv.serving.app import make_app
from tierkv.serving.limits import ServeLimits
from tierkv.serving.server import bind, protocol_with
from tierkv.serving.service import Service
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace
from tierkv.values.stats import CacheStats

__all__ = ["ScriptedEngine", "scripted_server"]

LAYOUT = BlockLayout.uniform(num_layers=1, block_size=16, kv_heads=1, head_dim=8, dtype="float32")


@dataclass
class ScriptedEngine:
    """Answers every prompt with `ids`; raises what `fault` holds, at submit or after `fault_after` tokens.

    gate: tokens from the second on wait for it.
    """

    ids: list[int] = field(default_factory=list)
    refusal: Exception | None = None
    fault: Exception | None = None
    fault_after: int = 0
    gate: threading.Event | None = None
    submitted: list[tuple[list[int], GenerationOptions, int, float | None, int]] = field(default_factory=list)
    closed: int = 0

    def submit(
        self,
        token_ids: Sequence[int],
        options: GenerationOptions,
        *,
        priority: int,
        deadline_s: float | None,
        number: int,
    ) -> _Stream:
        if self.refusal:
            raise self.refusal
        self.submitted.append((list(token_ids), options, priority, deadline_s, number))
        return _Stream(self, list(token_ids), options)

    def stats(self) -> EngineStats:
        return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))

    def close(self, *, wait_s: float = 5.0) -> None:
        pass


class _Stream:
    def __init__(self, engine: ScriptedEngine, prompt: list[int], options: GenerationOptions) -> None:
        self._engine = engine
        self._prompt = prompt
        self._options = options
        self._sent: list[int] = []
        self._reason = "length"

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        script = self._engine.ids[: self._options.max_new_tokens]
        for at, token_id in enumerate(script):
            if self._reason == "cancelled":
                return
            if self._engine.fault and at == self._engine.fault_after:
                raise self._engine.fault
            while at and self._engine.gate and not self._engine.gate.is_set():
                await asyncio.sleep(0.01)
            self._sent.append(token_id)
            is_stop = token_id in (self._options.stop_ids or ())
            is_last = is_stop or at + 1 == len(script)
            self._reason = "stop" if is_stop else "length"
            logprob = None if self._options.sampling.top_logprobs is None else -0.5
            top = () if logprob is None else ((token_id, -0.5), (0, -3.0))
            yield TokenEvent(
                0,
                token_id,
                is_last,
                logprob=logprob,
                top_logprobs=top,
                finish_reason=self._reason if is_last else None,
            )
            if is_stop:
                return

    async def wait(self) -> Generation:
        return Generation(
            token_ids=self._sent,
            prompt_tokens=len(self._prompt),
            cached_tokens={Tier.WARM: 16},
            ttft_s=0.25,
            tokens_per_s=10.0,
            finish_reason=self._reason,
        )

    def cancel(self) -> None:
        self._reason = "cancelled"

    def close(self) -> None:
        self._engine.closed += 1


class _NoCache:
    """A cache that serves only its statistics."""

    config = CacheConfig()
    layout = LAYOUT
    namespace = Namespace(weights="scripted", layout=LAYOUT)
    hot = SimpleNamespace(num_blocks=256, layout=LAYOUT)

    def stats(self) -> CacheStats:
        return CacheStats()

    def add_observer(self, observer: object) -> None:
        pass

    def remove_observer(self, observer: object) -> None:
        pass


def _runner(model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = SimpleNamespace(max_position_embeddings=4096, rope_parameters=None)
    fake = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: decoder_config(decoder)),
        generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id),
        get_input_embeddings=lambda: SimpleNamespace(num_embeddings=len(tokenizer)),
    )

    def decoder_config(_: bool) -> Any:
        return decoder

    return SimpleNamespace(loaded=SimpleNamespace(tokenizer=tokenizer, model=fake), cache=_NoCache())


@contextmanager
def scripted_server(
    model: Path, engine: Any, *, template: str | None = None, limits: ServeLimits | None = None, **options: Any
) -> Iterator[tuple[str, Service]]:
    """Serve on a thread until the block ends; yield the URL, and the service."""
    limits = limits or ServeLimits()
    runner = _runner(model)
    if template is not None:
        runner.loaded.tokenizer.chat_template = template
    bound = bind("127.0.0.1", 0)
    ready = threading.Event()
    made: list[Any] = []

    async def run() -> None:
        service = Service(runner, engine, name="scripted", limits=limits)
        config = uvicorn.Config(
            make_app(service, **options),
            http=protocol_with(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        service.loop = asyncio.get_running_loop()  # type: ignore[attr-defined]  # for tests that count tasks
        made.extend([service, server])
        ready.set()
        await server.serve(sockets=[bound])
        service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        ready.wait(30)
        host, port = bound.getsockname()
        _wait_listening(host, port)
        yield f"http://{host}:{port}", made[0]
    finally:
        made[1].should_exit = True
        thread.join(30)


def _wait_listening(host: str, port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
