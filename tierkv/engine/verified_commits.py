"""VerifiedCommits: a forward pass is committed only after the model was seen unchanged behind it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

import torch

from tierkv.cache import TierCache
from tierkv.engine.generation import Request
from tierkv.engine.model_identity import ModelCheck
from tierkv.requests.sequence import Sequence

__all__ = ["VerifiedCommits"]


class VerifiedCommits:
    """Commits passes of a runner, each one after the check of the model that followed it. Not thread-safe.

    is_model_known: no code of the caller has run since the last check.
    """

    def __init__(self, cache: TierCache, model_check: ModelCheck) -> None:
        self.model_check = model_check
        self.is_model_known: bool = False
        self._cache = cache
        self._pending: _Pass | None = None

    def plan_check(self, steps: list[tuple[Request, int]]) -> Callable[[], Callable[[], None]] | None:
        """Return a function that starts the check of a pass, to be called after the launch; None if it needs no check.

        A pass needs a check behind it if it completes a block, which is then committed, or if it is a request's last.
        The first pass after the caller had control gets a check beside it. The next check covers all other passes.
        The function returns another one, which waits for the check and raises ConfigError if the model has changed.
        """
        is_committed = self._completes_a_block(steps)
        if not is_committed and self.is_model_known:
            return None
        return partial(self._start_check, None if is_committed else self.model_check.mark())

    def add(self, steps: list[tuple[Request, int]], finish_check: Callable[[], None] | None) -> None:
        """Record a launched pass for `commit`. finish_check: waits for its check; None for a pass without a check."""
        self._pending = _Pass(finish_check, [(r, r.sequence, r.num_computed) for r, _ in steps if r.sequence])

    def commit(self) -> None:
        """Commit the recorded pass, once its check has ended. A pass without a check is left to the next one."""
        done, self._pending = self._pending, None
        if done is None or done.finish_check is None:
            return
        done.finish_check()
        for request, sequence, num_computed in done.computed:
            if request.sequence is sequence:
                request.num_verified = num_computed
                self._cache.commit(sequence, num_computed)

    def drop(self) -> None:
        """Forget the recorded pass: nothing of it is committed."""
        self._pending = None

    def verify(self, running: Items[Request]) -> None:
        """Check the model now, and mark everything as verified that these requests have computed."""
        self._start_check()()
        for request in running:
            request.num_verified = request.num_computed

    def _start_check(self, before: torch.cuda.Event | None = None) -> Callable[[], None]:
        """Check the model while the device computes; sample its tensors after the pass, or from `before` on."""
        finish_check = self.model_check.start(before)
        self.model_check.check()
        self.is_model_known = True
        return finish_check

    def _completes_a_block(self, steps: list[tuple[Request, int]]) -> bool:
        """Return whether a pass completes a block, or is a request's last pass."""
        size = self._cache.config.block_size
        return any(
            (request.num_computed + count) // size > request.num_verified // size
            or request.num_computed + count == request.prompt_tokens + request.max_new_tokens - 1
            for request, count in steps
        )


@dataclass(frozen=True, slots=True)
class _Pass:
    """A launched pass. computed: requests, their sequences, and how many leading tokens then have K and V."""

    finish_check: Callable[[], None] | None
    computed: list[tuple[Request, Sequence, int]]
