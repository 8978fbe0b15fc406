"""/v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tierkv.serving.answers import Ending, Piece, TokenLogprob
from tierkv.serving.choices import Choice, collect, merged, usage_of
from tierkv.serving.fields import ChatFields, Message, decode, text_of, tool_of
from tierkv.serving.responses import EventStream, json_bytes, while_connected
from tierkv.serving.service import GenerationPlan, Service
from tierkv.serving.token_text import TokenTexts
from tierkv.serving.tool_calls import ToolCallFinder, ToolUse

__all__ = ["chat"]

_TOOL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<tool_call>", "</tool_call>")


async def chat(service: Service, request: Request, body: bytes, resources: ExitStack) -> Response:
    """Answer a conversation. resources: closed when the answer is complete; a stream takes them over."""
    fields = decode(body, ChatFields)
    service.check_model(fields.model)
    plan = service.plan(fields)
    service.check_choices(plan.num_choices, "n")
    tools = [tool_of(tool) for tool in fields.tools or ()] if fields.tool_choice != "none" else []
    form = service.tool_format(tools) if tools else None
    messages = [_message(message, f"messages[{at}].content") for at, message in enumerate(fields.messages)]
    prompt = await service.encode_chat(messages, tools, fields.chat_template_kwargs or {})
    resources.enter_context(service.hold_logprobs([prompt], plan))
    choices = [
        resources.enter_context(
            Choice(
                service,
                service.submit(prompt, plan, number),
                plan,
                detokenizer=service.detokenizer(kept=_TOOL_TOKENS if form else ()),
                tools=ToolCallFinder(form, {tool["function"]["name"] for tool in tools}) if form else None,
            )
        )
        for number in range(plan.num_choices)
    ]
    answer = _ChatAnswer(service, plan)
    if plan.is_stream:
        return EventStream(answer.chunks(choices), resources.pop_all())
    value = await while_connected(request, answer.whole(choices))
    return Response(json_bytes(value), media_type="application/json")


def _message(message: Message, where: str) -> dict[str, Any]:
    """Return a message as the chat template takes it."""
    plain: dict[str, Any] = {"role": message.role, "content": text_of(message.content, where)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return plain


class _ChatAnswer:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, service: Service, plan: GenerationPlan) -> None:
        self._service = service
        self._plan = plan
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer when it is complete."""
        answers = await collect(choices)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": _answer_message(answer.text, answer.calls),
                    "logprobs": _logprobs(answer.tokens, self._service.token_texts, self._plan),
                    **_ending_fields(answer.ending, answer.calls),
                }
                for number, answer in enumerate(answers)
            ],
            **usage_of([answer.ending for answer in answers]),
        }

    async def chunks(self, choices: Sequence[Choice]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer's parts as they come."""
        for number in range(len(choices)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        endings: list[Ending] = []
        async for number, piece in merged(choices):
            calls = choices[number].calls if piece.ending else []
            if piece.text or piece.tokens:
                yield self._chunk(number, {"content": piece.text}, piece)
            if calls:
                yield self._chunk(number, {"tool_calls": _calls(calls, with_index=True)})
            if piece.ending:
                endings.append(piece.ending)
                yield self._chunk(number, {}, ending=_ending_fields(piece.ending, calls))
        if self._plan.include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], **usage_of(endings)}

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        piece: Piece | None = None,
        *,
        ending: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": number,
            "delta": delta,
            "logprobs": _logprobs(piece.tokens, self._service.token_texts, self._plan) if piece else None,
            "finish_reason": None,
            **(ending or {}),
        }
        usage = {"usage": None} if self._plan.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _answer_message(text: str, calls: Sequence[ToolUse]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": _calls(calls)}
    return message


def _calls(calls: Sequence[ToolUse], *, with_index: bool = False) -> list[dict[str, Any]]:
    return [
        {
            **({"index": at} if with_index else {}),
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for at, call in enumerate(calls)
    ]


def _ending_fields(ending: Ending, calls: Sequence[ToolUse]) -> dict[str, Any]:
    return {"finish_reason": "tool_calls" if calls else ending.finish_reason, "stop_reason": ending.stop_reason}


def _logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts, plan: GenerationPlan) -> dict[str, Any] | None:
    if plan.sampling.top_logprobs is None:
        return None
    return {
        "content": [
            {
                **_token(token.token_id, token.logprob, texts),
                "top_logprobs": [_token(other, value, texts) for other, value in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token_id), "logprob": max(logprob, -9999.0), "bytes": texts.bytes(token_id)}
