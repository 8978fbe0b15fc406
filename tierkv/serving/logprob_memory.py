"""How much memory log-probabilities take until their answers are complete, and a limit for those of all answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tierkv.serving.api_errors import ApiError, too_busy
from tierkv.values.units import format_bytes

__all__ = ["LogprobMemory"]

_STREAMED = (150, 125)
_WHOLE = (2600, 600)
"""Bytes of a token, and of each of its most likely tokens: of a stream the numbers alone, which the engine keeps to the
answer's end; of a whole answer also its JSON, as objects and as text. Measured: 14.6 KB of a token with 20."""


class LogprobMemory:
    """Memory for the log-probabilities of all answers together, up to `limit` bytes. For one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used: int = 0

    @contextmanager
    def hold(self, num_tokens: int, top_logprobs: int | None, *, is_stream: bool) -> Iterator[None]:
        """Count the tokens of a request's answers, inside the `with` block.

        top_logprobs: None: none are wanted, and nothing is counted. Raises ApiError: status 400 where one request is
        beyond the limit, 429 where all of them are together.
        """
        token_bytes, top_bytes = _STREAMED if is_stream else _WHOLE
        size = 0 if top_logprobs is None else num_tokens * (token_bytes + top_logprobs * top_bytes)
        if size > self._limit:
            reason = f"log-probabilities of {num_tokens:,} tokens may take {format_bytes(size)} of memory"
            raise ApiError(400, f"{reason}, and the limit is {format_bytes(self._limit)}", param="logprobs")
        if self.used + size > self._limit:
            raise too_busy(f"the log-probabilities of other answers take {format_bytes(self.used)} of memory")
        self.used += size
        try:
            yield
        finally:
            self.used -= size
