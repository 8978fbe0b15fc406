"""What the official client gets where the model calls tools, and where the engine fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedEngine, scripted_server
from transformers import AutoTokenizer

from tierkv.errors import CapacityError, ClosedError, ConfigError, QueueFullError, StoreError
from tierkv.serving.limits import ServeLimits

openai = pytest.importorskip("openai")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
USER: list[Any] = [{"role": "user", "content": "What is 1 and 2?"}]
CALL = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
Serve = Callable[..., Any]


@pytest.fixture
def serve(model_path: Path) -> Iterator[Serve]:
    """Return a function that starts a scripted server and returns its client."""
    with ExitStack() as stack:

        def start(engine: ScriptedEngine, **options: Any) -> Any:
            url, service = stack.enter_context(scripted_server(model_path, engine, **options))
            client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=30))
            client.service = service
            return client

        yield start


@pytest.fixture
def ids(model_path: Path) -> Callable[[str], list[int]]:
    """Return a function that makes tokens of a text."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return lambda text: list(tokenizer.encode(text))


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "scripted", "messages": USER, **options})


def idle(client: Any) -> bool:
    """Wait until the server answers nothing any more."""
    deadline = time.monotonic() + 10
    while client.service.num_active and time.monotonic() < deadline:
        time.sleep(0.01)
    return not client.service.num_active


def test_a_call_of_a_tool_arrives_as_one(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    answer = ask(serve(ScriptedEngine(ids(CALL))), tools=TOOLS)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "I add.\n"
    assert message.tool_calls[0].function.name == "add"
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 1, "b": 2}


def test_a_streamed_call_arrives_whole_behind_its_text(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    client = serve(ScriptedEngine(ids(CALL)))
    chunks = list(ask(client, tools=TOOLS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "I add.\n"
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_a_call_goes_back_to_the_template(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    engine = ScriptedEngine(ids(CALL))
    client = serve(engine)
    answer = ask(client, tools=TOOLS)
    call = answer.choices[0].message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    engine.ids = ids("It is 3.")
    again = ask(client, messages=[*USER, answer.choices[0].message, result], tools=TOOLS)
    assert again.choices[0].message.content == "It is 3."
    text = client.service._tokenizer.decode(engine.submitted[-1][0])
    assert '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text
    assert json.dumps(TOOLS[0]) in text, "the tool as the client wrote it, in its order of keys"


def test_tool_choice_none_hides_the_tools(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    engine = ScriptedEngine(ids(CALL))
    client = serve(engine)
    answer = ask(client, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None
    assert "add" not in client.service._tokenizer.decode(engine.submitted[-1][0])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "add", "strict": True}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "add", "parameters": [1]}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"functions": [{"name": "add"}]}, "functions"),
    ],
)
def test_what_only_a_grammar_could_ensure_is_refused(serve: Serve, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(serve(ScriptedEngine()), **options)
    assert refused.value.param == param


def test_tools_are_refused_where_the_template_has_none(serve: Serve) -> None:
    client = serve(ScriptedEngine(), template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(openai.BadRequestError, match="chat template has none"):
        ask(client, tools=TOOLS)


def test_a_template_that_raises_is_the_clients_error(serve: Serve) -> None:
    client = serve(ScriptedEngine(), template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        ask(client)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (QueueFullError("1,024 requests wait"), 429, "1,024 requests wait"),
        (CapacityError("never fits"), 400, "never fits"),
        (ConfigError("what"), 400, "what"),
        (ClosedError("closed"), 503, "shutting down"),
    ],
)
def test_what_the_engine_refuses_has_its_status(serve: Serve, error: Exception, status: int, text: str) -> None:
    client = serve(ScriptedEngine(refusal=error))
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=text) as refused:
            ask(client, stream=stream)
        assert refused.value.status_code == status
        assert ("retry-after" in refused.value.response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("the model has changed"), "the model has changed"),
        (StoreError("disk"), "disk"),
        (RuntimeError("secret details"), "its log says why"),
    ],
)
def test_a_failure_while_computing_is_a_500_without_details(
    serve: Serve, ids: Callable[[str], list[int]], error: Exception, text: str
) -> None:
    client = serve(ScriptedEngine(ids("abc"), fault=error, fault_after=2))
    with pytest.raises(openai.InternalServerError, match=text) as failed:
        ask(client)
    assert failed.value.status_code == 500
    assert "secret" not in failed.value.response.text
    with pytest.raises(openai.APIError, match=text):
        list(ask(client, stream=True))
    assert idle(client)


def test_a_stop_token_has_neither_text_nor_log_probability(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    client = serve(ScriptedEngine(ids("ab<|im_end|>")))
    answer = ask(client, logprobs=True, top_logprobs=1)
    assert answer.choices[0].finish_reason == "stop"
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["a", "b"]
    assert answer.usage.completion_tokens == 3


def test_log_probabilities_end_with_the_text_before_a_stop_string(
    serve: Serve, ids: Callable[[str], list[int]]
) -> None:
    engine = ScriptedEngine(ids("one END two"))
    answer = ask(serve(engine), stop="END", logprobs=True)
    assert answer.choices[0].message.content == "one "
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == "one "
    assert engine.closed == 1


def test_fields_reach_the_engine(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    engine = ScriptedEngine(ids("abcdef"))
    client = serve(engine, limits=ServeLimits(max_seconds=20, max_new_tokens=5))
    extra = {"priority": -3, "deadline_s": 2.5, "top_k": 7, "stop_token_ids": [3]}
    answer = ask(client, temperature=0.5, top_p=0.25, seed=9, n=2, extra_body=extra)
    assert [choice.message.content for choice in answer.choices] == ["abcde"] * 2
    (_, first, priority, deadline_s, _), (_, second, _, _, number) = engine.submitted
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (0.5, 0.25, 7)
    assert (first.sampling.seed, second.sampling.seed, number) == (9, 9, 1)
    assert (priority, deadline_s, first.max_new_tokens, first.store_partial) == (-3, 2.5, 5, True)
    assert first.stop_ids is not None and 3 in first.stop_ids and len(first.stop_ids) == 2
    ask(client, extra_body={"deadline_s": 100, "ignore_eos": True})
    assert engine.submitted[-1][3] == 20, "the server's limit is the longest deadline"
    assert engine.submitted[-1][1].stop_ids == frozenset()


def test_one_prompt_with_several_answers_counts_once(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    answer = ask(serve(ScriptedEngine(ids("abc"))), n=4)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_more_requests_than_the_limit_get_429_and_later_ones_are_answered(
    serve: Serve, ids: Callable[[str], list[int]]
) -> None:
    gate = threading.Event()
    client = serve(ScriptedEngine(ids("abc"), gate=gate), limits=ServeLimits(max_requests=2))
    streams = [ask(client, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client)
    assert refused.value.response.headers["retry-after"] == "1"
    gate.set()
    assert all(list(stream)[-1].choices[0].finish_reason == "length" for stream in streams)
    assert ask(client).choices[0].message.content == "abc"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_cancels_all_its_answers(
    serve: Serve, ids: Callable[[str], list[int]], stream: bool, n: int
) -> None:
    gate = threading.Event()
    engine = ScriptedEngine(ids("abc"), gate=gate)
    client = serve(engine)
    if stream:
        next(iter(opened := ask(client, stream=True, n=n)))
        opened.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), n=n)
    assert idle(client)
    assert engine.closed == n
    assert client.service.monitor.outcomes["cancelled"] == n
    gate.set()


def test_a_stopping_server_refuses_new_requests_and_says_so(serve: Serve, ids: Callable[[str], list[int]]) -> None:
    import urllib.error
    import urllib.request

    gate = threading.Event()
    client = serve(ScriptedEngine(ids("abc"), gate=gate))
    running = ask(client, stream=True)
    client.service.is_stopping = True
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        ask(client)
    assert refused.value.status_code == 503
    with pytest.raises(urllib.error.HTTPError) as health:
        urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health"), timeout=10)
    assert health.value.code == 503
    health.value.close()
    gate.set()
    assert list(running)[-1].choices[0].finish_reason == "length"
