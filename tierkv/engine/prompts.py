"""Prompt files, and how a prompt becomes tokens, so that what is warmed is what real requests begin with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tierkv.errors import ConfigError

__all__ = ["PromptRequest", "Tokenizer", "prefix_tokens", "read_prompts", "render_tokens"]

# A request's text can begin with anything; where a tokenizer merges characters, the last tokens of the prompt
# may differ with it. What all of these have in common is safe to keep.
_PROBES = ("a", "Z", "7", " b", "\n", '"', "é", "?", "你")


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any

    def encode(self, text: str, **options: Any) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """What stands before the user's text: a system prompt, tools, earlier messages."""

    system: str = ""
    tools: Sequence[dict[str, Any]] = field(default_factory=tuple)
    messages: Sequence[dict[str, Any]] = field(default_factory=tuple)


def read_prompts(path: Path, *, lines: bool = False) -> list[PromptRequest]:
    """Return the prompts of a file: text separated by lines of ---, one a line, or JSON lines (.jsonl).

    Raises ConfigError, in one line, for a file that is missing, empty, binary or no JSON.
    """
    text = _read_text(path)
    if path.suffix == ".jsonl":
        numbered = enumerate(text.splitlines(), start=1)
        prompts = [_parse_json(line, path, number) for number, line in numbered if line.strip()]
    else:
        pieces = text.splitlines() if lines else _split_at_rules(text)
        prompts = [PromptRequest(system=piece.strip()) for piece in pieces if piece.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def render_tokens(tokenizer: Tokenizer, request: PromptRequest, user_text: str) -> list[int]:
    """Return the tokens of a whole request, up to where the answer begins.

    By the tokenizer's chat template; plain text, with an empty line between, where it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        earlier = [str(message.get("content", "")) for message in request.messages]
        return tokenizer.encode("\n\n".join(part for part in [request.system, *earlier, user_text] if part))
    system = [{"role": "system", "content": request.system}] if request.system else []
    user = {"role": "user", "content": user_text}
    try:
        return _apply(tokenizer, [*system, *request.messages, user], request)
    except Exception as exc:
        if not system or "system" not in str(exc).lower():
            raise ConfigError(f"the chat template refuses the prompt: {exc}") from exc
    # Some templates know no system role: then it goes before the first user's text, as their users do it.
    messages = [dict(message) for message in [*request.messages, user]]
    first = next(message for message in messages if message.get("role") == "user")
    first["content"] = f"{request.system}\n\n{first['content']}"
    return _apply(tokenizer, messages, request)


def prefix_tokens(tokenizer: Tokenizer, request: PromptRequest) -> list[int]:
    """Return the tokens that every request with this prompt begins with, whatever the user's text."""
    common: list[int] | None = None
    for probe in _PROBES:
        tokens = render_tokens(tokenizer, request, probe)
        if common is None:
            common = tokens
        length = next((i for i, (a, b) in enumerate(zip(common, tokens, strict=False)) if a != b), None)
        common = common[: min(len(common), len(tokens)) if length is None else length]
    assert common is not None
    return common


def _apply(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], request: PromptRequest) -> list[int]:
    text = tokenizer.apply_chat_template(
        list(messages), tools=list(request.tools) or None, tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    if b"\0" in raw:
        raise ConfigError(f"{path} is a binary file, not a list of prompts")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text: byte {exc.start} cannot be read") from exc


def _split_at_rules(text: str) -> list[str]:
    pieces: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == "---":
            pieces.append([])
        else:
            pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces]


def _parse_json(line: str, path: Path, number: int) -> PromptRequest:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}, line {number}: not JSON: {exc}") from exc
    is_request = isinstance(value, dict) and value.keys() <= {"system", "tools", "messages"} and value
    if not is_request:
        raise ConfigError(f'{path}, line {number}: expected an object of "system", "tools", "messages"')
    system, tools, messages = value.get("system") or "", value.get("tools") or [], value.get("messages") or []
    is_sound = (
        isinstance(system, str)
        and all(isinstance(items, list) for items in (tools, messages))
        and all(isinstance(item, dict) for item in [*tools, *messages])
    )
    if not is_sound:
        raise ConfigError(f"{path}, line {number}: system is text, tools and messages are lists of objects")
    return PromptRequest(system=system, tools=tools, messages=messages)
