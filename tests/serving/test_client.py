"""The official openai client over a real server process: what it gets is what the engine computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import ServerProcess

from tierkv.config import CacheConfig
from tierkv.engine.models import LoadedModel, load_model
from tierkv.engine.prompts import PromptRequest, render_tokens
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.sampling import SamplingOptions

openai = pytest.importorskip("openai")

QUESTION = "How do I reset my key?"
USER = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def name(model_path: Path) -> str:
    return str(model_path)


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LoadedModel:
    return load_model(str(model_path), device="cpu")


@pytest.fixture(scope="module")
def runner(loaded: LoadedModel) -> Iterator[Runner]:
    """Return the engine alone, without a server and without a store."""
    with open_runner(loaded, CacheConfig(block_size=16, hot_bytes=32 << 20, warm_bytes=16 << 20)) as runner:
        yield runner


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with server.client() as client:
        yield client


def expected(runner: Runner, text: str = QUESTION, count: int = 20, **sampling: Any) -> str:
    """Return what the engine alone answers."""
    tokens = render_tokens(runner.loaded.tokenizer, PromptRequest(), text)
    options = GenerationOptions(max_new_tokens=count, sampling=SamplingOptions(**sampling), use_cache=False)
    (answer,) = runner.generate([tokens], options)
    return str(runner.loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True))


def ask(client: Any, name: str, messages: Any = None, **options: Any) -> Any:
    options = {"max_tokens": 20, "temperature": 0, **options}
    return client.chat.completions.create(model=name, messages=messages or USER, **options)


def test_an_answer_has_the_tokens_of_the_engine_alone(client: Any, name: str, runner: Runner) -> None:
    answer = ask(client, name)
    assert answer.choices[0].message.content == expected(runner)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_brings_the_same_text_in_pieces(client: Any, name: str, runner: Runner) -> None:
    chunks = list(ask(client, name, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected(runner)
    assert sum(bool(text) for text in texts) > 5
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_gives_the_same_answer_again_and_other_answers_to_n(client: Any, name: str) -> None:
    first, second = (ask(client, name, temperature=1, seed=7, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    alone = ask(client, name, temperature=1, seed=7)
    assert alone.choices[0].message.content == texts[0]


def test_n_answers_stream_together(client: Any, name: str) -> None:
    whole = ask(client, name, temperature=1, seed=3, n=3)
    texts = ["", "", ""]
    for chunk in ask(client, name, temperature=1, seed=3, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_answer_before_it(client: Any, name: str, runner: Runner) -> None:
    text = expected(runner)
    stop = text[8:11]
    answer = ask(client, name, stop=[stop, "never there"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, name, stop=stop, stream=True))
    assert streamed == text[: text.index(stop)]


def test_a_stop_token_ends_the_answer_and_has_no_text(client: Any, name: str, runner: Runner) -> None:
    text = expected(runner)
    (token_id,) = runner.loaded.tokenizer.encode(text[5])
    answer = ask(client, name, extra_body={"stop_token_ids": [token_id]})
    assert answer.choices[0].message.content == text[: text.index(text[5])]
    assert answer.choices[0].stop_reason == token_id


def test_log_probabilities_are_those_of_the_model(client: Any, name: str, runner: Runner) -> None:
    import torch

    answer = ask(client, name, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    tokens = render_tokens(runner.loaded.tokenizer, PromptRequest(), QUESTION)
    options = GenerationOptions(max_new_tokens=20, use_cache=False, keep_logits=True)
    (plain,) = runner.generate([tokens], options)
    assert plain.logits is not None
    logprobs = torch.log_softmax(plain.logits.double(), -1)
    for entry, token_id, row in zip(entries, plain.token_ids, logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        assert entry.bytes == list(entry.token.encode())
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    streamed = [
        entry
        for chunk in ask(client, name, logprobs=True, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_completions_take_texts_and_token_ids(client: Any, name: str, runner: Runner) -> None:
    tokenizer = runner.loaded.tokenizer
    prompts = ["once upon", "a time"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    plain = runner.generate(ids, GenerationOptions(max_new_tokens=6, use_cache=False))
    want = [tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in plain]
    options = {"model": name, "max_tokens": 6, "temperature": 0}
    for prompt, texts in ((prompts, want), (ids, want), (prompts[0], want[:1]), (ids[1], want[1:])):
        answer = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == texts
        pieces = [""] * len(texts)
        for chunk in client.completions.create(prompt=prompt, stream=True, **options):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
        assert pieces == texts
    answer = client.completions.create(prompt=prompts, logprobs=2, **options)
    assert "".join(answer.choices[0].logprobs.tokens) == want[0]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_the_next_turn_finds_everything_up_to_the_last_token(client: Any, name: str) -> None:
    """The answer's last token has no K and V, so that and the new message are what is computed."""
    messages: list[Any] = [{"role": "user", "content": "Tell me about the weather of the last days, please."}]
    before = None
    for turn in range(3):
        answer = ask(client, name, messages, max_tokens=21)
        if before is not None:
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert cached == before + 20, answer.tierkv
        before = answer.usage.prompt_tokens
        content = answer.choices[0].message.content
        assert len(content) == 21
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": f"And in turn {turn}?"}]
        time.sleep(0.3)  # the partial block is written in the background


def test_models_are_listed(client: Any, name: str) -> None:
    assert [model.id for model in client.models.list().data] == [name]
    assert client.models.retrieve(name).owned_by == "tierkv"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"n": 33}, "n"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"max_tokens": 4090}, "max_tokens"),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: Any, name: str, options: Any, param: str | None) -> None:
    with pytest.raises((openai.BadRequestError, UnicodeEncodeError)) as refused:
        client.chat.completions.create(**{"model": name, "messages": USER, **options})
    if isinstance(refused.value, openai.BadRequestError):
        assert refused.value.param == param


def test_another_models_name_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        ask(client, "gpt-4")


def test_neutral_values_of_other_fields_are_accepted(client: Any, name: str) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "me", "store": False}
    assert ask(client, name, **neutral, response_format={"type": "text"}, parallel_tool_calls=True).choices


def test_a_closed_stream_ends_its_request(server: ServerProcess, name: str) -> None:
    import json
    import urllib.request

    def running() -> int:
        with urllib.request.urlopen(f"{server.url}/status", timeout=30) as answer:
            return int(json.loads(answer.read())["serving"]["active"])

    with server.client() as client:
        stream = ask(client, name, max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        assert running() == 1
        stream.close()
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 0
