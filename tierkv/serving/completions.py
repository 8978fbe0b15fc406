"""/v1/completions: texts or token ids, continued as they are, without a chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tierkv.serving.answers import Ending, TokenLogprob
from tierkv.serving.api_errors import ApiError
from tierkv.serving.choices import Choice, collect, merged, usage_of
from tierkv.serving.fields import CompletionFields, decode
from tierkv.serving.responses import EventStream, json_bytes, while_connected
from tierkv.serving.service import GenerationPlan, Service
from tierkv.serving.token_text import TokenTexts

__all__ = ["completions"]


async def completions(service: Service, request: Request, body: bytes, resources: ExitStack) -> Response:
    """Continue one prompt or several. resources: closed when the answer is complete; a stream takes them over."""
    fields = decode(body, CompletionFields)
    service.check_model(fields.model)
    plan = service.plan(fields)
    texts = _prompts_of(fields)
    service.check_choices(len(texts) * plan.num_choices, "prompt")
    prompts = [await _tokens_of(service, prompt) for prompt in texts]
    resources.enter_context(service.hold_logprobs(prompts, plan))
    choices = [
        resources.enter_context(
            Choice(service, service.submit(prompt, plan, number), plan, detokenizer=service.detokenizer())
        )
        for prompt in prompts
        for number in range(plan.num_choices)
    ]
    answer = _CompletionAnswer(service, plan)
    if plan.is_stream:
        return EventStream(answer.chunks(choices), resources.pop_all())
    value = await while_connected(request, answer.whole(choices))
    return Response(json_bytes(value), media_type="application/json")


def _prompts_of(fields: CompletionFields) -> list[str | list[int]]:
    """Return each prompt as a text or as token ids. Raises ApiError for a mixture in one list."""
    prompt = fields.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(each) for each in prompt}
    if kinds == {int}:
        return [[each for each in prompt if isinstance(each, int)]]
    if kinds not in ({str}, {list}):
        raise ApiError(400, "prompt is a text, a list of texts, token ids, or a list of token ids", param="prompt")
    return [each for each in prompt if not isinstance(each, int)]


async def _tokens_of(service: Service, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await service.encode_text(prompt)
    service.check_prompt(prompt, "prompt")
    return prompt


class _CompletionAnswer:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, service: Service, plan: GenerationPlan) -> None:
        self._texts = service.token_texts
        self._plan = plan
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer when it is complete."""
        answers = await collect(choices)
        return {
            **self._head,
            "choices": [
                self._choice(number, answer.text, answer.tokens, answer.ending, 0)
                for number, answer in enumerate(answers)
            ],
            **self._usage([answer.ending for answer in answers]),
        }

    async def chunks(self, choices: Sequence[Choice]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the answer's parts as they come."""
        endings: list[Ending | None] = [None] * len(choices)
        lengths = [0] * len(choices)
        usage = {"usage": None} if self._plan.include_usage else {}
        async for number, piece in merged(choices):
            endings[number] = piece.ending
            choice = self._choice(number, piece.text, piece.tokens, piece.ending, lengths[number])
            lengths[number] += len(piece.text)
            yield {**self._head, "choices": [choice], **usage}
        if self._plan.include_usage:
            yield {**self._head, "choices": [], **self._usage([ending for ending in endings if ending])}

    def _choice(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], ending: Ending | None, offset: int
    ) -> dict[str, Any]:
        """Return one choice. offset: characters of its text that came before."""
        return {
            "index": number,
            "text": text,
            "logprobs": _logprobs(tokens, self._texts, offset)
            if self._plan.sampling.top_logprobs is not None
            else None,
            "finish_reason": ending.finish_reason if ending else None,
            "stop_reason": ending.stop_reason if ending else None,
        }

    def _usage(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """Return the usage of all prompts together."""
        count = self._plan.num_choices
        parts = [usage_of(endings[at : at + count]) for at in range(0, len(endings), count)]
        return {
            "usage": {
                **{
                    name: sum(part["usage"][name] for part in parts)
                    for name in ("prompt_tokens", "completion_tokens", "total_tokens")
                },
                "prompt_tokens_details": {
                    "cached_tokens": sum(part["usage"]["prompt_tokens_details"]["cached_tokens"] for part in parts)
                },
            },
            "tierkv": {
                "cached_tokens": {
                    tier: sum(part["tierkv"]["cached_tokens"][tier] for part in parts)
                    for tier in parts[0]["tierkv"]["cached_tokens"]
                },
                "ttft_s": min(part["tierkv"]["ttft_s"] for part in parts),
            },
        }


def _logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts, offset: int) -> dict[str, Any]:
    """Return log-probabilities in the form of this older endpoint."""
    pieces = [texts.text(token.token_id) for token in tokens]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": pieces,
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        "top_logprobs": [{texts.text(each): max(value, -9999.0) for each, value in token.top} for token in tokens],
        "text_offset": offsets,
    }
