"""PassRunner: one forward pass over running requests, and the choice of their next tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.generation import ModelRequest
from tierkv.engine.outbox import Outbox
from tierkv.engine.sampling import BatchSampler, Choice, Sampling
from tierkv.engine.verified_commits import VerifiedCommits
from tierkv.requests.sequence import Sequence
from tierkv.scheduling.running import RunningRequests

__all__ = ["Outcome", "PassRunner", "Step"]

Step = tuple[ModelRequest, int]
"""A request, and how many of its tokens a pass computes."""


@dataclass(slots=True)
class Outcome:
    """What became of a pass. The caller ends requests and takes blocks.

    ended: requests that end, and why. failed: requests for which no token could be chosen. outgrown: requests whose
    blocks are full. num_computed, num_new: tokens; num_cached: those of prompts which have just got their first token.
    """

    num_computed: int
    ended: list[tuple[ModelRequest, str]] = field(default_factory=list)
    failed: list[tuple[ModelRequest, Exception]] = field(default_factory=list)
    outgrown: list[ModelRequest] = field(default_factory=list)
    num_new: int = 0
    num_cached: int = 0


class PassRunner:
    """Computes passes, one at a time. In a pass of many decoding requests, what it does for each one is little.

    The order in a pass: launch, launch the choice of tokens, commit the pass before and notify readers while the device
    computes, wait for the tokens (the only wait), commit this pass, add the tokens.
    """

    def __init__(
        self, forward_pass: ForwardPass, commits: VerifiedCommits, outbox: Outbox, running: RunningRequests
    ) -> None:
        self._pass = forward_pass
        self._commits = commits
        self._outbox = outbox
        self._running = running
        self._sampler = BatchSampler()

    def run(self, steps: list[Step]) -> Outcome:
        """Run one forward pass, and choose a token for each request whose tokens are now all computed.

        Raises what the model raises, and ConfigError if it has changed: then no token of the pass is added.
        """
        started = time.perf_counter()
        alone = self._tokens_of_one(steps)
        outcome = Outcome(num_computed=sum(count for _, count in steps))
        committed: list[ModelRequest] = [
            request for request, n in steps if request.num_computed + n >= request.check_at
        ]
        logits, finish_check = self._launch(steps, is_committed=bool(committed))
        loading = self._note_computed(steps)
        ready, rows, sampling = self._start_sampling(steps, logits)
        self._commits.commit()  # the pass before, while the device computes this one
        self._commits.add(committed, finish_check)
        self._outbox.deliver()
        if loading is not None:  # the next piece is claimed when this one is computed, not when it is launched
            self._pass.wait()
            loading.overlap.record(time.perf_counter() - started, num_tokens=outcome.num_computed)
            self._commits.commit()
        if ready:
            chosen = sampling.wait() if sampling else self._choose_one_by_one(ready, rows, logits, outcome)
            self._commits.commit()  # before the caller gets a token of it
            self._commits.verify([r for r, choice in zip(ready, chosen, strict=True) if choice.token_id in r.stop_ids])
            now = time.perf_counter()
            self._add_tokens(ready, chosen, now, outcome)
            if alone and (sequence := steps[0][0].sequence):
                sequence.overlap.record(now - started, num_tokens=alone)
        for request in committed:
            if not request.max_new_tokens and request.num_computed == request.prompt_tokens:  # no token is wanted
                self._commits.commit()
                outcome.ended.append((request, "length"))
        return outcome

    def _launch(self, steps: list[Step], *, is_committed: bool) -> tuple[Tensor, Callable[[], None] | None]:
        """Launch a pass and its check. Return logits, and a function that waits for the check."""
        ids: list[int] = []
        parts = []
        for request, count in steps:
            sequence, part, past = request.sequence, request.step, request.num_computed
            assert sequence is not None
            part.block_table, part.num_past, part.num_new = sequence.block_table, past, count
            part.loads = sequence if sequence.loads else None
            part.sequence, part.is_decoding = sequence, not request.is_prefilling
            parts.append(part)
            if count == 1:
                ids.append(request.token_ids[past])
            else:
                ids += request.token_ids[past : past + count]
        start_check = self._commits.plan_check(is_committed=is_committed)
        try:
            logits = self._pass.run(parts, ids)
        except BaseException:
            self._commits.model_check.check()  # a changed model may fail anyhow: then the change is the better error
            raise
        return logits, start_check() if start_check else None

    def _note_computed(self, steps: list[Step]) -> Sequence | None:
        """Note what a launched pass computes. Return a sequence of it whose cold blocks still load, if there is one."""
        loading = None
        for request, count in steps:
            request.num_computed += count
            if request.is_prefilling and request.sequence is not None and request.sequence.overlapped_load is not None:
                loading = request.sequence
        return loading

    def _start_sampling(
        self, steps: list[Step], logits: Tensor
    ) -> tuple[list[ModelRequest], list[int], Sampling | None]:
        """Launch the choice of the next tokens. Return the requests that get one, and their rows of the logits.

        The last part is None if there is none, or if the choice fails for one of them.
        """
        rows = [
            row
            for row, (request, _) in enumerate(steps)
            if request.num_computed == len(request.token_ids) and request.max_new_tokens
        ]
        ready = [steps[row][0] for row in rows]
        if not ready:
            return [], [], None
        sampling = None
        try:
            sampling = self._sampler.start(logits, [request.sampler for request in ready], rows=rows)
        except Exception:  # noqa: BLE001 - found out one by one, each for its own request
            pass
        for row, request in zip(rows, ready, strict=True):
            if request.keep_logits:
                request.logits.append(logits[row].float().cpu())
        return ready, rows, sampling

    def _choose_one_by_one(
        self, ready: list[ModelRequest], rows: list[int], logits: Tensor, outcome: Outcome
    ) -> list[Choice]:
        """Choose the token of each request alone. Those whose choice fails leave `ready`: the others go on."""
        chosen: list[Choice] = []
        for row, request in zip(rows, list(ready), strict=True):
            try:
                chosen += self._sampler.start(logits, [request.sampler], rows=[row]).wait()
            except Exception as exc:  # noqa: BLE001 - of this request alone
                ready.remove(request)
                outcome.failed.append((request, exc))
        return chosen

    def _add_tokens(self, ready: list[ModelRequest], chosen: list[Choice], now: float, outcome: Outcome) -> None:
        """Add the chosen tokens to their requests, and note which end with them or outgrow their blocks."""
        outcome.num_new = len(ready)
        add = self._outbox.add
        for request, choice in zip(ready, chosen, strict=True):
            token, ids = choice.token_id, request.token_ids
            ids.append(token)
            request.num_new += 1
            reason = None
            if token in request.stop_ids:
                reason = "stop"
            elif request.num_new >= request.max_new_tokens:
                reason = "length"
            if choice.logprob is not None:
                request.logprobs.append(choice.logprob)
                request.top_logprobs.append(choice.top)
            if request.is_prefilling:
                self._note_first(request, now, outcome)
            add(request, choice, reason)
            if reason:
                request.last_token_at = now
                outcome.ended.append((request, reason))
            elif len(ids) > request.capacity:
                outcome.outgrown.append(request)

    def _note_first(self, request: ModelRequest, now: float, outcome: Outcome) -> None:
        """Note the first token of a request since it was admitted."""
        self._running.note_decoding(request)
        if request.first_token_at is None:
            request.first_token_at = now
            outcome.num_cached += sum((request.cached_tokens or {}).values())
            if request.sequence and not request.had_company:
                request.sequence.overlap.record(now - request.admitted_at)

    def _tokens_of_one(self, steps: list[Step]) -> int:
        """Return how many tokens a pass computes if it is of one request and waits for no copy; else 0."""
        if len(steps) > 1 or len(self._running) > 1:
            return 0
        ((request, count),) = steps
        sequence = request.sequence
        if sequence is None or sequence.loads or sequence.overlapped_load or not request.max_new_tokens:
            return 0
        return count if request.num_computed + count == len(request.token_ids) else 0
