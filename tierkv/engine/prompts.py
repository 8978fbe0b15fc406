"""Turns prompts into tokens, so that a warmed prefix has the tokens with which real requests begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tierkv.engine.prompt_files import PromptRequest, check_unicode, read_prompts
from tierkv.errors import ConfigError

__all__ = ["PromptRequest", "Tokenizer", "check_unicode", "prefix_tokens", "read_prompts", "render_tokens"]

# A user's text can begin with any character. A tokenizer may merge it with the prompt's last characters, so the last
# tokens may differ. The common prefix for all these beginnings is safe to keep.
_PROBES = ("a", "Z", "7", " b", "\n", '"', "é", "?", "你")


class Tokenizer(Protocol):
    """The methods of a Hugging Face tokenizer that this module calls."""

    chat_template: Any

    def encode(self, text: str, **options: Any) -> list[int]: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def render_tokens(tokenizer: Tokenizer, request: PromptRequest, user_text: str) -> list[int]:
    """Return the tokens of a whole request, up to the beginning of the answer.

    They come from the tokenizer's chat template; without a template, from the texts with empty lines between them.
    """
    if not getattr(tokenizer, "chat_template", None):
        earlier = [str(message.get("content") or "") for message in request.messages]
        return _encode(tokenizer, "\n\n".join(part for part in [request.system, *earlier, user_text] if part))
    system = [{"role": "system", "content": request.system}] if request.system else []
    user = {"role": "user", "content": user_text}
    try:
        return _apply(tokenizer, [*system, *request.messages, user], request)
    except ConfigError as exc:
        if not system or "system" not in str(exc.__cause__).lower():
            raise
    # Some templates have no system role: then the system prompt goes before the first user's text.
    messages = [dict(message) for message in [*request.messages, user]]
    first = next(message for message in messages if message.get("role") == "user")
    first["content"] = f"{request.system}\n\n{first['content']}"
    return _apply(tokenizer, messages, request)


def prefix_tokens(tokenizer: Tokenizer, request: PromptRequest) -> list[int]:
    """Return the common leading tokens of all requests with this prompt, for any user text."""
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
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(request.tools) or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as exc:  # a template is a program of the model's and may raise anything
        raise ConfigError(f"the chat template refuses the prompt: {exc}") from exc
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: Tokenizer, text: str, **options: Any) -> list[int]:
    check_unicode(text, "the prompt")
    return tokenizer.encode(text, **options)
