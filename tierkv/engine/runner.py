"""Runner: runs a Hugging Face decoder over its cache, with packed prefill and batched decode of many prompts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from threading import RLock

import torch

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionSwitch
from tierkv.engine.cascade import CascadeCost
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.generation import Generation, GenerationOptions, Request, TokenEvent
from tierkv.engine.model_identity import ModelCheck, namespace_of
from tierkv.engine.model_state import ModelState
from tierkv.engine.model_support import (
    check_block_size,
    check_split,
    check_supported,
    probe_layout,
    read_stable_state,
    self_test,
)
from tierkv.engine.models import LoadedModel
from tierkv.engine.request_builder import RequestBuilder
from tierkv.engine.sampling import BatchSampler, Choice, Sampler, SamplingOptions
from tierkv.engine.verified_commits import VerifiedCommits
from tierkv.errors import CapacityError, ConfigError
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.checks import check_count

__all__ = ["Generation", "GenerationOptions", "Runner", "TokenEvent", "open_runner"]

_LOOK_AHEAD = 64
"""Waiting requests considered before each pass, so that a request that waits for a prefix does not delay the others."""


class Runner:
    """Generates with one model over its cache. Not thread-safe; `open_runner` makes it.

    Each rank of a split model has a runner; all ranks make the same calls in the same order.
    max_step_tokens: new tokens of one forward pass at most; longer prompts are computed in pieces.
    cascade: "auto" lets sequences that decode together read a shared prefix once where that is faster; "off" never.
    cascade_cost: the speeds for that decision; None takes those measured on an H200 or a CPU.
    use_graphs: replay CUDA graphs; None does unless the model is split.
    state: the model's state when the cache's namespace was made; None reads it now.

        runner.prefill(system_ids)  # later requests with this prefix find it in the cache
        (answer,) = runner.generate([system_ids + question_ids], GenerationOptions(max_new_tokens=16))
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: TierCache,
        *,
        max_step_tokens: int = 8192,
        cascade: str = "auto",
        cascade_cost: CascadeCost | None = None,
        use_graphs: bool | None = None,
        state: ModelState | None = None,
    ) -> None:
        if cascade not in ("auto", "off"):
            raise ConfigError(f'cascade must be "auto" or "off", got {cascade!r}')
        self.loaded = loaded
        self.cache = cache
        self.max_step_tokens = check_count("max_step_tokens", max_step_tokens, least=1)
        self.compute_or_load: bool = cache.config.compute_or_load
        self._pass = ForwardPass(loaded, cache, cascade=cascade, cascade_cost=cascade_cost, use_graphs=use_graphs)
        self._attention = AttentionSwitch(loaded.model)
        state = state or read_stable_state(loaded.model)
        with self._attention:
            self._commits = VerifiedCommits(cache, ModelCheck(loaded.model, state))
        self._builder = RequestBuilder(loaded.model, cache)
        self._sampler = BatchSampler()
        self._stepping = RLock()
        self._batches: list[list[Request]] = []

    @property
    def cascade_steps(self) -> int:
        """Forward passes in which sequences read a shared prefix together."""
        return self._pass.cascade_steps

    def generate(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> list[Generation]:
        """Continue prompts (lists of token ids), in one batch as far as there is room. Return a result for each.

        All prompts are checked before anything is computed; an error names its prompt by its index. CapacityError if a
        prompt and its new tokens never fit the hot pool. ConfigError for an empty prompt, for unknown token ids, for
        more tokens than the model's context, and for a model that has changed.
        """
        self.cache.calls.require_own_process()
        chosen = options or GenerationOptions()
        requests = self._builder.build(prompts, chosen)
        for _ in self._run(requests, chosen, is_stream=False):
            pass
        return [request.result() for request in requests]

    def stream(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> Iterator[TokenEvent]:
        """Return an iterator over new tokens as they are chosen. Closing it releases every sequence.

        Raises as `generate` does; for a bad prompt at once, before the iterator is used.
        """
        self.cache.calls.require_own_process()
        chosen = options or GenerationOptions()
        return self._run(self._builder.build(prompts, chosen), chosen, is_stream=True)

    def prefill(self, token_ids: Items[int]) -> int:
        """Cache all whole blocks and the partial block of a prompt; compute what is missing.

        Return the number of tokens computed: 0 if all were cached. Raises as `generate` does.
        """
        self.cache.calls.require_own_process()
        token_ids = self._builder.check_prompt(token_ids)
        with self._attention:
            self._commits.model_check.check()
        num_cached = self.cache.match(token_ids).num_cached_tokens
        if self.cache.ranks.agree_min(num_cached, topic=b"prefill").lowest == len(token_ids):
            return 0
        sequence = self.cache.acquire(token_ids)
        request = Request(0, token_ids, len(token_ids), Sampler(SamplingOptions()), frozenset(), 0.0, max_new_tokens=1)
        request.sequence = sequence
        request.num_computed = request.num_verified = sequence.num_cached_tokens
        self._commits.is_model_known = False
        try:
            with torch.inference_mode(), self._attention:
                while request.num_computed < len(token_ids):
                    self._step([request])
                self._commits.commit()
            self.cache.commit(sequence, len(token_ids), partial_block=True)
        finally:
            self._commits.drop()
            self.cache.release(sequence)
        return len(token_ids) - sequence.num_cached_tokens

    def check_model(self) -> None:
        """Compare the whole model with its state when the cache was opened. Raises ConfigError if it has changed.

        Every request checks modules, torch's counts of writes, and a sample of every tensor's bytes. That may miss a
        few numbers written through `.data`: call this method after such a write. It reads all weights once. If it
        raises, close this runner and open another.
        """
        with self._stepping, torch.inference_mode(), self._attention:
            self._commits.model_check.check_whole()

    @contextmanager
    def between_steps(self) -> Iterator[list[Sequence]]:
        """Hold generation between two forward passes and yield the running sequences.

        Inside, their block tables may be rewritten. Another thread may call this method, and no other, while the runner
        generates; it waits for the present pass.
        """
        self.cache.calls.require_own_process()
        with self._stepping:
            yield [request.sequence for request in chain.from_iterable(self._batches) if request.sequence]

    def _run(self, requests: list[Request], options: GenerationOptions, *, is_stream: bool) -> Iterator[TokenEvent]:
        """Admit, compute and sample until every request is done; release every sequence at the end.

        is_stream: between two events the caller may run any code, such as training the model.
        """
        waiting = deque(requests)
        running: list[Request] = []
        self._commits.is_model_known = is_checked = False
        try:
            self._batches.append(running)
            while waiting or running:
                self.cache.calls.require_own_process()
                with self._stepping, torch.inference_mode(), self._attention:
                    self._admit(waiting, running, options)
                    if not is_checked:  # later checks run while the device computes
                        self._commits.model_check.check()
                        is_checked = True
                    events = self._advance(waiting, running, options)
                yield from events
                self._commits.is_model_known &= not is_stream
        finally:
            self._commits.drop()
            with self._stepping, ExitStack() as ending:  # calls every callback, even if one raises
                self._batches = [batch for batch in self._batches if batch is not running]
                for request in requests:
                    if request in running:
                        ending.callback(self._release, request, options)
                    elif request.sequence:  # interrupted while admitted or ended: what is computed is uncertain
                        ending.callback(self.cache.release, request.sequence)

    def _admit(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> None:
        """Start waiting requests in order while there is room. Raises CapacityError if none runs and none fits.

        A request whose next block a running request computes waits until that block is cached.
        """
        for request in list(islice(waiting, _LOOK_AHEAD)):
            if options.use_cache and self._waits_for_a_prefix(request, running):
                continue
            request.admitted_at, request.had_company = time.perf_counter(), False
            try:
                request.sequence = self.cache.acquire(
                    request.token_ids, reuse=options.use_cache, overlap=self.compute_or_load
                )
            except CapacityError:
                if not running:
                    raise
                return
            request.num_computed = request.claimed_end = request.num_verified = request.sequence.num_cached_tokens
            if request.cached_tokens is None:
                request.cached_tokens = request.sequence.cached_tokens
            waiting.remove(request)
            running.append(request)

    def _waits_for_a_prefix(self, request: Request, running: Items[Request]) -> bool:
        """Return whether a running request still computes whole blocks of this request's prompt."""
        size = self.cache.config.block_size
        return any(request.common_tokens(other) // size * size > other.num_verified for other in running)

    def _advance(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> list[TokenEvent]:
        """Run one forward pass and choose a token for each request whose prompt is now computed."""
        events: list[TokenEvent] = []
        started, num_tokens = time.perf_counter(), _tokens_of_one(running)
        for request in running:
            request.had_company |= len(running) > 1
        ended: list[Request] = []
        for request, choice in self._step(running, keep_logits=options.keep_logits):
            token = choice.token_id
            request.last_token_at = time.perf_counter()
            if request.first_token_at is None:
                request.first_token_at = request.last_token_at
                if request.sequence and not request.had_company:
                    request.sequence.overlap.record(request.last_token_at - request.admitted_at)
            request.token_ids.append(token)
            is_last = token in request.stop_ids or len(request.new_ids) == request.max_new_tokens
            events.append(TokenEvent(request.number, token, is_last))
            if num_tokens and request.sequence:
                request.sequence.overlap.record(request.last_token_at - started, num_tokens=num_tokens)
            if is_last:
                ended.append(request)
        if events:
            self._commits.commit()  # before the caller gets a token of it
        if any(request.num_verified < request.num_computed for request in ended):  # a stop token ended it
            self._commits.verify(running)
        for request in ended:
            running.remove(request)
            self._release(request, options)
        self._grow(waiting, running, options)
        return events

    def _step(self, running: Items[Request], *, keep_logits: bool = False) -> list[tuple[Request, Choice]]:
        """Compute up to `max_step_tokens` tokens, and commit the pass before.

        Return the tokens of requests that are up to date. They leave the device before committed blocks do: else they
        would wait behind a gigabyte of blocks.
        """
        steps = self._plan_step(running)
        started = time.perf_counter()
        ids = [request.token_ids[request.num_computed : request.num_computed + count] for request, count in steps]
        start_check = self._commits.plan_check(steps)
        try:
            logits = self._pass.run([request.step(count) for request, count in steps], list(chain.from_iterable(ids)))
        except BaseException:
            self._commits.model_check.check()  # a changed model may fail anyhow: then the change is the better error
            raise
        finish_check = start_check() if start_check else None
        ready: list[int] = []
        for row, (request, count) in enumerate(steps):
            request.num_computed += count
            if request.num_computed == len(request.token_ids):
                ready.append(row)
        requests = [steps[row][0] for row in ready]
        sampling = self._sampler.start(logits, [each.sampler for each in requests], rows=ready) if ready else None
        if keep_logits:
            for row, request in zip(ready, requests, strict=True):
                request.logits.append(logits[row].float().cpu())
        loading = [r.sequence.overlap for r, _ in steps if r.sequence and r.sequence.overlap.is_loading]
        self._commits.commit()  # the pass before, while the device computes this one
        self._commits.add(steps, finish_check)
        choices = sampling.wait() if sampling else []
        if loading and not choices:
            self._pass.wait()
        if loading:  # the next piece is claimed when this one is computed, not when it is launched
            loading[0].record(time.perf_counter() - started, num_tokens=sum(count for _, count in steps))
            self._commits.commit()
        return list(zip(requests, choices, strict=True))

    def _plan_step(self, running: Items[Request]) -> list[tuple[Request, int]]:
        """Return how many tokens each request computes next, decoding requests first; wait while all of them load."""
        while True:
            room = self.max_step_tokens
            steps: list[tuple[Request, int]] = []
            for request in sorted(running, key=lambda r: len(r.token_ids) - r.num_computed):
                count = min(room, self._num_computable(request))
                if count:
                    steps.append((request, count))
                    room -= count
            if steps or not running:
                return steps
            for request in running:
                if request.sequence and request.sequence.overlap.is_loading:
                    self._claim_piece(request, wait=True)
                    break

    def _num_computable(self, request: Request) -> int:
        """Return how many tokens of a request may be computed now; while its cold blocks load, those of its claim."""
        assert request.sequence is not None
        if request.sequence.overlap.is_loading and request.claimed_end == request.num_computed:
            self._claim_piece(request, wait=False)
        end = request.claimed_end if request.sequence.overlap.is_loading else len(request.token_ids)
        return end - request.num_computed

    def _claim_piece(self, request: Request, *, wait: bool) -> None:
        """Take the next piece of a request whose cold blocks load; all that it has claimed is computed."""
        assert request.sequence is not None
        piece = request.sequence.overlap.next_piece(wait=wait)
        if piece.start != request.num_computed:  # loaded blocks lie between
            request.num_computed = request.num_verified = piece.start
        request.claimed_end = piece.stop

    def _grow(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> None:
        """Take room for the tokens just chosen; if there is none, the youngest requests wait again."""
        for request in list(running):
            while request in running and request.sequence and request.sequence.num_tokens < len(request.token_ids):
                try:
                    self.cache.append(request.sequence, request.token_ids[request.sequence.num_tokens :])
                except CapacityError:
                    youngest = running[-1]
                    if len(running) == 1:
                        raise
                    running.remove(youngest)
                    self._release(youngest, options)
                    waiting.appendleft(youngest)

    def _release(self, request: Request, options: GenerationOptions) -> None:
        if request.sequence is None:
            return
        try:
            if options.store_partial and options.use_cache:
                self.cache.commit(request.sequence, request.num_verified, partial_block=True)
        finally:
            self.cache.release(request.sequence)
            request.sequence = None


@contextmanager
def open_runner(
    loaded: LoadedModel,
    config: CacheConfig,
    *,
    adapter: str = "",
    salt: str = "",
    cold: ColdStore | None = None,
    ranks: RankGroup | None = None,
    max_step_tokens: int = 8192,
    cascade: str = "auto",
    cascade_cost: CascadeCost | None = None,
    use_graphs: bool | None = None,
) -> Iterator[Runner]:
    """Check that a model can be cached, open a cache for it, yield a `Runner`, and close the cache.

    loaded: from `load_model`, or any Hugging Face decoder as LoadedModel(model, tokenizer, name), in eval mode.
    adapter, salt: more of the cache's namespace: a digest of an unmerged adapter; what separates tenants.
    cold: an open store to use in place of `config.cold_path`.
    ranks: of a model that is split over several processes; all of them call this function together. Sizes in `config`
    are of one rank, except `cold_bytes`: one store serves all ranks of a machine. The other options are `Runner`'s.
    Raises UnsupportedModelError, with the reason, before anything is opened. Raises ConfigError for other ranks than
    the model's and for a block_size beyond its context, CapacityError for pools that hold too few blocks.

    >>> loaded = load_model(None, cache_dir=Path("models"))
    >>> with open_runner(loaded, CacheConfig(cold_path="store", block_size=16)) as runner:
    ...     (answer,) = runner.generate([[1, 2, 3]], GenerationOptions(max_new_tokens=2))
    ...     len(answer.token_ids)
    2
    """
    model = loaded.model
    check_supported(model)
    check_split(model, ranks or OneRank())
    check_block_size(model, config.block_size)
    state = read_stable_state(model)
    layout = probe_layout(model, block_size=config.block_size)
    self_test(model, layout)
    namespace = namespace_of(model, layout, adapter=adapter, salt=salt, name=loaded.name, ranks=ranks, state=state)
    with TierCache(config, namespace=namespace, device=model.device, cold=cold, ranks=ranks) as cache:
        yield Runner(
            loaded,
            cache,
            max_step_tokens=max_step_tokens,
            cascade=cascade,
            cascade_cost=cascade_cost,
            use_graphs=use_graphs,
            state=state,
        )


def _tokens_of_one(running: Items[Request]) -> int:
    """Return how many tokens the next pass computes if it is of one request and waits for no copy; else 0."""
    sequence = running[0].sequence if len(running) == 1 else None
    if sequence is None or sequence.loads or sequence.overlap.is_loading:
        return 0
    return len(running[0].token_ids) - running[0].num_computed
