"""VerifiedCommits: a forward pass is committed only after the model was seen unchanged behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from tierkv.engine.model_identity import ModelCheck
from tierkv.requests.sequence import Sequence
from tierkv.scheduling.request import Request

__all__ = ["VerifiedCommits"]


class Commit(Protocol):
    """Commits what a request has computed up to a number of tokens; see `RunningRequests.record_verified`."""

    def __call__(self, request: Request, num_tokens: int, /) -> None: ...


class VerifiedCommits:
    """Commits passes of a runner, each one after the check of the model that followed it. Not thread-safe.

    is_model_known: no code of the caller has run since the last check. commit_request: commits one request.
    """

    def __init__(self, commit_request: Commit, model_check: ModelCheck) -> None:
        self.model_check = model_check
        self.is_model_known: bool = False
        self._commit_request = commit_request
        self._pending: _Pass | None = None

    def plan_check(self, *, is_committed: bool) -> Callable[[], Callable[[], None]] | None:
        """Return a function that starts the check of a pass, to be called after the launch; None if it needs no check.

        is_committed: the pass completes a block, which is then committed, or it is a request's last: the check is
        behind it. The first pass after the caller had control gets a check beside it. The next check covers all other
        passes.
        The function returns another one, which waits for the check and raises ConfigError if the model has changed.
        """
        if not is_committed and self.is_model_known:
            return None
        return partial(self._start_check, None if is_committed else self.model_check.mark())

    def add(self, committed: Iterable[Request], finish_check: Callable[[], None] | None) -> None:
        """Record a launched pass for `commit`.

        committed: the requests to commit, up to what they have computed now. finish_check: waits for the check of the
        pass; None for a pass without a check.
        """
        self._pending = None
        if finish_check is not None:
            self._pending = _Pass(finish_check, [(r, r.sequence, r.num_computed) for r in committed if r.sequence])

    def commit(self) -> None:
        """Commit the recorded pass, once its check has ended. A pass without a check is left to the next one."""
        done, self._pending = self._pending, None
        if done is None:
            return
        done.finish_check()
        for request, sequence, num_computed in done.computed:
            if request.sequence is sequence:
                self._commit_request(request, num_computed)

    def drop(self) -> None:
        """Forget the recorded pass: nothing of it is committed. The next pass is checked."""
        self._pending = None
        self.is_model_known = False

    def verify(self, requests: Iterable[Request]) -> None:
        """Check the model now, if these requests have computed anything since the last check that covers them.

        Everything that they have computed is verified then, and their whole blocks are committed.
        """
        late = [each for each in requests if each.num_verified < each.num_computed]
        if late:
            self._start_check()()
            for request in late:
                self._commit_request(request, request.num_computed)

    def _start_check(self, before: torch.cuda.Event | None = None) -> Callable[[], None]:
        """Check the model while the device computes; sample its tensors after the pass, or from `before` on."""
        finish_check = self.model_check.start(before)
        self.model_check.check()
        self.is_model_known = True
        return finish_check


@dataclass(frozen=True, slots=True)
class _Pass:
    """A launched pass. computed: requests, their sequences, and how many leading tokens then have K and V."""

    finish_check: Callable[[], None]
    computed: list[tuple[Request, Sequence, int]]
