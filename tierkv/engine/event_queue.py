"""EventQueue: the tokens of all requests of one call of a runner, in their order, on their way to the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tierkv.background.active_calls import ActiveCalls
from tierkv.engine.generation import ModelRequest, TokenEvent, Wake
from tierkv.engine.sampling import Choice
from tierkv.engine.wakeup import Wakeup

__all__ = ["EventQueue"]


class EventQueue:
    """Satisfies `Reader`. It has one place for each new token of its requests, so it needs no bound of its own.

    wants_events: whether tokens are kept; else only the ends of requests are noted. num_open: requests that have not
    ended yet. error: of the first request that failed.
    """

    def __init__(self, num_requests: int, *, calls: ActiveCalls, wants_events: bool) -> None:
        self.num_open: int = num_requests
        self.error: BaseException | None = None
        self.wants_events: bool = wants_events
        self._events: deque[TokenEvent] = deque()
        self._wakeup = Wakeup(calls)

    def take(self) -> TokenEvent | None:
        """Return the next event; None if there is none now."""
        return self._events.popleft() if self._events else None

    def wait(self, timeout_s: float) -> None:
        """Block until there is an event or all requests have ended, or for `timeout_s`."""
        self._wakeup.wait(lambda: bool(self._events) or not self.num_open, timeout_s=timeout_s)

    def put(self, request: ModelRequest, choice: Choice, reason: str | None) -> tuple[Wake, Callable[[], None]] | None:
        """Add a token."""
        self._events.append(
            TokenEvent(
                prompt=request.number,
                token_id=choice.token_id,
                is_last=reason is not None,
                logprob=choice.logprob,
                top_logprobs=choice.top,
                finish_reason=reason,
            )
        )
        return self._wakeup.wake()

    def end(self, request: ModelRequest) -> tuple[Wake, Callable[[], None]] | None:
        """Note that a request has ended."""
        self.error = self.error or request.error
        self.num_open -= 1
        return self._wakeup.wake()
