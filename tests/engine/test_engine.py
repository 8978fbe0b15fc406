"""The engine: requests at any time, from threads and event loops; each ends in its own way and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_requests import greedy, sampled, tokens

from tierkv.engine.engine import Engine
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.generation import GenerationOptions
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import BatchSampler
from tierkv.engine.token_stream import TokenStream
from tierkv.errors import CapacityError, ClosedError, ConfigError, QueueFullError

Open = Callable[..., Runner]
LONG = 3000  # more new tokens than a test has time for; the pool has room for them


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


class Held:
    """Holds the engine's passes until `go`, so that a test decides what it finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.batches: list[list[int]] = []
        run = ForwardPass.run

        def wait_and_run(pass_: ForwardPass, steps: list[Any], ids: list[int]) -> Any:
            assert self.go.wait(60)
            self.batches.append([step.num_new for step in steps])
            return run(pass_, steps, ids)

        monkeypatch.setattr(ForwardPass, "run", wait_and_run)


def test_answers_are_those_of_the_runner_whatever_else_runs(open_one: Open) -> None:
    runner = open_one()
    shared = tokens(40)
    prompts = [[*shared, *tokens(i % 5 + 1, seed=i)] for i in range(12)] + [tokens(7, seed=50), tokens(33, seed=51)]
    plain = [runner.generate([each], greedy(12, use_cache=False))[0].token_ids for each in prompts]
    seeded = [runner.generate([each], sampled(12, use_cache=False))[0].token_ids for each in prompts]
    with Engine(runner, decode_step_tokens=20) as engine:
        streams = [(engine.submit(p, greedy(12)), engine.submit(p, sampled(12))) for p in prompts]
        assert [a.result().token_ids for a, _ in streams] == plain
        assert [b.result().token_ids for _, b in streams] == seeded
        stats = engine.stats()
        assert stats.finished >= 28 and stats.running == stats.waiting == 0
        assert stats.cached_tokens > 10 * 32


def test_a_first_token_is_delivered_before_the_next_pass_is_launched(
    open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_one(hot=300)
    held = Held(monkeypatch)
    held.go.set()
    with Engine(runner) as engine:
        first = engine.submit(tokens(9), greedy(LONG))
        next(first)
        run = ForwardPass.run

        def hold_the_next(pass_: ForwardPass, steps: list[Any], ids: list[int]) -> Any:
            logits = run(pass_, steps, ids)
            if any(step.num_new > 1 for step in steps):
                held.go.clear()  # of the pass after this one, which decodes
            return logits

        monkeypatch.setattr(ForwardPass, "run", hold_the_next)
        second = engine.submit(tokens(9, seed=2), greedy(4))
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(next(second)))
        reader.start()
        reader.join(10)
        held.go.set()
        assert got, "its reader waits for a pass that it does not need"
        reader.join()
        first.cancel()


def test_a_request_runs_beside_those_that_came_before_it(open_one: Open) -> None:
    runner = open_one(hot=300)
    with Engine(runner) as engine:
        first = engine.submit(tokens(9), greedy(LONG))
        got = [next(first).token_id for _ in range(3)]
        second = engine.submit(tokens(9, seed=2), greedy(4)).result()
        assert first.finish_reason is None, "it goes on meanwhile"
        first.cancel()
        got += [event.token_id for event in first]
        assert first.finish_reason == "cancelled" and len(got) < LONG
        assert got == first.result().token_ids
    assert second.token_ids == runner.generate([tokens(9, seed=2)], greedy(4))[0].token_ids
    assert runner.generate([tokens(9)], greedy(len(got)))[0].token_ids == got


def test_events_say_how_a_request_ends(open_one: Open) -> None:
    runner = open_one()
    (free,) = runner.generate([tokens(9)], greedy(6))
    stop = GenerationOptions(max_new_tokens=6, stop_ids=frozenset({free.token_ids[3]}))
    with Engine(runner) as engine:
        for options, reason in ((greedy(6), "length"), (stop, "stop")):
            events = list(engine.submit(tokens(9), options))
            assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].is_last and events[-1].finish_reason == reason
            assert [event.token_id for event in events] == free.token_ids[: len(events)]


def test_log_probabilities_come_with_the_tokens(open_one: Open) -> None:
    runner = open_one()
    options = greedy(3, sampling=sampled(1).sampling.__class__(top_logprobs=2))
    with Engine(runner) as engine:
        stream = engine.submit(tokens(9), options)
        events = list(stream)
        result = stream.result()
    assert result.logprobs == [event.logprob for event in events]
    assert result.top_logprobs == [event.top_logprobs for event in events]
    assert all(len(event.top_logprobs) == 2 and event.top_logprobs[0][0] == event.token_id for event in events)


def test_tasks_of_an_event_loop_read_streams(open_one: Open) -> None:
    runner = open_one()
    prompts = [tokens(9, seed=i) for i in range(8)]
    want = [g.token_ids for g in runner.generate(prompts, greedy(10))]

    async def read(engine: Engine, prompt: list[int], how: str) -> list[int]:
        stream = engine.submit(prompt, greedy(10))
        if how == "wait":
            return (await stream.wait()).token_ids
        return [event.token_id async for event in stream]

    async def main(engine: Engine, how: str) -> list[list[int]]:
        return await asyncio.gather(*(read(engine, prompt, how) for prompt in prompts))

    with Engine(runner) as engine:
        assert asyncio.run(main(engine, "iterate")) == want
        assert asyncio.run(main(engine, "wait")) == want


@pytest.mark.parametrize("how", ["close", "with", "cancel", "drop", "drop async", "break", "cancelled task"])
def test_a_reader_that_leaves_ends_its_request(open_one: Open, how: str) -> None:
    runner = open_one(hot=300)
    with Engine(runner) as engine:
        if how in ("drop async", "break", "cancelled task"):
            kept = asyncio.run(_leave_async(engine, how))
            assert (kept is None) == (how == "drop async")
        else:
            stream = engine.submit(tokens(9), greedy(LONG))
            next(stream)
            if how == "with":
                with stream:
                    pass
            elif how == "drop":
                del stream
            else:
                (stream.close if how == "close" else stream.cancel)()
        gc.collect()
        until(lambda: engine.stats().cancelled == 1)
        assert engine.stats().running == 0
        assert engine.stats().new_tokens < LONG


async def _leave_async(engine: Engine, how: str) -> TokenStream | None:
    """Leave the iteration; the stream itself is returned and so kept, unless it is dropped too."""
    stream: TokenStream | None = engine.submit(tokens(9), greedy(LONG))
    assert stream is not None
    if how == "break":
        async for _ in stream:
            break
    elif how == "drop async":
        events = stream.__aiter__()
        await events.__anext__()
        stream = events = None  # type: ignore[assignment]
    else:

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del read, task
    await asyncio.sleep(0.05)
    return stream


def test_an_event_loop_that_is_gone_ends_the_requests_of_its_readers(open_one: Open) -> None:
    runner = open_one(hot=300)
    with Engine(runner) as engine:
        streams = []

        async def start() -> None:
            streams.append(engine.submit(tokens(9), greedy(LONG)))
            task = asyncio.ensure_future(streams[0].wait())
            await asyncio.sleep(0.05)
            loop = asyncio.get_running_loop()
            task.cancel = lambda *_: False  # type: ignore[method-assign]  # a loop that ends without a word
            loop.call_soon(loop.stop)
            await asyncio.sleep(60)

        loop = asyncio.new_event_loop()
        main = loop.create_task(start())
        loop.run_forever()
        wakeup = streams[0]._progress.wakeup
        wakeup._future = loop, loop.create_future()  # as of a reader that wants its next token
        streams[0]._progress._skips_tokens = False
        loop.close()
        until(lambda: engine.stats().cancelled == 1)
        for task in (main, *asyncio.all_tasks(loop)):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        assert engine.submit(tokens(9), greedy(2)).result().finish_reason == "length"


def test_a_bad_request_is_refused_at_once_and_the_others_go_on(open_one: Open) -> None:
    runner = open_one(hot=20)
    with Engine(runner) as engine:
        good = engine.submit(tokens(9), greedy(12))
        for bad, kind in (([], ConfigError), ([1 << 20], ConfigError), (tokens(21 * 16), CapacityError)):
            with pytest.raises(kind):
                engine.submit(bad, greedy(2))
        for options in ({"priority": 1.5}, {"deadline_s": -1}, {"deadline_s": float("nan")}, {"number": -1}):
            with pytest.raises(ConfigError):
                engine.submit(tokens(9), greedy(2), **options)  # type: ignore[arg-type]
        assert len(good.result().token_ids) == 12


def test_a_request_whose_choice_fails_ends_alone_with_its_error(
    open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_one()
    (want,) = runner.generate([tokens(9)], sampled(12, use_cache=False))
    start = BatchSampler.start

    def fail_one(self: BatchSampler, logits: torch.Tensor, samplers: Any, **options: Any) -> Any:
        if any(each.options.seed == 666 and each.num_drawn == 3 for each in samplers):
            raise FloatingPointError("no choice")
        return start(self, logits, samplers, **options)

    monkeypatch.setattr(BatchSampler, "start", fail_one)
    with Engine(runner) as engine:
        good, bad = engine.submit(tokens(9), sampled(12)), engine.submit(tokens(9, seed=2), sampled(12, seed=666))
        assert good.result().token_ids == want.token_ids
        with pytest.raises(FloatingPointError):
            list(bad)
        with pytest.raises(FloatingPointError):
            bad.result()
        assert bad.finish_reason == "error" and engine.stats().failed == 1


def test_a_request_whose_reader_fails_ends_alone(open_one: Open) -> None:
    runner = open_one(hot=300)
    with Engine(runner) as engine:
        bad = engine.submit(tokens(9), greedy(LONG))
        bad._progress.put = _fail  # type: ignore[method-assign, assignment]
        good = engine.submit(tokens(9, seed=2), greedy(30))
        assert len(good.result().token_ids) == 30
        assert bad.result().finish_reason == "cancelled"


def _fail(*_: Any) -> None:
    raise ValueError("a reader's own fault")


def test_a_request_without_room_for_its_next_token_fails_alone(open_one: Open) -> None:
    runner = open_one(hot=8)
    held = runner.cache.acquire(tokens(5 * 16, seed=9))
    with Engine(runner) as engine:
        big = engine.submit(tokens(2 * 16), greedy(40))
        with pytest.raises(CapacityError):
            big.result()
        assert len(engine.submit(tokens(9), greedy(4)).result().token_ids) == 4
        runner.cache.release(held)
        assert len(engine.submit(tokens(2 * 16), greedy(40)).result().token_ids) == 40


def test_a_model_that_has_changed_ends_every_request_and_later_ones(
    open_one: Open, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_one(hot=300)
    with Engine(runner, max_running=2) as engine:
        streams = [engine.submit(tokens(9, seed=i), greedy(LONG)) for i in range(4)]
        next(streams[0])
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        for stream in streams:
            with pytest.raises(ConfigError, match="weights have changed"):
                stream.result()
        with pytest.raises(ConfigError, match="weights have changed"):
            engine.submit(tokens(9), greedy(2)).result()


def test_a_pass_that_fails_ends_its_requests_and_the_engine_goes_on(
    open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_one()
    (want,) = runner.generate([tokens(9)], greedy(4, use_cache=False))
    with Engine(runner) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(ForwardPass, "run", _fail)
            with pytest.raises(ValueError, match="own fault"):
                engine.submit(tokens(9), greedy(4)).result()
        assert engine.submit(tokens(9), greedy(4)).result().token_ids == want.token_ids


def test_a_request_ends_at_its_deadline_waiting_or_running(open_one: Open) -> None:
    runner = open_one(hot=300)
    with Engine(runner, max_running=1) as engine:
        running = engine.submit(tokens(9), greedy(LONG), deadline_s=0.5)
        waiting = engine.submit(tokens(9, seed=2), greedy(4), deadline_s=0.1)
        at_once = engine.submit(tokens(9, seed=3), greedy(4), deadline_s=0)
        result = waiting.result()
        assert result.finish_reason == "deadline" and result.token_ids == []
        assert at_once.result().finish_reason == "deadline"
        assert running.finish_reason is None
        got = [event.token_id for event in running]
        assert running.finish_reason == "deadline" and 0 < len(got) < LONG
        in_time = engine.submit(tokens(9, seed=3), greedy(4), deadline_s=60)
        assert in_time.result().finish_reason == "length"
        assert engine.stats().expired == 3
    assert got == runner.generate([tokens(9)], greedy(len(got)))[0].token_ids


def test_a_full_queue_refuses_and_takes_requests_again_later(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, held = open_one(), Held(monkeypatch)
    with Engine(runner, max_running=1, max_waiting=3) as engine:
        first = engine.submit(tokens(9), greedy(2))
        until(lambda: engine.stats().running == 1)
        streams = [engine.submit(tokens(9, seed=i), greedy(2)) for i in range(3)]
        with pytest.raises(QueueFullError, match="3 requests wait"):
            engine.submit(tokens(9), greedy(2))
        assert issubclass(QueueFullError, CapacityError) and engine.stats().rejected == 1
        streams[0].cancel()
        held.go.set()
        assert [len(each.result().token_ids) for each in (first, *streams)] == [2, 0, 2, 2]
        assert len(engine.submit(tokens(9), greedy(2)).result().token_ids) == 2


def test_urgent_requests_go_first(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, held = open_one(), Held(monkeypatch)
    ended: list[str] = []
    with Engine(runner, max_running=1) as engine:
        first = engine.submit(tokens(9), greedy(2))
        until(lambda: engine.stats().running == 1)
        later = {
            name: engine.submit(tokens(9, seed=i), greedy(2), priority=priority)
            for i, (name, priority) in enumerate((("low", 5), ("normal", 0), ("high", -1)))
        }

        def wait(name: str) -> None:
            later[name].result()
            ended.append(name)

        held.go.set()
        first.result()
        results = [later[name].result() for name in later]
        order = sorted(later, key=lambda name: later[name]._request.last_token_at)
    assert len(results) == 3 and order == ["high", "normal", "low"]


def test_a_step_beside_decoding_sequences_has_a_bounded_part_of_prompts(
    open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, held = open_one(hot=300, max_step_tokens=64), Held(monkeypatch)
    held.go.set()
    with Engine(runner, decode_step_tokens=10) as engine:
        decoding = [engine.submit(tokens(5, seed=i), greedy(LONG)) for i in range(3)]
        for stream in decoding:
            next(stream)
        held.batches.clear()
        engine.submit(tokens(100, seed=9), greedy(1)).result()
        beside = [batch for batch in held.batches if max(batch) > 1]
        assert len(beside) >= 10
        assert all(batch[:3] == [1, 1, 1] and sum(batch) <= 13 for batch in beside)
        for stream in decoding:
            stream.close()
    stream = runner.stream([tokens(5)], greedy(30))
    next(stream)
    held.batches.clear()
    runner.generate([tokens(100, seed=10)], greedy(1))
    assert held.batches == [[1, 63], [1, 37]], "after the engine: as much as a step takes"
    stream.close()


def test_a_prefix_that_an_engine_computes_is_not_computed_by_the_runner(open_one: Open) -> None:
    runner = open_one(max_step_tokens=16)
    shared = tokens(100)
    want = [runner.generate([[*shared, i]], greedy(3, use_cache=False))[0].token_ids for i in range(4)]
    with Engine(runner) as engine:
        before = engine.stats().computed_tokens
        streams = [engine.submit([*shared, i], greedy(3)) for i in range(2)]
        answers = runner.generate([[*shared, i] for i in (2, 3)], greedy(3))
        assert [each.result().token_ids for each in streams] + [each.token_ids for each in answers] == want
        assert engine.stats().computed_tokens - before == 100 + 4 + 4 * 2


def test_runner_calls_go_through_an_open_engine_and_outlive_it(open_one: Open) -> None:
    runner = open_one(hot=300)
    (want,) = runner.generate([tokens(9)], greedy(40))
    engine = Engine(runner)
    stream = runner.stream([tokens(9)], greedy(40))
    got = [next(stream).token_id]
    assert runner.prefill(tokens(50, seed=4)) == 50
    engine.close()
    got += [event.token_id for event in stream]
    assert got == want.token_ids
    assert runner.generate([tokens(9)], greedy(40))[0].token_ids == want.token_ids


def test_a_runner_has_one_engine_at_a_time(open_one: Open) -> None:
    runner = open_one()
    with Engine(runner), pytest.raises(ConfigError, match="engine already"):
        Engine(runner)
    with Engine(runner) as engine:
        assert engine.submit(tokens(9), greedy(2)).result()
    for bad in ({"max_running": 0}, {"max_waiting": -1}, {"decode_step_tokens": 1.5}):
        with pytest.raises(ConfigError):
            Engine(runner, **bad)  # type: ignore[arg-type]


def test_closing_ends_requests_within_its_bound_and_takes_no_more(open_one: Open) -> None:
    runner = open_one(hot=300)
    engine = Engine(runner, max_running=1)
    running, waiting = engine.submit(tokens(9), greedy(LONG)), engine.submit(tokens(9, seed=2), greedy(2))
    next(running)
    started = time.monotonic()
    engine.close(wait_s=0.3)
    assert 0.25 < time.monotonic() - started < 5
    assert running.result().finish_reason == waiting.result().finish_reason == "shutdown"
    assert 0 < len(running.result().token_ids) < LONG and waiting.result().token_ids == []
    with pytest.raises(ClosedError):
        engine.submit(tokens(9), greedy(2))
    engine.close()
    assert not any(thread.name == "tierkv-engine" for thread in threading.enumerate())


def test_closing_lets_what_has_started_end(open_one: Open) -> None:
    runner = open_one()
    engine = Engine(runner, max_running=1)
    stream, waiting = engine.submit(tokens(9), greedy(20)), engine.submit(tokens(9, seed=2), greedy(20))
    next(stream)
    engine.close(wait_s=60)
    assert len(stream.result().token_ids) == 20 and stream.finish_reason == "length"
    assert waiting.result().finish_reason == "shutdown" and waiting.result().token_ids == []


def test_a_step_that_hangs_does_not_hold_the_readers(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, held = open_one(), Held(monkeypatch)
    monkeypatch.setattr("tierkv.engine.engine._LAST_STEP_S", 0.2)
    engine = Engine(runner)
    stream = engine.submit(tokens(9), greedy(2))
    until(lambda: engine.stats().running == 1)
    engine.close(wait_s=0.1)
    with pytest.raises(ClosedError, match="did not end"):
        stream.result()
    held.go.set()
    engine._thread.join(60)
    assert not engine._thread.is_alive()


def test_closing_the_cache_ends_every_stream(open_one: Open) -> None:
    runner = open_one(hot=300)
    engine = Engine(runner)
    stream = engine.submit(tokens(9), greedy(LONG))
    next(stream)
    runner.cache.close()
    with pytest.raises(ClosedError):
        list(stream)
    engine.close()
    with pytest.raises(ClosedError):
        engine.submit(tokens(9), greedy(2))


def test_a_stream_has_one_reader_at_a_time(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, held = open_one(), Held(monkeypatch)
    with Engine(runner) as engine:
        stream = engine.submit(tokens(9), greedy(2))
        reader = threading.Thread(target=stream.result)
        reader.start()
        until(lambda: stream._progress.wakeup._is_reading)
        with pytest.raises(ConfigError, match="one reader"):
            next(stream)
        held.go.set()
        reader.join()
        assert len(list(stream)) == 2


def test_threads_submit_and_read_together(open_one: Open) -> None:
    runner = open_one()
    prompts = [tokens(i % 30 + 1, seed=i) for i in range(24)]
    want = [runner.generate([each], sampled(8, use_cache=False))[0].token_ids for each in prompts]
    got: dict[int, list[int]] = {}
    with Engine(runner, max_running=5) as engine:

        def ask(number: int) -> None:
            got[number] = [event.token_id for event in engine.submit(prompts[number], sampled(8))]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [got[number] for number in range(24)] == want


def test_equal_prompts_with_one_seed_differ_by_their_number(open_one: Open) -> None:
    runner = open_one()
    want = [g.token_ids for g in runner.generate([tokens(9)] * 3, sampled(8))]
    with Engine(runner) as engine:
        streams = [engine.submit(tokens(9), sampled(8), number=n) for n in range(3)]
        assert [each.result().token_ids for each in streams] == want


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as Python says of threads
def test_a_forked_process_is_refused_and_waits_for_nothing(open_one: Open) -> None:
    runner = open_one(hot=300)
    with Engine(runner) as engine:
        stream = engine.submit(tokens(9), greedy(LONG))
        next(stream)

        def refused() -> str:
            names = []
            calls: dict[str, Callable[[], Any]] = {
                "submit": lambda: engine.submit(tokens(9), greedy(1)),
                "result": stream.result,
            }
            for name, call in calls.items():
                try:
                    call()
                except ClosedError:
                    names.append(name)
            engine.close()
            return " ".join(names)

        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, refused().encode())
            os._exit(0)
        is_done = bool(select.select([read], [], [], 20)[0])
        said = os.read(read, 1000).decode() if is_done else "it hangs"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for each in (read, write):
            os.close(each)
        assert said == "submit result"
        stream.close()
