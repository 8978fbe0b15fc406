"""Calls of tools are read in each form, at whatever places the text is cut, and what is no call stays text."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.serving.tool_calls import HERMES, LLAMA, MISTRAL, ToolCallFinder, ToolFormat, tool_format_of

NAMES = {"add", "find"}
ARGUMENTS: dict[str, Any] = {"a": 1, "text": "é } ; <tool_call>"}
CALL = json.dumps({"name": "add", "arguments": ARGUMENTS})
OTHER = json.dumps({"name": "find", "arguments": {}})

FORMS = [
    (HERMES, f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{OTHER}</tool_call>", "I look.\n", 2),
    (HERMES, f"<tool_call>{CALL}", "", 1),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {OTHER}]", "", 2),
    (MISTRAL, f"So: [TOOL_CALLS] [{CALL}]", "So: ", 1),
    (MISTRAL, f"[TOOL_CALLS]add[ARGS]{json.dumps(ARGUMENTS)}[TOOL_CALLS]find[CALL_ID]123[ARGS]{{}}", "", 2),
    (LLAMA, CALL.replace("arguments", "parameters"), "", 1),
    (LLAMA, f"<|python_tag|>{CALL.replace('arguments', 'parameters')}; {OTHER}", "", 2),
]

NO_CALLS = [
    (HERMES, "<tool_call>{broken</tool_call>"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, f"<tool_call>{CALL}</tool_call> and more"),
    (HERMES, "a < b, and <tool_cal is no marker"),
    (HERMES, "<tool_call>" + "[" * 100_000),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS] nothing"),
    (MISTRAL, f"[TOOL_CALLS][{CALL}] and more"),
    (LLAMA, '{"answer": 42}'),
    (LLAMA, f"The call is {CALL}"),
    (LLAMA, '{"name": "add", "parameters": 3}'),
    (LLAMA, "{"),
    (LLAMA, '{"name": "add", "parameters": {"a": NaN}}'),
    (LLAMA, '{"name": "add", "parameters": {"a": 1e999}}'),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "\\ud83d"}}</tool_call>'),
    (MISTRAL, '[TOOL_CALLS]add{"\\udc00": 1}'),
]


def parted(form: ToolFormat, pieces: list[str]) -> tuple[str, list[Any]]:
    finder = ToolCallFinder(form, NAMES)
    content = "".join(finder.push(piece) for piece in pieces)
    rest, calls = finder.finish()
    return content + rest, calls


@given(st.sampled_from(FORMS), st.lists(st.integers(0, 200), max_size=6))
def test_calls_are_found_wherever_the_text_is_cut(form: tuple[ToolFormat, str, str, int], cuts: list[int]) -> None:
    kind, text, before, count = form
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    content, calls = parted(kind, [text[a:b] for a, b in pairwise(places)])
    assert content == before
    assert [call.name for call in calls] == ["add", "find"][:count]
    assert json.loads(calls[0].arguments) == ARGUMENTS
    assert len({call.id for call in calls}) == count


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_stays_text(form: ToolFormat, text: str) -> None:
    assert parted(form, [text]) == (text, [])
    assert parted(form, list(text[:200])) == (text[:200], [])


def test_content_comes_at_once_until_a_marker_begins() -> None:
    finder = ToolCallFinder(HERMES, NAMES)
    assert [finder.push(piece) for piece in ("a <", "b <tool", "_call>", "x")] == ["a ", "<b ", "", ""]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ('... return <tool_call>{"name": ...', HERMES),
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ("{{- '<|python_tag|>' }}", LLAMA),
        ("{{ messages }}", None),
    ],
)
def test_the_template_says_which_form_the_model_uses(template: str, form: ToolFormat | None) -> None:
    assert tool_format_of(template) is form
