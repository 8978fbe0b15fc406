"""The answers of one request: each a token stream, read together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tierkv.engine.token_stream import TokenStream
from tierkv.serving.answers import Ending, Piece, TokenLogprob, pieces_of
from tierkv.serving.api_errors import shutting_down
from tierkv.serving.responses import end_tasks
from tierkv.serving.service import GenerationPlan, Service
from tierkv.serving.text import Detokenizer, StopFinder
from tierkv.serving.tool_calls import ToolCallFinder, ToolUse
from tierkv.values.block import Tier

__all__ = ["Answer", "Choice", "collect", "merged", "usage_of"]


@dataclass(slots=True)
class Answer:
    """One complete answer."""

    ending: Ending
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolUse] = field(default_factory=list)


class Choice:
    """One answer that is being computed. Context manager: the end of the block cancels what is left of it.

    calls: of tools, known with the last piece.
    """

    def __init__(
        self,
        service: Service,
        stream: TokenStream,
        plan: GenerationPlan,
        *,
        detokenizer: Detokenizer,
        tools: ToolCallFinder | None = None,
    ) -> None:
        self.calls: list[ToolUse] = []
        self._service = service
        self._stream = stream
        self._plan = plan
        self._detokenizer = detokenizer
        self._tools = tools
        self._is_counted = False

    def __enter__(self) -> Choice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stream.close()
        if not self._is_counted:  # the client is gone, or the engine has failed
            self._service.monitor.outcomes["cancelled"] += 1

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the parts of the answer; calls are taken out of its text."""
        finder = StopFinder(self._plan.stops)
        found = pieces_of(self._stream, self._detokenizer, finder, own_stop_ids=self._plan.own_stop_ids)
        async with aclosing(found) as pieces:
            async for piece in pieces:
                text = self._tools.push(piece.text) if self._tools else piece.text
                if piece.ending:
                    self._count(piece.ending)
                    if self._tools:
                        rest, self.calls = self._tools.finish()
                        text += rest
                if text or piece.tokens or piece.ending:
                    yield Piece(text=text, tokens=piece.tokens, ending=piece.ending)

    def _count(self, ending: Ending) -> None:
        self._is_counted = True
        self._service.monitor.record(
            outcome=ending.outcome,
            prompt_tokens=ending.prompt_tokens,
            cached_tokens=sum(ending.cached_tokens.values()),
            new_tokens=ending.new_tokens,
            ttft_s=ending.ttft_s,
        )


async def collect(choices: Sequence[Choice]) -> list[Answer]:
    """Return all answers when they are complete. Raises ApiError where the server ended before the first token."""
    parts: list[list[Piece]] = [[] for _ in choices]
    async with aclosing(merged(choices)) as pieces:
        async for number, piece in pieces:
            parts[number].append(piece)
    answers = []
    for choice, found in zip(choices, parts, strict=True):
        ending = found[-1].ending
        assert ending is not None
        if ending.outcome == "shutdown" and not ending.new_tokens:
            raise shutting_down()
        tokens = [token for piece in found for token in piece.tokens]
        answers.append(Answer(ending, "".join(piece.text for piece in found), tokens, choice.calls))
    return answers


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of several answers as they come, with the number of each. Raises the first error of any."""
    if len(choices) == 1:
        async with aclosing(choices[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    items: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(len(choices))
    tasks = [asyncio.create_task(_put_pieces(number, choice, items)) for number, choice in enumerate(choices)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        await end_tasks(*tasks)


async def _put_pieces(number: int, choice: Choice, items: asyncio.Queue[tuple[int, Piece] | Exception | None]) -> None:
    try:
        async with aclosing(choice.pieces()) as pieces:
            async for piece in pieces:
                await items.put((number, piece))
    except Exception as exc:  # noqa: BLE001 - raised again by the reader of the queue
        await items.put(exc)
    else:
        await items.put(None)


def usage_of(endings: Sequence[Ending]) -> dict[str, Any]:
    """Return the fields `usage` and `tierkv` of a request. Answers to one prompt count its tokens once.

    cached_tokens: those that none of its answers had to compute.
    """
    first = endings[0]
    least = min(endings, key=lambda ending: sum(ending.cached_tokens.values()))
    cached = sum(least.cached_tokens.values())
    new = sum(ending.new_tokens for ending in endings)
    return {
        "usage": {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": first.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "tierkv": {
            "cached_tokens": {tier.value: least.cached_tokens.get(tier, 0) for tier in Tier},
            "ttft_s": round(min(ending.ttft_s for ending in endings), 6),
        },
    }
