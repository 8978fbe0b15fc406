"""The limits of a server: what one client may ask for, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.values.checks import check_count, check_seconds

__all__ = ["ServeLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """Limits of one server; a request beyond one of them gets an error that names it.

    max_prompt_tokens: of a prompt; None takes what the model's context and the hot pool hold.
    max_new_tokens: of one answer, and what a chat request gets that names no number.
    max_body_bytes: of a request; None takes 1 MiB and 16 bytes for each token of the longest prompt.
    max_choices: answers of one request: its prompts times its n.
    max_logprob_bytes: memory for the log-probabilities of all answers in work.
    max_requests: requests that are answered or wait at the same time. max_connections: open ones.
    max_running, max_waiting: answers that the engine computes together, and those that wait for it.
    max_seconds: for one request; its answer then ends as it is.
    header_s, body_s: for the client to send them. stall_s: for the client to read what is sent.
    stop_s: from the signal to the end of the process. Raises ConfigError for values that make no sense.

    >>> ServeLimits(max_choices=4).max_choices
    4
    """

    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    max_body_bytes: int | None = None
    max_choices: int = 32
    max_logprob_bytes: int = 1 << 30
    max_requests: int = 512
    max_connections: int = 1024
    max_running: int = 256
    max_waiting: int = 1024
    max_seconds: float = 600.0
    header_s: float = 10.0
    body_s: float = 30.0
    stall_s: float = 30.0
    stop_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_body_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1)
        for name in ("max_new_tokens", "max_choices", "max_logprob_bytes", "max_requests", "max_connections"):
            check_count(name, getattr(self, name), least=1)
        for name in ("max_running", "max_waiting"):
            check_count(name, getattr(self, name), least=1)
        for name in ("max_seconds", "header_s", "body_s", "stall_s", "stop_s"):
            check_seconds(name, getattr(self, name), may_be_zero=False)

    def body_bytes(self, prompt_tokens: int) -> int:
        """Return the size that a request may have, where prompts may have so many tokens."""
        return self.max_body_bytes or (1 << 20) + 16 * prompt_tokens
