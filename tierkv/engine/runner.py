"""Runs a Hugging Face decoder over the paged cache: packed prefill of what is not cached, batched decode."""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from threading import RLock

import torch
from torch import Tensor

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionSwitch
from tierkv.engine.cascade import CascadeCost
from tierkv.engine.fingerprint import namespace_of
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.gate import (
    check_block_size,
    check_split,
    check_supported,
    context_of,
    probe_layout,
    self_test,
    settled_state,
)
from tierkv.engine.generation import Generation, GenerationOptions, TokenEvent
from tierkv.engine.model_check import ModelCheck
from tierkv.engine.model_state import ModelState
from tierkv.engine.models import LoadedModel
from tierkv.engine.request import Request
from tierkv.engine.sampling import Sampler, SamplingOptions
from tierkv.errors import CapacityError, ConfigError
from tierkv.ranks.group import OneRank, RankGroup
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.block import as_token_array

__all__ = ["Generation", "GenerationOptions", "Runner", "TokenEvent", "open_runner"]

_LOOK_AHEAD = 64
"""Waiting requests that are looked at before each pass: one that waits for another's prefix holds up none of them."""


class Runner:
    """One model and its cache. Not thread-safe.

    A model that is split over several ranks has a runner on each; they are given the same calls in the same order.
    max_step_tokens: new tokens that one forward pass takes at most; longer prompts are computed in pieces.
    cascade: "auto" lets sequences that decode together read a shared prefix once for all of them where that pays,
    "off" never does. cascade_cost: by what to judge that, instead of the speeds measured on an H200 or a CPU.
    use_graphs: replay CUDA graphs; None says yes to a model that is whole on its device.
    state: what the model was when the cache's namespace was made of it; None reads it now.
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
        if max_step_tokens < 1:
            raise ConfigError(f"max_step_tokens must be positive, got {max_step_tokens}")
        if cascade not in ("auto", "off"):
            raise ConfigError(f'cascade must be "auto" or "off", got {cascade!r}')
        self.loaded = loaded
        self.cache = cache
        self.max_step_tokens = max_step_tokens
        self.compute_or_load = cache.config.compute_or_load
        self._pass = ForwardPass(loaded, cache, cascade=cascade, cascade_cost=cascade_cost, use_graphs=use_graphs)
        self._attention = AttentionSwitch(loaded.model)
        state = state or settled_state(loaded.model)
        with self._attention:
            self._model_check = ModelCheck(loaded.model, state)
        self._unverified: _Pass | None = None
        self._is_model_known = False  # no code of the caller's has run since the model was last looked at
        self._stepping = RLock()
        self._batches: list[list[Request]] = []
        self._num_ids = loaded.model.get_input_embeddings().num_embeddings
        self._context = context_of(loaded.model)

    @property
    def cascade_steps(self) -> int:
        """Forward passes in which sequences read a shared prefix together."""
        return self._pass.cascade_steps

    def generate(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> list[Generation]:
        """Continue prompts, all in one batch as far as there is room.

        All are checked before anything is computed; what is raised names the prompt by its number, from 0.
        CapacityError if one never fits, new tokens included; ConfigError for an empty one, for token ids that the model
        has not, and for more tokens, new ones included, than its context.
        """
        self.cache.calls.require_own_process()
        chosen = options or GenerationOptions()
        requests = self._requests(prompts, chosen)
        for _ in self._run(requests, chosen, is_stream=False):
            pass
        return [request.result() for request in requests]

    def stream(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> Iterator[TokenEvent]:
        """Return an iterator over the tokens, each as it is chosen. Closing it releases every sequence.

        Raises as `generate` does, and for a bad prompt here, before anything is computed.
        """
        self.cache.calls.require_own_process()
        chosen = options or GenerationOptions()
        return self._run(self._requests(prompts, chosen), chosen, is_stream=True)

    def prefill(self, token_ids: Items[int]) -> int:
        """Make every whole block and the partial block of a prompt cached; compute what is missing.

        Returns the number of tokens computed: 0 where all are cached already. Raises as `generate` does.
        """
        self.cache.calls.require_own_process()
        token_ids = self._checked(token_ids)
        with self._attention:
            self._model_check.look()
        num_cached = self.cache.match(token_ids).num_cached_tokens
        if self.cache.ranks.agree_min(num_cached, topic=b"prefill").lowest == len(token_ids):
            return 0
        sequence = self.cache.acquire(token_ids)
        sampler = Sampler(SamplingOptions())
        request = Request(0, list(token_ids), len(token_ids), sampler, frozenset(), 0.0, max_new_tokens=1)
        request.sequence, request.num_computed = sequence, sequence.num_cached_tokens
        request.num_verified = request.num_computed
        self._is_model_known = False
        try:
            with torch.inference_mode(), self._attention:
                while request.num_computed < len(token_ids):
                    self._step([request])
                self._commit_pass()
            self.cache.commit(sequence, len(token_ids), partial_block=True)
        finally:
            self._unverified = None
            self.cache.release(sequence)
        return len(token_ids) - sequence.num_cached_tokens

    def check_model(self) -> None:
        """Compare all of the model with what it was when the cache was opened. Raises ConfigError if it has changed.

        Requests look at its modules, at the counts that torch keeps of writes, and at a sample of every tensor's bytes.
        That does not see for sure a few numbers written through `.data`: call this after such a write. It reads all
        weights once. Where it raises, close this runner and open another one.
        """
        with self._stepping, torch.inference_mode(), self._attention:
            self._model_check.check_whole()

    @contextmanager
    def between_steps(self) -> Iterator[list[Sequence]]:
        """Hold generation between two forward passes and yield the sequences that are running.

        Inside, their block tables may be rewritten. The one thing here that another thread may call while this runner
        generates; it waits for the pass that is computed now.
        """
        self.cache.calls.require_own_process()
        with self._stepping:
            requests = chain.from_iterable(self._batches)
            yield [request.sequence for request in requests if request.sequence]

    def _requests(self, prompts: Items[Items[int]], options: GenerationOptions) -> list[Request]:
        """Check a whole batch before anything of it is computed, and return its requests."""
        now = time.perf_counter()
        stop_ids = self._stop_ids() if options.stop_ids is None else options.stop_ids
        sampling = self._agreed(options.sampling)
        equal: Counter[bytes] = Counter()  # prompts so far, by their token ids
        requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            try:
                token_ids = self._checked(prompt, options.max_new_tokens)
            except (ConfigError, CapacityError) as exc:
                raise type(exc)(f"prompt {number} of the batch: {exc}") from exc
            key = array("I", token_ids).tobytes() if sampling.temperature else b""
            sampler = Sampler(sampling, number=equal[key])
            equal[key] += 1
            requests.append(
                Request(
                    number, token_ids, len(token_ids), sampler, stop_ids, now, max_new_tokens=options.max_new_tokens
                )
            )
        return requests

    def _agreed(self, sampling: SamplingOptions) -> SamplingOptions:
        """Return sampling that is the same on all ranks: without a seed each would choose other tokens."""
        if self.cache.ranks.size == 1 or sampling.seed is not None or not sampling.temperature:
            return sampling
        seeds = self.cache.ranks.gather(str(torch.Generator().seed()).encode())
        return replace(sampling, seed=int(seeds[0]))

    def _checked(self, prompt: Items[int], num_new: int = 1) -> list[int]:
        """Return a prompt's token ids. Raises ConfigError for none, for ids, and for positions, that the model has not,
        CapacityError for more tokens than the hot pool holds.
        """
        token_ids = as_token_array(prompt)
        limit, num_tokens = self._context, len(token_ids)
        if not num_tokens:
            raise ConfigError("a prompt needs at least one token")
        if limit is not None and num_tokens > limit:
            raise ConfigError(f"a prompt of {num_tokens} tokens is longer than the model's context of {limit}")
        if limit is not None and num_tokens + num_new - 1 > limit:  # the last new one is not computed
            raise ConfigError(
                f"{num_tokens} tokens of a prompt and {num_new} new ones exceed the model's context of {limit}",
                hint="lower max_new_tokens",
            )
        if (largest := int(token_ids.max())) >= self._num_ids:
            raise ConfigError(f"token id {largest} is not one of the model's {self._num_ids}")
        size, num_blocks = self.cache.config.block_size, self.cache.hot.num_blocks
        if num_tokens + num_new - 1 > size * num_blocks:
            raise CapacityError(
                f"{num_tokens} tokens of a prompt and {num_new} new ones never fit the hot pool, which holds "
                f"{num_blocks} blocks of {size}",
                hint="raise hot_bytes" if num_tokens > size * num_blocks else "raise hot_bytes or lower max_new_tokens",
            )
        as_list: list[int] = token_ids.tolist()
        return as_list

    def _stop_ids(self) -> frozenset[int]:
        ids = getattr(self.loaded.model.generation_config, "eos_token_id", None)
        return frozenset() if ids is None else frozenset(ids if isinstance(ids, list) else [ids])

    def _run(self, requests: list[Request], options: GenerationOptions, *, is_stream: bool) -> Iterator[TokenEvent]:
        """Admit, compute, sample, until every request is done; leave nothing acquired behind.

        is_stream: the caller does what it likes between two events, such as training the model.
        """
        waiting = deque(requests)
        running: list[Request] = []
        self._is_model_known = is_checked = False
        try:
            self._batches.append(running)
            while waiting or running:
                self.cache.calls.require_own_process()
                with self._stepping, torch.inference_mode(), self._attention:
                    self._admit(waiting, running, options)
                    if not is_checked:  # later passes are looked at while the device computes them
                        self._model_check.look()
                        is_checked = True
                    events = self._advance(waiting, running, options)
                yield from events
                self._is_model_known &= not is_stream
        finally:
            self._unverified = None
            with self._stepping, ExitStack() as ending:  # which calls all of them, whatever one raises
                self._batches = [batch for batch in self._batches if batch is not running]
                for request in requests:
                    if request in running:
                        ending.callback(self._release, request, options)
                    elif request.sequence:  # interrupted on its way in or out: what is computed is not known for sure
                        ending.callback(self.cache.release, request.sequence)

    def _admit(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> None:
        """Start waiting requests in order while there is room; the first of an idle cache must fit.

        A request whose next block is being computed by a running one waits for it and finds it cached then.
        """
        for request in list(islice(waiting, _LOOK_AHEAD)):
            if options.use_cache and self._waits_for_a_prefix(request, running):
                continue
            request.admitted_at, request.had_company = time.perf_counter(), False
            try:
                request.sequence = self.cache.acquire(
                    request.token_ids, reuse=options.use_cache, may_split=self.compute_or_load
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
        """Return whether a running request has whole blocks of this one's prompt still to compute."""
        size = self.cache.config.block_size
        return any(request.common_tokens(other) // size * size > other.num_verified for other in running)

    def _advance(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> list[TokenEvent]:
        """Run one forward pass and choose a token for each request whose prompt is now computed."""
        events: list[TokenEvent] = []
        started, num_tokens = time.perf_counter(), _tokens_of_one(running)
        for request in running:
            request.had_company |= len(running) > 1
        ended: list[Request] = []
        for request, fetched in self._step(running, keep_logits=options.keep_logits):
            token = request.sampler.choose(fetched)
            request.last_token_at = time.perf_counter()
            if request.first_token_at is None:
                request.first_token_at = request.last_token_at
                if request.sequence and not request.had_company:
                    self.cache.note_loaded(request.sequence, request.last_token_at - request.admitted_at)
            request.token_ids.append(token)
            is_last = token in request.stop_ids or len(request.new_ids) == request.max_new_tokens
            events.append(TokenEvent(request.number, token, is_last))
            if num_tokens:
                self.cache.note_computed(num_tokens, request.last_token_at - started)
            if is_last:
                ended.append(request)
        if events:
            self._commit_pass()  # before a token of it is given away
        if any(request.num_verified < request.num_computed for request in ended):  # no pass was known to be its last
            self._check_model_of(running)
        for request in ended:
            running.remove(request)
            self._release(request, options)
        self._grow(waiting, running, options)
        return events

    def _step(self, running: Items[Request], *, keep_logits: bool = False) -> list[tuple[Request, Tensor]]:
        """Compute up to `max_step_tokens` tokens; `_commit_pass` commits them.

        Return what the samplers of requests that are up to date have fetched. It leaves the device before anything that
        is committed does: a token would wait behind a gigabyte of blocks on their way down.
        """
        steps = self._plan_step(running)
        started = time.perf_counter()
        ids = [request.token_ids[request.num_computed : request.num_computed + count] for request, count in steps]
        is_committed = self._completes(steps)
        is_check_due = is_committed or not self._is_model_known
        before = self._model_check.mark() if is_check_due and not is_committed else None
        try:
            logits = self._pass.run([request.step(count) for request, count in steps], list(chain.from_iterable(ids)))
        except BaseException:
            self._model_check.look()  # a changed model may fail in ways of its own: then that is what is told
            raise
        finish_check = self._start_check(before) if is_check_due else None
        ready: list[tuple[Request, Tensor]] = []
        for row, (request, count) in enumerate(steps):
            request.num_computed += count
            if request.num_computed == len(request.token_ids):
                ready.append((request, request.sampler.fetch(logits[row])))
                if keep_logits:
                    request.logits.append(logits[row].float().cpu())
        splits = [(r.sequence.split, n) for r, n in steps if r.sequence and r.sequence.split]
        self._commit_pass()  # the one before, now that the device has this one to do
        computed = [(r, r.sequence, r.num_computed) for r, _ in steps if r.sequence]
        self._unverified = _Pass(finish_check, computed)
        if ready or splits:
            self._pass.wait()
        if splits:  # the next piece is claimed when this one is computed, not when it is launched
            self.cache.note_computed(sum(count for _, count in steps), time.perf_counter() - started)
            self._commit_pass()
        return ready

    def _commit_pass(self) -> None:
        """Commit what the last pass has computed, once it is known that the model was still the cache's after it.

        A pass behind which nobody looked at the model is left to the next one that is looked behind.
        """
        if self._unverified is None:
            return
        done, self._unverified = self._unverified, None
        if done.finish_check is None:
            return
        done.finish_check()
        for request, sequence, num_computed in done.computed:
            if request.sequence is sequence:
                request.num_verified = num_computed
                self.cache.commit(sequence, num_computed)

    def _completes(self, steps: list[tuple[Request, int]]) -> bool:
        """Return whether a pass completes a block, which is then committed, or is a request's last one.

        The model is looked at after such a pass, and beside the first pass since the caller had control. The next look
        covers all other passes.
        """
        size = self.cache.config.block_size
        return any(
            (request.num_computed + count) // size > request.num_verified // size
            or request.num_computed + count == request.prompt_tokens + request.max_new_tokens - 1
            for request, count in steps
        )

    def _start_check(self, before: torch.cuda.Event | None = None) -> Callable[[], None]:
        """Look at the model while the device computes, and take a sample after the pass, or beside it from `before`."""
        finish_check = self._model_check.start(before)
        self._model_check.look()
        self._is_model_known = True
        return finish_check

    def _check_model_of(self, running: Items[Request]) -> None:
        """Look at the model once all passes so far are done, and say that it was the cache's after them."""
        self._start_check()()
        for request in running:
            request.num_verified = request.num_computed

    def _plan_step(self, running: Items[Request]) -> list[tuple[Request, int]]:
        """Return which requests compute how many tokens next, decoding ones first; waits where all are loading."""
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
                if request.sequence and request.sequence.split:
                    request.sequence.split.wait()
                    break

    def _num_computable(self, request: Request) -> int:
        """Return how many tokens of a request may be computed now: while cold blocks load, what is this side's."""
        assert request.sequence is not None
        split = request.sequence.split
        if split is None:
            return len(request.token_ids) - request.num_computed
        if request.claimed_end == request.num_computed:
            is_done = split.is_done  # before the question: afterwards nothing more comes back from the loader
            size = self.cache.config.block_size
            request.claimed_end += size * split.next_piece(most=max(1, self.cache.config.piece_tokens // size))
            if request.claimed_end == request.num_computed and is_done:
                request.num_computed = request.num_verified = self.cache.join(request.sequence)
                return len(request.token_ids) - request.num_computed
        return request.claimed_end - request.num_computed

    def _grow(self, waiting: deque[Request], running: list[Request], options: GenerationOptions) -> None:
        """Take room for the tokens just chosen; where there is none, the youngest requests wait again."""
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
    """Check that a model can be cached, open a cache for it, and close that again. The options are `Runner`'s.

    ranks: of a model that is split over several processes, all of which call this together. Sizes in `config` are
    a rank's own, save for `cold_bytes`: one store serves all ranks of a machine.
    Raises UnsupportedModelError, with the reason, before anything is opened; ConfigError where ranks do not fit, and
    for a block_size beyond the model's context; CapacityError where the pools hold too few such blocks.

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
    state = settled_state(model)
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


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass that was launched. computed: whose, and how many leading tokens of each have K and V by it.

    finish_check: waits until it is known that the model was still the cache's; None where it was not looked at.
    """

    finish_check: Callable[[], None] | None
    computed: list[tuple[Request, Sequence, int]]


def _tokens_of_one(running: Items[Request]) -> int:
    """Return how many tokens the next pass computes, if it is one request's and waits for no copy; else 0."""
    if len(running) != 1 or running[0].sequence is None or running[0].sequence.loads or running[0].sequence.split:
        return 0
    return len(running[0].token_ids) - running[0].num_computed
