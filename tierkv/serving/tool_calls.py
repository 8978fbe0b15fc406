"""Calls of tools, read from the text of an answer in the forms that model makers use.

A call of a tool that the request did not name, or that is not valid JSON, stays text: nothing is invented.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["ToolCallFinder", "ToolFormat", "ToolUse", "tool_format_of"]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One call. arguments: JSON, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A form of calls. markers: what a call begins with. only_first: markers count at the beginning of an answer only.

    read: yields name and arguments of each call in a text that begins with a marker; raises ValueError for other texts.
    """

    name: str
    markers: tuple[str, ...]
    only_first: bool
    read: Callable[[str], Iterator[tuple[Any, Any]]]


def tool_format_of(template: str) -> ToolFormat | None:
    """Return the form that a model answers in, by its chat template; None for a template without a known one."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '{"name": function name, "parameters":' in template:
        return LLAMA
    return None


class ToolCallFinder:
    """Parts the text of one answer, as it comes, into content and calls.

    names: of the request's tools. Text from a marker on is held back until the answer ends.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = names
        self._held = ""
        self._is_call = False
        self._has_content = False

    def push(self, text: str) -> str:
        """Return the content that is certainly none of a call's."""
        self._held += text
        if self._is_call:
            return ""
        if self._form.only_first:
            return self._push_first()
        begin = min((at for m in self._form.markers if (at := self._held.find(m)) >= 0), default=None)
        if begin is not None:
            self._is_call = True
            return self._release(begin)
        return self._release(len(self._held) - _overlap(self._held, self._form.markers))

    def finish(self) -> tuple[str, list[ToolUse]]:
        """Return the rest of the content, and the calls."""
        held, self._held = self._held, ""
        if not self._is_call:
            return held, []
        try:
            calls = [_checked(name, arguments, self._names) for name, arguments in self._form.read(held)]
        except (ValueError, RecursionError):
            return held, []
        return ("", calls) if calls else (held, [])

    def _push_first(self) -> str:
        begin = self._held.lstrip(_BLANKS)
        if self._has_content:
            return self._release(len(self._held))
        if any(begin.startswith(marker) for marker in self._form.markers):
            self._is_call = True
            return ""
        if any(marker.startswith(begin) for marker in self._form.markers):
            return ""  # nothing but blanks and the beginning of a marker so far
        self._has_content = True
        return self._release(len(self._held))

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text begin a marker."""
    return max(
        (count for m in markers for count in range(1, min(len(m), len(text) + 1)) if text.endswith(m[:count])),
        default=0,
    )


def _checked(name: Any, arguments: Any, names: Collection[str]) -> ToolUse:
    if name not in names or not isinstance(arguments, dict):
        raise ValueError("no call of one of the tools")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
    text.encode()  # half a character, such as "\\ud83d", is a text of Python's that cannot be sent
    return ToolUse(f"call_{secrets.token_hex(12)}", name, text)


def _read_hermes(text: str) -> Iterator[tuple[Any, Any]]:
    """Read <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or more; the last tag may be missing."""
    rest = text
    while rest := rest.strip(_BLANKS):
        if not rest.startswith("<tool_call>"):
            raise ValueError("text between two calls")
        rest = rest.removeprefix("<tool_call>").lstrip(_BLANKS)
        call, end = _DECODER.raw_decode(rest)
        rest = rest[end:].lstrip(_BLANKS).removeprefix("</tool_call>")
        yield _named(call, "arguments")


def _read_mistral(text: str) -> Iterator[tuple[Any, Any]]:
    """Read [TOOL_CALLS] and a list of calls, or [TOOL_CALLS]name[ARGS]{...} for each call; newer models write that."""
    for part in filter(None, (part.strip(_BLANKS) for part in text.split("[TOOL_CALLS]"))):
        if part.startswith("["):
            calls, end = _DECODER.raw_decode(part)
            for call in calls:
                yield _named(call, "arguments")
            part = part[end:]
            if part.strip(_BLANKS):
                raise ValueError("text behind the calls")
            continue
        match = re.match(r"([^\s\[{]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?={)", part)
        if match is None:
            raise ValueError("no call")
        arguments, end = _DECODER.raw_decode(part[match.end() :])
        if part[match.end() + end :].strip(_BLANKS):
            raise ValueError("text behind a call")
        yield match[1], arguments


def _read_llama(text: str) -> Iterator[tuple[Any, Any]]:
    """Read {"name": ..., "parameters": {...}}, one or more with semicolons between them, the whole answer."""
    rest = text.strip(_BLANKS).removeprefix("<|python_tag|>").strip(_BLANKS)
    while rest:
        call, end = _DECODER.raw_decode(rest)
        rest = rest[end:].strip(_BLANKS)
        if rest and not rest.startswith(";"):
            raise ValueError("text behind a call")
        rest = rest.removeprefix(";").strip(_BLANKS)
        yield _named(call, "arguments" if isinstance(call, dict) and "arguments" in call else "parameters")


def _named(call: Any, key: str) -> tuple[Any, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("no call")
    return call["name"], call.get(key, {})


HERMES = ToolFormat("hermes", ("<tool_call>",), False, _read_hermes)
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), False, _read_mistral)
LLAMA = ToolFormat("llama", ("<|python_tag|>", "{"), True, _read_llama)
