"""`tierkv warm` and `tierkv serve` warn of a date in the chat template; `warm` of prompts that are short."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tierkv.tools.warm_warnings import warn_of_date, warn_of_short

Command = Callable[..., Any]


class Tokenizer:
    """A tokenizer with a chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template


@pytest.mark.parametrize(
    ("template", "day", "said"),
    [
        ("{{ strftime_now('%d %b %Y') }}", None, "are not found tomorrow"),
        ("{{ strftime_now('%d %b %Y') }}", datetime.date(2024, 7, 26), "2024-07-26 as today's date"),
        ("{{ messages }}", None, ""),
        ("", None, ""),
    ],
)
def test_a_template_with_a_date_is_named(
    template: str, day: datetime.date | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_date(Tokenizer(template), day)  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)


def test_short_prompts_are_named_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_short([256, 300, 1000], 256)
    assert capsys.readouterr().err == ""
    warn_of_short([0, 300, 30, 255, *[1] * 6], 256)
    empty, short = capsys.readouterr().err.splitlines()
    assert empty.startswith("tierkv: prompt 1 (0 tokens): ") and "nothing is kept" in empty
    assert short.startswith("tierkv: prompts 3 (30 tokens), 4 (255 tokens), 5 (1 tokens)") and "and 3 more:" in short


def test_warm_warns_and_keeps_what_it_can(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Be kind.\n---\n" + "You are a careful assistant. " * 12)
    printed = command("warm", "prompts.txt", "--json")
    assert printed.code == 0 and "prompt 1 (" in printed.err and "shorter than a block of 256" in printed.err
    assert json.loads(printed.out)["prompts"] == 2
    found = json.loads(command("explain", "Hello", "--system", "prompts.txt", "--json").out)
    assert found["before"].endswith("user\n"), "a partial block is kept all the same"
    assert not command("-q", "warm", "prompts.txt").err


def test_a_prompt_without_a_common_token_is_left_out(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("Be kind.\n---\nBe brief.\n")
    from tierkv.tools import warm

    original = warm.prefix_tokens
    monkeypatch.setattr(warm, "prefix_tokens", lambda t, r, **o: [] if r.system == "Be kind." else original(t, r, **o))
    printed = command("warm", "prompts.txt", "--json")
    assert printed.code == 0 and json.loads(printed.out)["prompts"] == 1 and "nothing is kept" in printed.err


# -- standard input and several prompts ----------------------------------------------------------------------


def test_several_prompts_are_answered_each_and_together(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("What is a store?\n---\nWhat is a tier?\n")
    options = ("--max-new-tokens", 3, "--block-size", 16, "--json")
    together = json.loads(command("run", "Hello", "--file", "more.txt", *options).out)["answers"]
    alone = [
        json.loads(command("run", text, *options, "--no-cache").out)
        for text in ("Hello", "What is a store?", "What is a tier?")
    ]
    assert [each["token_ids"] for each in together] == [each["token_ids"] for each in alone]
    assert alone[0]["model"] == "embedded"
    printed = command("run", "Hello", "--file", "more.txt", *options[:-1])
    assert printed.out.count("\n---\n") == 2 and "nonsense" in printed.err and "random weights" in printed.err


def test_a_file_of_conversations_is_answered(command: Command, tmp_path: Path) -> None:
    said = ("user", "Hi"), ("assistant", "Yes?"), ("user", "A")
    turns = [{"role": role, "content": text} for role, text in said]
    (tmp_path / "talk.json").write_text(json.dumps({"system": "Be kind.", "messages": turns}))
    found = json.loads(command("run", "--file", "talk.json", "--max-new-tokens", 1, "--json").out)
    assert found["prompt_tokens"] > 60
    refused = command("run", "--file", "talk.json", "--system", "talk.json")
    assert refused.code == 2 and "--system is for texts" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run",), "there is no prompt"),
        (("run", "-", "--file", "-"), "read once only"),
        (("run", "-", "-"), "read once only"),
        (("run", ""), "the prompt is empty"),
    ],
)
def test_prompts_that_cannot_be_are_refused(command: Command, arguments: tuple[str, ...], said: str) -> None:
    printed = command(*arguments)
    assert printed.code == 2 and said in printed.err


def test_standard_input_is_a_prompt_or_a_file_of_prompts(embedded_cache: Path, tmp_path: Path) -> None:
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_CACHE_HOME": str(embedded_cache),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "TIERKV_STORE": str(tmp_path / "store"),
        "HF_HUB_OFFLINE": "1",
    }

    def answer(*arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "tierkv", *arguments, "--json"],
            env=environment,
            input="Hello there\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert (
        answer("run", "-", "--max-new-tokens", "2")["prompt_tokens"]
        == (answer("run", "Hello there", "--max-new-tokens", "2")["prompt_tokens"])
    )
    assert answer("warm", "-")["prompts"] == 1
