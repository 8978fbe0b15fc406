from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierkv.engine.prompts import PromptRequest, prefix_tokens, read_prompts, render_tokens
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
