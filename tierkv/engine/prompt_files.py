r"""Reads prompt files: text, or JSON in the forms of `tierkv warm` and of model servers' batch interfaces.

In a text file a line feed or \r\n ends a line; blanks and empty lines at both ends of a prompt are removed. JSON is one
object, a list, or one value per line. Each value is a prompt:

- {"system": text, "tools": [...], "messages": [{"role": ..., "content": ...}, ...]}: each key may be missing.
- {"prompt": text} or {"text": text}: as a prompt in a text file; with system or messages it is the user's last text.
- {"custom_id": ..., "body": {"messages": [...]}}, a line of OpenAI's batch files: the body is the prompt.
- a text, or a list of messages.

Content is text, or a list of parts {"type": "text", "text": ...}, which are concatenated. Other keys are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.values.files import read_text

__all__ = ["PromptRequest", "check_unicode", "read_prompts"]

_LIMIT_BYTES = 256 << 20  # more text than the K and V of any store
_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_JSON_SUFFIXES = (".json", *_LINES_SUFFIXES)
_KEYS = ("system", "tools", "messages", "prompt", "text")
_TEXT_TYPES = ("text", "input_text", "output_text")
_BLANKS = " \t\n"
_JSON_BLANKS = " \t\r\ufeff"  # concatenated files may contain byte order marks
_SEPARATORS = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """A prompt without the user's last text: system prompt, tools and earlier messages."""

    system: str = ""
    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)
    messages: Sequence[dict[str, Any]] = field(default_factory=tuple)


def read_prompts(path: Path, *, lines: bool = False) -> list[PromptRequest]:
    """Return the prompts of a file: JSON by its suffix, else text separated by lines of ---.

    lines: each line of a text file is a prompt. The suffix is compared without case. A file without a suffix, such as
    /dev/stdin, is JSON if its first value is a prompt. A pipe is read to its end. Raises ConfigError, in one line that
    names the bad line, for an unreadable file and for a file without prompts.
    """
    text = read_text(path, limit_bytes=_LIMIT_BYTES).replace("\r\n", "\n")
    is_json = path.name.lower().endswith(_JSON_SUFFIXES) or (not path.suffix and not lines and _begins_as_json(text))
    if is_json:
        prompts = _json_prompts(text, path)
    else:
        pieces = text.split("\n") if lines else _split_at_rules(text)
        prompts = [PromptRequest(system=piece.strip(_BLANKS)) for piece in pieces if piece.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def _json_prompts(text: str, path: Path) -> list[PromptRequest]:
    try:
        values = _iter_values(text, is_document=not path.name.lower().endswith(_LINES_SUFFIXES))
        return [_to_request(value, where) for value, where in values]
    except ConfigError as exc:
        raise ConfigError(f"{path}, {exc}") from exc


def check_unicode(text: str, what: str) -> None:
    """Raise ConfigError for a text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(
            f"{what} is not valid Unicode: it has a lone surrogate, \\u{ord(text[exc.start]):04x}"
        ) from exc


def _split_at_rules(text: str) -> list[str]:
    pieces: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip(" \t") == "---":
            pieces.append([])
        else:
            pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces]


def _begins_as_json(text: str) -> bool:
    """Return whether the first value of a text is a prompt in JSON."""
    if not text.lstrip(_BLANKS).startswith(("{", "[")):
        return False
    try:
        value, where = next(_iter_values(text, is_document=True))
        _to_request(value, where)
    except (ValueError, RecursionError, StopIteration):  # a ConfigError is a ValueError
        return False
    return True


def _iter_values(text: str, *, is_document: bool) -> Iterator[tuple[Any, str]]:
    """Yield the JSON value of each prompt and its line, as "line 3". Raises ConfigError at the first bad line.

    is_document: the whole text may be one object or a list of prompts; otherwise each line is a value.
    """
    lines = [(number, line.strip(_JSON_BLANKS)) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line]
    if is_document and lines and not (len(lines) > 1 and _is_json(lines[0][1])):
        yield from _iter_document(text)
        return
    for number, line in lines:
        yield _parse(line, number), f"line {number}"


def _iter_document(text: str) -> Iterator[tuple[Any, str]]:
    value = _parse(text, None)
    at = len(text) - len(text.lstrip())
    number = text.count("\n", 0, at) + 1
    if not isinstance(value, list) or _is_messages(value):
        yield value, f"line {number}"
        return
    at += 1  # after the bracket; the items are parsed again, to know the line of each
    for item in value:
        begin = _SEPARATORS.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere
        number += text.count("\n", at, begin)
        yield item, f"line {number}"
        _, at = _DECODER.raw_decode(text, begin)
        number += text.count("\n", begin, at)


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, number: int | None) -> Any:
    """Return the JSON value of line `number`, or of the whole file if that is None. Raises ConfigError."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        place = exc.lineno if number is None else number
        raise ConfigError(f"line {place}: not JSON: {exc.msg}, column {exc.colno}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"line {number or 1}: not JSON: {exc}") from exc


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:at]))
        raise ValueError(f"the key {twice[:40]!a} is there twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _to_request(value: Any, where: str) -> PromptRequest:
    """Return the prompt of a JSON value. Raises ConfigError."""
    if isinstance(value, str):
        value = {"text": value}
    elif _is_messages(value):
        value = {"messages": value}
    elif isinstance(value, dict) and isinstance(value.get("body"), dict) and not value.keys() & set(_KEYS):
        value = value["body"]
    if not isinstance(value, dict) or not value.keys() & set(_KEYS):
        raise ConfigError(f'{where}: expected an object of "system", "tools", "messages", or "prompt"')
    for key in value.keys() - set(_KEYS):
        if meant := get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.85):
            raise ConfigError(f"{where}: unknown key {key!a}; {meant[0]} is meant?")
    system = _to_text(value.get("system"), f"{where}: system")
    messages = [
        _to_message(item, f"{where}: messages[{at}]") for at, item in enumerate(_items(value, "messages", where))
    ]
    tools = _items(value, "tools", where)
    if value.get("prompt") and value.get("text"):
        raise ConfigError(f"{where}: prompt and text are two names of the same, and one of them is enough")
    name = "prompt" if value.get("prompt") else "text"
    said = _to_text(value.get(name), f"{where}: {name}")
    if said and (system or messages):
        messages.append({"role": "user", "content": said})
    request = PromptRequest(system=system or ("" if messages else said), tools=tools, messages=messages)
    check_unicode(
        json.dumps([request.system, request.tools, request.messages], ensure_ascii=False), f"{where}: the text"
    )
    return request


def _items(value: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    items = value.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConfigError(f"{where}: {key} is a list of objects")
    return items


def _to_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise ConfigError(f"{where} has no role")
    return {**message, "content": _to_text(message.get("content"), f"{where}: content")}


def _to_text(content: Any, where: str) -> str:
    """Return a text, or the concatenated texts of a list of parts; "" for null. Raises ConfigError for others."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConfigError(f"{where} is text, or a list of parts that are text")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_TYPES else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ConfigError(f"{where}[{at}] is {str(kind)[:40]!a}; only text can be cached")
        texts.append(text)
    return "".join(texts)
