"""The fields of requests, as JSON has them: what a client may say, with the bounds of each value.

A field that is not here is refused: the client would wrongly believe that it has an effect. Some of OpenAI's fields are
here for their neutral value only, see `check_neutral`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from tierkv.serving.api_errors import ApiError

__all__ = ["ChatFields", "CompletionFields", "Message", "Tool", "check_neutral", "decode", "text_of", "tool_of"]

_MAX_DEPTH = 64  # of the JSON inside a tool, which templates walk through
_Id = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Anything = msgspec.Raw  # JSON of any form, not decoded
_NULL = msgspec.Raw(b"null")
_Stop = Annotated[str, Meta(min_length=1, max_length=1024)]


class _Strict(Struct, forbid_unknown_fields=True):
    """A JSON object in which every key means something."""


class TextPart(_Strict):
    """One part of a content that is a list."""

    type: str
    text: str = ""
    image_url: _Anything = _NULL
    input_audio: _Anything = _NULL
    file: _Anything = _NULL


class Function(_Strict):
    """A call that the model made in an earlier message."""

    name: _Name
    arguments: str = ""


class ToolCall(_Strict):
    """One element of a message's tool_calls."""

    id: str
    function: Function
    type: Literal["function"] = "function"
    index: int | None = None


class Message(_Strict):
    """One message of a conversation. The last fields are those of answers that clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: _Anything = _NULL


class ToolFunction(_Strict):
    """What a tool is called and takes."""

    name: _Name
    description: str | None = None
    parameters: _Anything = _NULL
    strict: bool | None = None


class Tool(_Strict):
    """One element of tools."""

    function: ToolFunction
    type: Literal["function"] = "function"


class ToolChoice(_Strict):
    """A tool that must be called: refused."""

    type: str
    function: _Anything = _NULL
    allowed_tools: _Anything = _NULL


class ResponseFormat(_Strict):
    """The form that the answer must have: only text is not refused."""

    type: str
    json_schema: _Anything = _NULL


class StreamOptions(_Strict):
    """What a stream adds."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _CommonFields(_Strict, kw_only=True):
    """Fields of both kinds of requests."""

    model: str
    max_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    n: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[_Id], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    # Without an effect on the answer:
    user: str | None = None
    metadata: _Anything = _NULL
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    # Their neutral value is accepted:
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    logit_bias: _Anything = _NULL
    store: bool | None = None


class ChatFields(_CommonFields, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[_Anything], Meta(max_length=512)] | None = None  # each a Tool, see `tool_of`
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    modalities: list[str] | None = None
    functions: None = None
    function_call: None = None


class CompletionFields(_CommonFields, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | _Id | list[_Id]] = field()
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


_Fields = TypeVar("_Fields", ChatFields, CompletionFields)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (_NULL, msgspec.Raw(b"{}")),
    "store": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
}


def decode(body: bytes, kind: type[_Fields]) -> _Fields:
    """Return the fields of a request. Raises ApiError, status 400, that names what is wrong with them."""
    try:
        fields = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc)) from exc
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        reason = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise ApiError(400, f"the body is not the JSON of a request: {reason}", code="invalid_json") from exc
    check_neutral(fields)
    return fields


def check_neutral(fields: ChatFields | CompletionFields) -> None:
    """Raise ApiError for a field of OpenAI's that this server does not support, unless it has its neutral value."""
    for name, values in _NEUTRAL.items():
        if getattr(fields, name, None) not in values:
            raise _unsupported(name)
    if isinstance(fields, CompletionFields) and fields.best_of not in (None, fields.n or 1):
        raise _unsupported("best_of", "best_of other than n")
    if isinstance(fields, ChatFields):
        if fields.modalities not in (None, ["text"]):
            raise _unsupported("modalities", "modalities other than text")
        _check_format(fields.response_format)
        _check_tools(fields)


def text_of(content: str | list[TextPart] | None, where: str) -> str:
    """Return the text of a content: parts are concatenated, as in prompt files. Raises ApiError for other parts."""
    if content is None or isinstance(content, str):
        return content or ""
    for at, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text"):
            raise ApiError(400, f"{where}[{at}] is {part.type[:40]!a}: the model takes only text", param="messages")
    return "".join(part.text for part in content)


def tool_of(raw: msgspec.Raw) -> dict[str, Any]:
    """Return a tool as chat templates take it, its keys in the client's order. Raises ApiError for what is no tool."""
    try:
        tool = msgspec.json.decode(raw, type=Tool)
        plain: dict[str, Any] = msgspec.json.decode(raw)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc).replace("`$.", "`$.tools."), param="tools") from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ApiError(400, f"a tool cannot be read: {exc}", param="tools") from exc
    if tool.function.strict:
        raise _unsupported("tools", "a strict tool", "tokens are not constrained to a schema")
    parameters = plain["function"].get("parameters")
    if not isinstance(parameters, dict | type(None)) or _depth(parameters) > _MAX_DEPTH:
        reason = f"the parameters of {tool.function.name[:40]!a} must be an object of at most {_MAX_DEPTH} levels"
        raise ApiError(400, reason, code="invalid_value", param="tools")
    return plain


def _depth(value: Any) -> int:
    """Return how deep a JSON value is nested, counted up to one level too many."""
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth


def _check_format(response_format: ResponseFormat | None) -> None:
    kind = "text" if response_format is None else response_format.type
    if kind in ("json_object", "json_schema"):
        raise _unsupported("response_format", f"response_format {kind}", "tokens are not constrained to a grammar")
    if kind != "text":
        raise ApiError(400, "response_format must have the type text", param="response_format")


def _check_tools(fields: ChatFields) -> None:
    if fields.tool_choice not in (None, "none", "auto"):  # "required", or the name of a tool
        raise _unsupported("tool_choice", "tool_choice other than none and auto", "no call can be forced")
    if fields.tools and fields.parallel_tool_calls is False:
        raise _unsupported("parallel_tool_calls", "parallel_tool_calls false", "the model chooses how many it makes")


def _unsupported(name: str, what: str | None = None, reason: str = "") -> ApiError:
    message = f"{what or name} is not supported" + (f": {reason}" if reason else "")
    return ApiError(400, message, code="unsupported_parameter", param=name)


def _invalid(message: str, *, param: str | None = None) -> ApiError:
    """Return the error for JSON that is not a request; msgspec's message has the place, as $.messages[0].role."""
    if unknown := re.search(r"contains unknown field `([^`]*)`(?: - at `\$\.?(.*)`)?$", message):
        name = ".".join(part for part in (unknown[2], unknown[1]) if part)
        return ApiError(
            400,
            f"the field {name[:80]!a} is not supported",
            code="unsupported_parameter",
            param=param or unknown[1][:80],
        )
    if missing := re.search(r"missing required field `(\w+)`", message):
        return ApiError(400, message, code="missing_parameter", param=param or missing[1])
    place = re.search(r"`\$\.(\w+)", message)
    return ApiError(400, message[:500], code="invalid_value", param=param or (place[1] if place else None))
