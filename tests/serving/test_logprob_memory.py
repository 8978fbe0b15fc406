"""Log-probabilities take the memory that is counted for them, and no more than the limit together."""

from __future__ import annotations

import random
import tracemalloc
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pytest
from serve_process import Start

from tierkv.serving import chat
from tierkv.serving.answers import TokenLogprob
from tierkv.serving.api_errors import ApiError
from tierkv.serving.logprob_memory import LogprobMemory
from tierkv.serving.responses import json_bytes

NUM_TOKENS = 500
TEXTS = SimpleNamespace(text=lambda token: f" tok{token}", bytes=lambda token: list(f" tok{token}".encode()))
PLAN = SimpleNamespace(sampling=SimpleNamespace(top_logprobs=20))


def counted(num_tokens: int, top: int | None, *, is_stream: bool) -> int:
    memory = LogprobMemory(1 << 40)
    with memory.hold(num_tokens, top, is_stream=is_stream):
        return memory.used


@pytest.mark.parametrize("top", [0, 1, 20])
def test_an_answer_takes_the_memory_that_is_counted_for_it(top: int) -> None:
    draw = random.Random(0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tops = [tuple((draw.randrange(300, 1 << 17), draw.random()) for _ in range(top)) for _ in range(NUM_TOKENS)]
    tokens = [TokenLogprob(draw.randrange(300, 1 << 17), draw.random(), each) for each in tops]
    streamed = tracemalloc.get_traced_memory()[0] - before
    json_bytes({"logprobs": chat._logprobs(tokens, TEXTS, PLAN)})  # type: ignore[arg-type]
    whole = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert streamed == pytest.approx(counted(NUM_TOKENS, top, is_stream=True), rel=0.35)
    assert whole == pytest.approx(counted(NUM_TOKENS, top, is_stream=False), rel=0.35)


def test_answers_without_log_probabilities_take_none() -> None:
    assert counted(NUM_TOKENS, None, is_stream=False) == 0


def test_what_is_beyond_the_limit_alone_is_refused_and_what_is_beyond_it_with_others_may_come_again() -> None:
    memory = LogprobMemory(counted(10, 20, is_stream=False))
    with pytest.raises(ApiError) as alone, memory.hold(11, 20, is_stream=False):
        pass
    assert alone.value.status == 400 and "11 tokens" in str(alone.value)
    with ExitStack() as stack:
        stack.enter_context(memory.hold(6, 20, is_stream=False))
        with pytest.raises(ApiError) as together, memory.hold(6, 20, is_stream=False):
            pass
        assert together.value.status == 429 and together.value.headers["Retry-After"]
        stack.enter_context(memory.hold(1 << 20, None, is_stream=False))
    assert memory.used == 0


def test_a_server_gives_the_memory_back_and_says_which_limit_a_request_is_beyond(start: Start) -> None:
    client = start("--max-logprob-memory", "100K").client()  # six tokens of 20
    model = client.models.list().data[0].id

    def chat_with(n: int) -> object:
        messages = [{"role": "user", "content": "hi"}]
        create = client.chat.completions.create
        return create(model=model, messages=messages, logprobs=True, top_logprobs=20, max_tokens=4, n=n)

    def complete(n: int) -> object:
        return client.completions.create(model=model, prompt="hi", logprobs=20, max_tokens=4, n=n)

    for ask in (chat_with, complete):
        for _ in range(3):
            ask(1)
        with pytest.raises(openai.BadRequestError, match="log-probabilities of 8 tokens"):
            ask(2)
