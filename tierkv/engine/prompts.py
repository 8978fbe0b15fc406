"""Turns prompts into tokens, so that a warmed prefix has the tokens with which real requests begin."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Protocol

from tierkv.engine.prompt_files import PromptRequest, check_unicode, read_prompts
from tierkv.errors import ConfigError

__all__ = [
    "TEMPLATE_DAY",
    "PromptRequest",
    "Tokenizer",
    "chat_template_of",
    "check_unicode",
    "prefix_tokens",
    "read_prompts",
    "render_chat",
    "render_tokens",
]

TEMPLATE_DAY = date(2024, 7, 26)
"""The day that templates write, if no other is given: the one that Llama 3 writes where there is no clock.

The real day would change the first tokens of every prompt at midnight, and nothing that is cached would be found.
"""

# A user's text can begin with any character. A tokenizer may merge it with the prompt's last characters, so the last
# tokens may differ. The common prefix for all these beginnings is safe to keep.
_PROBES = ("a", "Z", "7", " b", "\n", '"', "é", "?", "你")

# Names that the tokenizer, Transformers or this module give a value themselves.
_RESERVED = ("messages", "strftime_now", "raise_exception", "bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that this module calls."""

    chat_template: Any

    def encode(self, text: str, **options: Any) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def render_tokens(
    tokenizer: Tokenizer, request: PromptRequest, user_text: str, *, day: date | None = TEMPLATE_DAY
) -> list[int]:
    """Return the tokens of a whole request, up to the beginning of the answer, as `render_chat` does."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    user = {"role": "user", "content": user_text}
    return render_chat(tokenizer, [*system, *request.messages, user], tools=request.tools, day=day)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] = (),
    day: date | None = TEMPLATE_DAY,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of a conversation, up to the beginning of the answer.

    They come from the tokenizer's chat template; without a template, from the texts with empty lines between them.
    messages: each with a role and a text as content. day: what the template writes as today; None is the real one.
    variables: more variables of the template, for values that are none of the tokenizer's own options: a client must
    not bring a template of its own. Raises ConfigError for such a name, and if the template refuses.
    """
    template = chat_template_of(tokenizer, tools=tools)
    if not template:
        texts = [str(message.get("content") or "") for message in messages]
        return _encode(tokenizer, "\n\n".join(text for text in texts if text))
    plain = [_plain_message(message, template) for message in messages]
    _check_variables(tokenizer, variables or {})
    options = {**(variables or {}), **_day_options(template, day)}
    try:
        return _apply(tokenizer, plain, tools, options)
    except ConfigError as exc:
        if not plain or plain[0]["role"] != "system" or "system" not in str(exc.__cause__).lower():
            raise
    # Some templates have no system role: then the system prompt goes before the first user's text.
    system, rest = plain[0], plain[1:]
    first = next((message for message in rest if message["role"] == "user"), None)
    if first is None:
        raise ConfigError("the chat template has no system role, and there is no user's message to put its text before")
    first["content"] = f"{system['content']}\n\n{first['content']}"
    return _apply(tokenizer, rest, tools, options)


def chat_template_of(tokenizer: Tokenizer, *, tools: Sequence[dict[str, Any]] = ()) -> str:
    """Return the text of the chat template, the one for tools if there are several; "" without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    choose = getattr(tokenizer, "get_chat_template", None)
    return str(choose(tools=list(tools) or None) if choose else tokenizer.chat_template)


def prefix_tokens(tokenizer: Tokenizer, request: PromptRequest, *, day: date | None = TEMPLATE_DAY) -> list[int]:
    """Return the common leading tokens of all requests with this prompt, for any user text."""
    common: list[int] | None = None
    for probe in _PROBES:
        tokens = render_tokens(tokenizer, request, probe, day=day)
        if common is None:
            common = tokens
        length = next((i for i, (a, b) in enumerate(zip(common, tokens, strict=False)) if a != b), None)
        common = common[: min(len(common), len(tokens)) if length is None else length]
    assert common is not None
    return common


def _check_variables(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
    options = {*inspect.signature(tokenizer.apply_chat_template).parameters, *_RESERVED}
    if taken := sorted(
        name for name in variables if name in options or name.startswith("_") or not name.isidentifier()
    ):
        raise ConfigError(f"a chat template gets no variable of the name {taken[0][:40]!a}")


def _plain_message(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Return a message as templates expect it: arguments of calls as objects, and a role that the template knows."""
    plain = dict(message)
    if plain.get("role") == "developer" and "developer" not in template:
        plain["role"] = "system"
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _day_options(template: str, day: date | None) -> dict[str, str]:
    """Return the options that make a template write a day.

    Transformers gives templates the function strftime_now. A macro of that name, put before the template, replaces it.
    """
    if day is None or "strftime_now" not in template:
        return {}
    steps = "".join(f"|replace('%{code}','{day.strftime('%' + code)}')" for code in "AaBbdeFHIjMmpSyYDTXxcZ")
    macro = "{%- macro strftime_now(format) -%}{{ format" + steps + " }}{%- endmacro %}{{- '' }}"
    return {"chat_template": macro + template}


def _apply(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    options: Mapping[str, Any],
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as exc:  # a template is a program of the model's and may raise anything
        raise ConfigError(f"the chat template refuses the prompt: {exc}") from exc
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
    check_unicode(text, "the prompt")
    return tokenizer.encode(text, **options)
