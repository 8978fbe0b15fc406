"""Two hundred readers, threads and tasks, that stay or leave as they like: nothing is left of any of them.

TIERKV_STREAMS_S: how many seconds it runs; a few in continuous integration.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_requests import greedy, sampled, tokens

from tierkv.engine.engine import Engine
from tierkv.engine.generation import GenerationOptions
from tierkv.engine.runner import Runner

Open = Callable[..., Runner]
SECONDS = float(os.environ.get("TIERKV_STREAMS_S", "4"))
NUM_TASKS, NUM_THREADS = 150, 50


class Readers:
    """Requests of a few kinds, and what each must answer."""

    def __init__(self, engine: Engine, answers: dict[int, list[int]], prompts: list[list[int]]) -> None:
        self.engine = engine
        self.answers = answers
        self.prompts = prompts
        self.ends = time.monotonic() + SECONDS
        self.num_whole = self.num_left = 0
        self.faults: list[str] = []
        self.open_tasks: set[Any] = set()
        self.early_bytes: int | None = None

    def submit(self, random_: random.Random) -> tuple[int, Any]:
        number = random_.randrange(len(self.prompts))
        deadline_s = random_.choice((None, None, None, 0.01, 5.0))
        stream = self.engine.submit(
            self.prompts[number], options_of(number), priority=random_.randrange(3), deadline_s=deadline_s
        )
        return number, stream

    def note(self, number: int, got: list[int], reason: str | None, *, is_whole: bool) -> None:
        want = self.answers[number]
        if got != (want if is_whole else want[: len(got)]):
            self.faults.append(f"request {number}: {got} for {want}, {reason}")
        self.num_whole += is_whole
        self.num_left += not is_whole

    def in_thread(self, seed: int) -> None:
        random_ = random.Random(seed)
        while time.monotonic() < self.ends:
            number, stream = self.submit(random_)
            leaves_after = random_.choice((None, None, 0, 1, 7))
            got: list[int] = []
            for event in stream:
                got.append(event.token_id)
                if leaves_after is not None and len(got) > leaves_after:
                    break
            reason = stream.finish_reason
            self.note(number, got, reason, is_whole=reason in ("stop", "length") and leaves_after is None)
            if random_.random() < 0.5:
                stream.close()  # else it is dropped

    async def in_task(self, seed: int) -> None:
        random_ = random.Random(seed)
        while time.monotonic() < self.ends:
            number, stream = self.submit(random_)
            got: list[int] = []

            async def read(stream: Any = stream, got: list[int] = got) -> None:
                async for event in stream:
                    got.append(event.token_id)

            task = asyncio.create_task(read())
            if random_.random() < 0.4:  # a client that vanishes
                await asyncio.sleep(random_.random() * 0.2)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            is_whole = not task.cancelled() and stream.finish_reason in ("stop", "length")
            self.note(number, got, stream.finish_reason, is_whole=is_whole)

    async def all_tasks(self) -> None:
        tasks = [asyncio.create_task(self.in_task(seed)) for seed in range(NUM_TASKS)]
        if SECONDS >= 60:
            await asyncio.sleep(SECONDS / 3)
            self.early_bytes = resident_bytes()
        await asyncio.gather(*tasks)
        self.open_tasks = asyncio.all_tasks() - {asyncio.current_task()}


def options_of(number: int) -> GenerationOptions:
    count = number % 7 * 4 + 1
    whole = {"store_partial": False}  # with partial blocks fewer tokens are computed, and no request is preempted
    return greedy(count, **whole) if number % 2 else sampled(count, seed=number, **whole)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


def test_nothing_is_left_of_readers_that_come_and_go(open_one: Open) -> None:
    runner = open_one(hot=20, warm=80)
    shared = tokens(40)
    prompts = [[*shared[: i % 3 * 20], *tokens(i % 9 + 1, seed=i)] for i in range(24)]
    answers = {
        i: runner.generate([each], GenerationOptions(**_fields(options_of(i)), use_cache=False))[0].token_ids
        for i, each in enumerate(prompts)
    }
    runner.generate(prompts, greedy(4))
    threads_before, files_before = threading.active_count(), open_files()
    with Engine(runner, max_running=32, decode_step_tokens=48) as engine:
        readers = Readers(engine, answers, prompts)
        threads = [threading.Thread(target=readers.in_thread, args=(1000 + i,)) for i in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        asyncio.run(readers.all_tasks())
        for thread in threads:
            thread.join()
        stats = engine.stats()
    assert not readers.faults, readers.faults[:3]
    assert readers.num_whole > 50 and readers.num_left > 50
    assert stats.cancelled and stats.finished and stats.preempted
    assert not readers.open_tasks
    if readers.early_bytes is not None:
        assert resident_bytes() < readers.early_bytes + (32 << 20)
    del readers, threads
    gc.collect()
    assert threading.active_count() == threads_before
    assert open_files() <= files_before + 2  # the store may read ahead
    assert not runner.step_loop.open_requests() and not runner.step_loop.scheduler.has_work


def _fields(options: GenerationOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_new_tokens", "stop_ids", "sampling")}
