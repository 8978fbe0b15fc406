"""One answer as it comes: tokens from the engine become text, log-probabilities and an ending."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from tierkv.engine.generation import Generation, TokenEvent
from tierkv.engine.token_stream import TokenStream
from tierkv.serving.text import Detokenizer, StopFinder
from tierkv.values.block import Tier

__all__ = ["Ending", "Piece", "TokenLogprob", "pieces_of"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log-probability, and those of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an answer ended.

    finish_reason: "stop" or "length". stop_reason: the stop string or the token id that ended it, or "deadline",
    "shutdown" or "cancelled"; None for the end of a sequence and for the wanted number of tokens.
    new_tokens: generated ones, with the last. cached_tokens: of the prompt, by tier.
    """

    finish_reason: str
    stop_reason: str | int | None
    prompt_tokens: int
    new_tokens: int
    cached_tokens: dict[Tier, int]
    ttft_s: float

    @property
    def outcome(self) -> str:
        """What ended the answer, in one word for the counters."""
        early = self.stop_reason in ("deadline", "shutdown", "cancelled") and self.finish_reason == "length"
        return str(self.stop_reason) if early else self.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer: more text, tokens that are complete in it, or the ending."""

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    ending: Ending | None = None


async def pieces_of(
    stream: TokenStream, detokenizer: Detokenizer, finder: StopFinder, *, own_stop_ids: frozenset[int]
) -> AsyncGenerator[Piece, None]:
    """Yield an answer's pieces; the last one has the ending.

    A token that ended the answer has no text, nor has what follows the beginning of a stop string. own_stop_ids: those
    that the request named. The engine's errors are raised from here. The caller closes the stream.
    """
    text = _AnswerText(detokenizer, finder)
    async for event in stream:  # to its end: leaving it early would cancel the request
        if text.is_over or event.finish_reason == "stop":
            continue
        if piece := text.push(event):
            yield piece
        if finder.found is not None:
            text.is_over = True
            stream.cancel()
    result = await stream.wait()
    rest = text.finish()
    yield Piece(text=rest.text, tokens=rest.tokens, ending=_ending(result, text, finder, own_stop_ids))


def _ending(result: Generation, text: _AnswerText, finder: StopFinder, own_stop_ids: frozenset[int]) -> Ending:
    reason = result.finish_reason
    stop_reason: str | int | None = None
    new_tokens = len(result.token_ids)
    if finder.found is not None:
        finish, stop_reason, new_tokens = "stop", finder.found, text.num_tokens
    elif reason == "stop":
        finish = "stop"
        stop_reason = result.token_ids[-1] if result.token_ids[-1] in own_stop_ids else None
    else:
        finish = "length"
        stop_reason = None if reason == "length" else reason
    return Ending(
        finish_reason=finish,
        stop_reason=stop_reason,
        prompt_tokens=result.prompt_tokens,
        new_tokens=new_tokens,
        cached_tokens=result.cached_tokens,
        ttft_s=result.ttft_s,
    )


class _AnswerText:
    """The text so far, and the tokens whose text is not out yet."""

    def __init__(self, detokenizer: Detokenizer, finder: StopFinder) -> None:
        self._detokenizer = detokenizer
        self._finder = finder
        self._pending: list[tuple[int, TokenLogprob]] = []  # with the number of characters before the token's
        self._num_characters = 0
        self._num_out = 0
        self.num_tokens = 0
        self.is_over = False

    def push(self, event: TokenEvent) -> Piece | None:
        """Return what one more token makes certain; None for nothing."""
        if event.logprob is not None:
            token = TokenLogprob(event.token_id, event.logprob, event.top_logprobs)
            self._pending.append((self._num_characters, token))
        self.num_tokens += 1
        text = self._detokenizer.push(event.token_id)
        self._num_characters += len(text)
        return self._piece(self._finder.push(text))

    def finish(self) -> Piece:
        """Return the rest."""
        text = self._finder.push(self._detokenizer.finish())
        if self._finder.found is None:
            text += self._finder.finish()
        return self._piece(text, is_last=self._finder.found is None) or Piece()

    def _piece(self, text: str, *, is_last: bool = False) -> Piece | None:
        self._num_out += len(text)
        count = len(self._pending)
        if not is_last:
            count = sum(start < self._num_out for start, _ in self._pending)
        tokens = tuple(token for _, token in self._pending[:count])
        del self._pending[:count]
        return Piece(text=text, tokens=tokens) if text or tokens else None
