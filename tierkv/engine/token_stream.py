"""TokenStream: one request's tokens, for one reader."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from tierkv.background.active_calls import ActiveCalls
from tierkv.engine.generation import Generation, ModelRequest, TokenEvent, Wake
from tierkv.engine.sampling import Choice
from tierkv.engine.step_loop import StepLoop
from tierkv.engine.wakeup import Wakeup

__all__ = ["TokenStream"]


class TokenStream:
    """One request's tokens as they are chosen, for one thread or one task of an event loop; `Engine.submit` makes it.

    Iterate over it, with `for` or `async for`, or wait for the end with `result` or `wait`. A request that fails raises
    its error there. One that ends without a last token (cancelled, its deadline, the engine's end) just ends:
    `finish_reason` says why.
    A context manager: leaving it cancels what is left. So does dropping the stream, and leaving an `async for` early.

    >>> loaded = load_model(None, cache_dir=Path("models"))
    >>> with open_runner(loaded, CacheConfig(block_size=16)) as runner, Engine(runner) as engine:
    ...     with engine.submit([1, 2, 3], GenerationOptions(max_new_tokens=2)) as stream:
    ...         tokens = [event.token_id for event in stream]
    ...     len(tokens), stream.finish_reason
    (2, 'length')
    """

    def __init__(self, request: ModelRequest, loop: StepLoop, calls: ActiveCalls) -> None:
        """Become the reader of a request that is not submitted yet. calls: of the cache."""
        self._request = request
        self._loop = loop
        self._progress = _Progress(calls)
        self._num_read = 0
        request.reader = self._progress

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended: "stop", "length", "cancelled", "deadline", "shutdown" or "error"; None before that."""
        return self._request.finish_reason if self._progress.is_over else None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed for this request; 0 before it has started."""
        return sum((self._request.cached_tokens or {}).values())

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenEvent:
        while (event := self._take()) is None:
            if self._is_read():
                raise StopIteration
            self._progress.wakeup.wait(self._has_news)
        return event

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                if (event := self._take()) is not None:
                    yield event
                elif self._is_read():
                    return
                else:
                    await self._progress.wakeup.wait_in_loop(self._has_news)
        finally:
            self.close()

    def result(self) -> Generation:
        """Block until the request has ended. Return all of its tokens, those included that were read before."""
        with self._progress.only_the_end():
            self._progress.wakeup.wait(lambda: self._progress.is_over)
        return self._request.result()

    async def wait(self) -> Generation:
        """Do as `result`, as a part of an event loop's task."""
        with self._progress.only_the_end():
            await self._progress.wakeup.wait_in_loop(lambda: self._progress.is_over)
        return self._request.result()

    def cancel(self) -> None:
        """Let the request end at the next step. It does nothing if it has ended. Thread-safe."""
        if not self._progress.is_over:
            self._loop.cancel(self._request)

    def close(self) -> None:
        """Cancel what is left; wait for nothing. May be called twice."""
        self.cancel()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._progress.is_over:
            self._loop.cancel_later(self._request)

    def _has_news(self) -> bool:
        return self._progress.num_tokens > self._num_read or self._progress.is_over

    def _is_read(self) -> bool:
        """Return whether nothing more will come. Raises the error of a request that failed."""
        if not self._progress.is_over or self._progress.num_tokens > self._num_read:
            return False
        if self._request.error is not None:
            raise self._request.error
        return True

    def _take(self) -> TokenEvent | None:
        """Return the next token; None if there is none now."""
        at, request, progress = self._num_read, self._request, self._progress
        if at == progress.num_tokens:
            return None
        self._num_read += 1
        last_at, reason = progress.last
        is_last = last_at == self._num_read
        return TokenEvent(
            prompt=request.number,
            token_id=request.token_ids[request.prompt_tokens + at],
            is_last=is_last,
            logprob=request.logprobs[at] if request.logprobs else None,
            top_logprobs=request.top_logprobs[at] if request.top_logprobs else (),
            finish_reason=reason if is_last else None,
        )


class _Progress:
    """Satisfies `Reader`: how many tokens of a request may be read. The tokens themselves are the request's.

    So a step makes no object for a token, and a stream without a reader costs little.
    """

    wants_events: bool = True

    def __init__(self, calls: ActiveCalls) -> None:
        self.wakeup = Wakeup(calls)
        self.num_tokens: int = 0
        self.last: tuple[int, str | None] = (0, None)  # how many tokens there are with the last one, and its reason
        self.is_over: bool = False
        self._skips_tokens = False

    @contextmanager
    def only_the_end(self) -> Iterator[None]:
        """Let the reader sleep until the end, whatever tokens come."""
        self._skips_tokens = True
        try:
            yield
        finally:
            self._skips_tokens = False

    def put(self, request: ModelRequest, choice: Choice, reason: str | None) -> tuple[Wake, Callable[[], None]] | None:
        """Note one more token."""
        if reason:
            self.last = self.num_tokens + 1, reason  # before the count, which lets a reader look
        self.num_tokens += 1
        return None if self._skips_tokens else self.wakeup.wake()

    def end(self, request: ModelRequest) -> tuple[Wake, Callable[[], None]] | None:
        """Note the end."""
        self.is_over = True
        return self.wakeup.wake()
