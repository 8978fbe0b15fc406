"""TokenStream: one request's tokens, for one reader."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tierkv.engine.event_queue import EventQueue
from tierkv.engine.generation import Generation, ModelRequest, TokenEvent
from tierkv.engine.step_loop import StepLoop

__all__ = ["TokenStream"]


class TokenStream:
    """One request's tokens as they are chosen, for one thread or one task of an event loop; `Engine.submit` makes it.

    Iterate over it, with `for` or `async for`, or wait for the end with `result` or `wait`. A request that fails raises
    its error there. One that ends without a last token (cancelled, its deadline, the engine's end) just ends:
    `finish_reason` says why.
    A context manager: leaving it cancels what is left. So does dropping the stream, and leaving an `async for` early.

    >>> with Engine(runner) as engine:
    ...     with engine.submit([1, 2, 3], GenerationOptions(max_new_tokens=2)) as stream:
    ...         tokens = [event.token_id for event in stream]
    ...     len(tokens), stream.finish_reason
    (2, 'length')
    """

    def __init__(self, request: ModelRequest, events: EventQueue, loop: StepLoop) -> None:
        self._request = request
        self._events = events
        self._loop = loop

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended: "stop", "length", "cancelled", "deadline", "shutdown" or "error"; None before that."""
        return None if self._events.num_open else self._request.finish_reason

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed for this request; 0 before it has started."""
        return sum((self._request.cached_tokens or {}).values())

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        while True:
            is_over = not self._events.num_open  # before the look: a request ends behind its last token
            if (event := self._events.take()) is not None:
                return event
            if is_over:
                self._raise_error()
                raise StopIteration
            self._events.wait()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                is_over = not self._events.num_open
                if (event := self._events.take()) is not None:
                    yield event
                elif is_over:
                    self._raise_error()
                    return
                else:
                    await self._events.wait_in_loop()
        finally:
            self.close()

    def result(self) -> Generation:
        """Block until the request has ended. Return all of its tokens, those included that were read before."""
        self._events.wait(until_end=True)
        return self._request.result()

    async def wait(self) -> Generation:
        """Do as `result`, as a part of an event loop's task."""
        await self._events.wait_in_loop(until_end=True)
        return self._request.result()

    def cancel(self) -> None:
        """Let the request end at the next step. It does nothing if it has ended. Thread-safe."""
        if self._events.num_open:
            self._loop.cancel(self._request)

    def close(self) -> None:
        """Cancel what is left; wait for nothing. May be called twice."""
        self.cancel()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._events.num_open:
            self._loop.cancel_later(self._request)

    def _raise_error(self) -> None:
        if self._events.error is not None:
            raise self._events.error
