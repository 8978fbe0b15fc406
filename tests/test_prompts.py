from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tierkv.engine import prompt_files
from tierkv.engine.prompts import TEMPLATE_DAY, PromptRequest, prefix_tokens, read_prompts, render_chat, render_tokens
from tierkv.errors import ConfigError


class MergingTokenizer:
    """Two characters make one token where they can, so that a prompt's end depends on what follows."""

    chat_template: Any = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [hash(text[i : i + 2]) & 0xFFFF for i in range(0, len(text), 2)]

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation) + "<assistant>"


class ChatTokenizer(MergingTokenizer):
    chat_template = "yes"


class NoSystemRole(ChatTokenizer):
    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        if conversation[0]["role"] == "system":
            raise ValueError("System role not supported")
        return super().apply_chat_template(conversation, **options)


@pytest.mark.parametrize("tokenizer", [MergingTokenizer(), ChatTokenizer(), NoSystemRole()])
@pytest.mark.parametrize("system", ["be brief", "be very brief!"])
@pytest.mark.parametrize("user", ["hello", " hello", "7", "\n\nx"])
def test_every_request_begins_with_the_prefix_that_was_warmed(tokenizer: Any, system: str, user: str) -> None:
    request = PromptRequest(system=system)
    prefix = prefix_tokens(tokenizer, request)
    assert len(prefix) >= len(system) // 2
    assert render_tokens(tokenizer, request, user)[: len(prefix)] == prefix


def test_earlier_messages_are_part_of_the_prefix() -> None:
    short = prefix_tokens(ChatTokenizer(), PromptRequest(system="s"))
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    assert len(prefix_tokens(ChatTokenizer(), PromptRequest(system="s", messages=messages))) > len(short)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_lines_of_three_dashes_separate_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "one\n\nstill --- one\n---\n\n two \n---\n---\n")
    assert [prompt.system for prompt in read_prompts(path)] == ["one\n\nstill --- one", "two"]


def test_with_lines_each_line_is_a_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "one\n\n---\ntwo\n")
    assert [prompt.system for prompt in read_prompts(path, lines=True)] == ["one", "---", "two"]


def test_json_lines_bring_tools_and_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"system": "s", "tools": [{"name": "t"}]}\n\n{"messages": []}\n')
    first, second = read_prompts(path)
    assert first == PromptRequest(system="s", tools=[{"name": "t"}], messages=[])
    assert second.system == ""


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", "", "no prompt"),
        ("blank.txt", "\n---\n  \n", "no prompt"),
        ("binary.txt", b"ab\0cd", "binary"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", '{"system": "a"}\n{oops\n', "line 2: not JSON"),
        ("list.jsonl", "[1]\n", "line 1: expected an object"),
        ("typo.jsonl", '{"sytem": "a"}\n', "line 1: expected an object"),
        ("kind.jsonl", '{"system": 3}\n', "system is text"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "missing.txt")


def systems(path: Path, **options: Any) -> list[str]:
    return [prompt.system for prompt in read_prompts(path, **options)]


@pytest.mark.parametrize("sign", ["\f", "\v", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "a\rb"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, sign: str) -> None:
    text = f"page one{sign}page two"
    assert systems(write(tmp_path / "p.txt", text)) == [text]
    assert systems(write(tmp_path / "p.txt", f"{sign}{text}\n---\n{text}")) == [f"{sign}{text}", text]
    assert systems(write(tmp_path / "p.txt", f"{text}\nsecond\n"), lines=True) == [text, "second"]
    if sign in "\x85\u2028\u2029":
        line = json.dumps({"system": text}, ensure_ascii=False)
        for name in ("p.jsonl", "p.json", "p.ndjson"):
            assert systems(write(tmp_path / name, f"{line}\n{line}\n")) == [text, text]


def test_a_carriage_return_before_a_line_feed_belongs_to_the_end_of_the_line(tmp_path: Path) -> None:
    assert systems(write(tmp_path / "p.txt", "one\r\n\r\ntwo\r\n---\r\nthree\r\n")) == ["one\n\ntwo", "three"]
    assert systems(write(tmp_path / "p.txt", "one\r\ntwo\r\n"), lines=True) == ["one", "two"]
    assert systems(write(tmp_path / "p.jsonl", '{"system": "a\\r\\nb"}\r\n\r\n{"system": "c"}\r\n')) == ["a\r\nb", "c"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert systems(write(tmp_path / "p.txt", "\ufeffone")) == ["one"]
    assert systems(write(tmp_path / "p.jsonl", '\ufeff{"system": "a"}\n\ufeff{"system": "b"}\n')) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.Json", "a.json", "a.ndjson", "a.NDJSON", "a.txt.jsonl", "stdin"]
)
def test_json_is_known_by_its_suffix_whatever_its_case_and_without_one_by_its_first_value(
    tmp_path: Path, name: str
) -> None:
    assert systems(write(tmp_path / name, '{"system": "a"}\n{"system": "b"}\n')) == ["a", "b"]


@pytest.mark.parametrize("text", ['{"type": "object"}', "[1, 2]", "{{ name }}", "[see below]\n---\nmore"])
def test_a_text_that_only_looks_like_json_stays_a_text(tmp_path: Path, text: str) -> None:
    assert systems(write(tmp_path / "prompt", text))[0] == text.split("\n")[0]
    assert systems(write(tmp_path / "p.txt", '{"system": "a"}')) == ['{"system": "a"}']


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt": "p"}, PromptRequest(system="p", tools=[], messages=[])),
        ({"text": "p", "id": 7}, PromptRequest(system="p", tools=[], messages=[])),
        ("p", PromptRequest(system="p", tools=[], messages=[])),
        (
            {"system": "s", "prompt": "p"},
            PromptRequest(system="s", tools=[], messages=[{"role": "user", "content": "p"}]),
        ),
        ({"messages": [USER]}, PromptRequest(tools=[], messages=[USER])),
        ([USER], PromptRequest(tools=[], messages=[USER])),
        (
            {"custom_id": "1", "method": "POST", "url": "/v1", "body": {"model": "m", "messages": [USER], "n": 1}},
            PromptRequest(tools=[], messages=[USER]),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
            PromptRequest(tools=[], messages=[USER]),
        ),
        ({"system": [{"type": "text", "text": "s"}]}, PromptRequest(system="s", tools=[], messages=[])),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
            PromptRequest(tools=[], messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]),
        ),
        ({"system": "nul \0, é, 你"}, PromptRequest(system="nul \0, é, 你", tools=[], messages=[])),
    ],
)
def test_every_form_of_a_prompt_in_json_is_read(tmp_path: Path, value: Any, expected: PromptRequest) -> None:
    assert read_prompts(write(tmp_path / "p.jsonl", json.dumps(value))) == [expected]
    assert read_prompts(write(tmp_path / "p.json", json.dumps(value, indent=2))) == [expected]
    if not isinstance(value, list):
        assert read_prompts(write(tmp_path / "p.json", json.dumps([value, value], indent=2))) == [expected, expected]


IMAGE = '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}'


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("image.jsonl", f'{{"system": "a"}}\n{IMAGE}', r"line 2: messages\[0\]: content\[0\] is 'image_url'"),
        ("image.json", f'[{{"system": "a"}},\n\n{IMAGE}]', r"line 3: messages\[0\]: content\[0\] is 'image_url'"),
        ("half.json", '{"system":\n"a"\n', "line 3: not JSON"),
        ("lines.json", '{"system": "a"}\n{oops\n', "line 2: not JSON"),
        ("surrogate.jsonl", '{"system": "a"}\n{"system": "\\ud800"}', r"line 2: the text is not valid Unicode.*ud800"),
        ("surrogate.json", '[{"system": "a"},\n{"tools": [{"\\udc00": 1}]}]', "line 2: the text is not valid Unicode"),
        ("message.jsonl", '{"messages": [{"role": "user", "content": "\\ud83d"}]}', "line 1: the text is not valid"),
        ("role.jsonl", '{"messages": [{"content": "a"}]}', r"messages\[0\] has no role"),
        ("mapping.jsonl", '{"messages": {"role": "user"}}', "messages is a list of objects"),
        ("ids.jsonl", '{"prompt": [1, 2]}', r"prompt\[0\] is 'int'"),
        ("typo.jsonl", '{"system": "a", "mesages": []}', "line 1: unknown key 'mesages'"),
        ("twice.jsonl", '{"system": "a", "system": "b"}', "the key 'system' is there twice"),
        ("both.jsonl", '{"prompt": "a", "text": "b"}', "prompt and text"),
        ("nan.jsonl", "NaN", "NaN is no number"),
        ("deep.json", "[" * 100_000, "not JSON"),
        ("body.jsonl", '{"body": {"model": "m"}}', "expected an object"),
        ("null.json", "null", "expected an object"),
        ("empty.json", "[]", "no prompt"),
        ("utf16.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("latin.jsonl", b'{"system": "a"}\n{"system": "caf\xe9"}', r"byte 31 \(0xe9\), in line 2"),
    ],
)
def test_a_prompt_that_is_not_one_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_prompts(write(tmp_path / name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["one\n---\ntwo\n", '{"prompt": "one"}\n{"prompt": "two"}\n'])
def test_a_pipe_is_read_to_its_end(content: str) -> None:
    reader, writer = os.pipe()  # as a shell makes one for <(command)
    os.write(writer, content.encode())
    os.close(writer)
    try:
        assert systems(Path(f"/dev/fd/{reader}")) == ["one", "two"]
    finally:
        os.close(reader)


def test_a_fifo_without_a_writer_holds_no_prompt(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(tmp_path / "fifo")


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "_LIMIT_BYTES", 1 << 20)
    assert systems(write(tmp_path / "p.txt", "x" * (1 << 20))) == ["x" * (1 << 20)]
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        read_prompts(write(tmp_path / "p.txt", "x" * ((1 << 20) + 1)))


@pytest.mark.parametrize("tokenizer", [MergingTokenizer(), ChatTokenizer()])
def test_a_text_that_is_no_unicode_is_refused_before_a_tokenizer_sees_it(tokenizer: Any) -> None:
    for request, text in ((PromptRequest(system="\ud800"), "a"), (PromptRequest(), "a\udfff")):
        with pytest.raises(ConfigError, match="not valid Unicode"):
            render_tokens(tokenizer, request, text)


def test_a_message_without_content_adds_no_text(tmp_path: Path) -> None:
    request = PromptRequest(messages=[{"role": "assistant", "content": None}])
    assert render_tokens(MergingTokenizer(), request, "hi") == MergingTokenizer().encode("hi")


class JinjaTokenizer(MergingTokenizer):
    """Renders its template with the clock that Transformers gives templates."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
        template = options.pop("chat_template", self.chat_template)
        del options["tokenize"]
        (text,), _ = chat_template_utils.render_jinja_template([conversation], chat_template=template, **options)
        return str(text)


@pytest.mark.parametrize(("day", "text"), [(TEMPLATE_DAY, "26 Jul 2024"), (date(2031, 2, 3), "03 Feb 2031")])
@pytest.mark.parametrize("begin", ["", "\n", " \n  ", "{%- if true %}\n{% endif %}", "x"])
def test_a_template_writes_the_day_that_it_is_given(day: date, text: str, begin: str) -> None:
    """And nothing else changes: not even the blanks before its first line."""
    tokenizer = JinjaTokenizer(begin + "{{ strftime_now('%d %b %Y') if strftime_now is defined else '?' }}.\n")
    with_clock = render_chat(tokenizer, [{"role": "user", "content": "x"}], day=None)
    written = bytes(with_clock).decode().replace(f"{date.today():%d %b %Y}", text)
    assert bytes(render_chat(tokenizer, [{"role": "user", "content": "x"}], day=day)).decode() == written


def test_without_a_day_a_template_writes_the_real_one() -> None:
    tokenizer = JinjaTokenizer("{{ strftime_now('%Y') }}")
    year = bytes(render_chat(tokenizer, [{"role": "user", "content": "x"}], day=None)).decode()
    assert int(year) >= 2025


def test_arguments_of_calls_reach_the_template_as_objects() -> None:
    tokenizer = JinjaTokenizer("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert bytes(render_chat(tokenizer, messages)).decode() == '{"a": 1}'
    calls[0]["function"]["arguments"] = "no json"  # type: ignore[index]
    assert bytes(render_chat(tokenizer, messages)).decode() == '"no json"'


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert bytes(render_chat(JinjaTokenizer("{{ messages[0].role }}"), messages)) == b"system"
    knows = JinjaTokenizer("{{ messages[0].role }}{# developer #}")
    assert bytes(render_chat(knows, messages)) == b"developer"
