"""Runner: runs a Hugging Face decoder over its cache, with packed prefill and batched decode of many prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.engine.attention import AttentionSwitch
from tierkv.engine.backends.factory import make_attention
from tierkv.engine.cascade import CascadeCost
from tierkv.engine.event_queue import EventQueue
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.fused_model import fuse_model, test_fused
from tierkv.engine.generation import Generation, GenerationOptions, ModelRequest, TokenEvent
from tierkv.engine.mla.model import MlaChoice, MlaSwitch, choose_mla, latent_attention
from tierkv.engine.model_identity import ModelCheck, namespace_of
from tierkv.engine.model_state import ModelState
from tierkv.engine.model_support import (
    check_block_size,
    check_split,
    check_supported,
    read_stable_state,
)
from tierkv.engine.models import LoadedModel
from tierkv.engine.replication import are_replicated
from tierkv.engine.request_builder import RequestBuilder
from tierkv.engine.sparse.options import SparseDecode
from tierkv.engine.step_loop import StepLoop
from tierkv.errors import ConfigError
from tierkv.ranks.group import OneRank, RankGroup, agree_min
from tierkv.ranks.hosts import count_on_host
from tierkv.ranks.monitor import RankMonitor, open_monitor
from tierkv.readers.choice import choose_num_readers
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.checks import check_count
from tierkv.values.cores import default_io_threads

__all__ = ["Generation", "GenerationOptions", "Runner", "TokenEvent", "open_runner"]

_POLL_S = 0.002  # while all requests wait for other processes
_ENGINE_WAIT_S = 0.1


class Runner:
    """Generates with one model over its cache; `open_runner` makes it. Not thread-safe: `Engine` is.

    Each rank of a split model has a runner; all ranks make the same calls in the same order.
    max_step_tokens: new tokens of one forward pass at most; longer prompts are computed in pieces.
    cascade: "auto" lets sequences that decode together read a shared prefix once where that is faster; "off" never.
    cascade_cost: the speeds for that decision; None takes those measured on an H200 or a CPU.
    use_graphs: replay CUDA graphs; None does, of a split model only if its collective library can be captured. A model
    whose latents are cached has neither graphs nor a cascade.
    fuse: "auto" merges projections and fuses element-wise kernels on CUDA where the model is known, "off" never, "on"
    on any device. It moves weights: a runner that was opened without it on the same model must be opened anew.
    attention: "auto" takes the fastest attention backend that is known for a batch; "torch", "flash-attn",
    "flashinfer-fa2" or "flashinfer-fa3" takes this one, and raises ConfigError where it does not serve.
    attention_table: a file of measured times for "auto"; None takes the one that comes with tierkv for this GPU.
    state: the model's state when the cache's namespace was made; None reads it now.
    mla: how the cache's layout was chosen; None takes it as the cache has it. It says by `mla.latent` how a DeepSeek
    model attends to the latents in the cache, None for K and V, and by `mla.fallbacks` what failed its self-test.
    sparse: None, or how much of a long sequence each decode step reads. Its answers are approximate, and nothing that
    they computed is kept: see `SparseDecode`. Prompts are computed exactly, and kept, as ever.
    monitor: of a rank of a split model, which notifies the others when a step fails.
    step_loop: computes all requests, of this runner and of its engine.

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
        fuse: str = "auto",
        attention: str = "auto",
        attention_table: Path | None = None,
        state: ModelState | None = None,
        mla: MlaChoice | None = None,
        sparse: SparseDecode | None = None,
        monitor: RankMonitor | None = None,
    ) -> None:
        if cascade not in ("auto", "off"):
            raise ConfigError(f'cascade must be "auto" or "off", got {cascade!r}')
        self.loaded = loaded
        self.cache = cache
        self.max_step_tokens: int = check_count("max_step_tokens", max_step_tokens, least=1)
        self.mla: MlaChoice = mla or _mla_of(loaded, cache)
        self.sparse: SparseDecode | None = sparse
        latent = self.mla.latent
        if latent and sparse:
            raise ConfigError("sparse decode does not read latents", hint='open the model with mla="expanded"')
        self._pass = ForwardPass(
            loaded,
            cache,
            cascade="off" if latent else cascade,
            cascade_cost=cascade_cost,
            use_graphs=False if latent else use_graphs,  # attention over latents is planned anew for each pass
            compute=fuse_model(loaded.model, fuse, cache.ranks),
            attention=make_attention(
                attention,
                torch.device(loaded.model.device),
                table=attention_table,
                num_layers=cache.layout.num_layers,
                waits=cache.ranks.size > 1,
            ),
            sparse=sparse,
        )
        self._attention = MlaSwitch(loaded.model, latent) if latent else AttentionSwitch(loaded.model)
        state = state or read_stable_state(loaded.model)
        with self._attention:
            model_check = ModelCheck(loaded.model, state)
        self._builder = RequestBuilder(loaded.model, cache)
        self.step_loop: StepLoop = StepLoop(
            cache,
            self._pass,
            self._attention,
            model_check,
            self._builder,
            max_step_tokens=self.max_step_tokens,
            monitor=monitor,
        )
        self._commits = self.step_loop.commits

    @property
    def cascade_steps(self) -> int:
        """Forward passes in which sequences read a shared prefix together."""
        return self._pass.cascade_steps

    @property
    def sparse_tokens(self) -> int:
        """Tokens that were computed by sparse attention, and of which the cache has kept nothing."""
        return self._pass.sparse.num_tokens if self._pass.sparse else 0

    @property
    def compute_or_load(self) -> bool:
        """Whether the cold blocks of new requests may load while the first of them are computed."""
        return self.step_loop.may_overlap

    @compute_or_load.setter
    def compute_or_load(self, may_overlap: bool) -> None:
        self.step_loop.may_overlap = may_overlap

    def generate(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> list[Generation]:
        """Continue prompts (lists of token ids), in one batch as far as there is room. Return a result for each.

        All prompts are checked before anything is computed; an error names its prompt by its index. CapacityError if a
        prompt and its new tokens never fit the hot pool. ConfigError for an empty prompt, for unknown token ids, for
        more tokens than the model's context, and for a model that has changed.
        """
        self.cache.calls.require_own_process()
        requests = self._builder.build(prompts, options or GenerationOptions())
        for _ in self._run(requests, is_stream=False):
            pass
        return [request.result() for request in requests]

    def stream(self, prompts: Items[Items[int]], options: GenerationOptions | None = None) -> Iterator[TokenEvent]:
        """Return an iterator over new tokens as they are chosen. Closing it releases every sequence.

        Requests of several open streams are computed together, whichever of them is asked for its next token.
        Raises as `generate` does; for a bad prompt at once, before the iterator is used.
        """
        self.cache.calls.require_own_process()
        return self._run(self._builder.build(prompts, options or GenerationOptions()), is_stream=True)

    def prefill(self, token_ids: Items[int]) -> int:
        """Cache all whole blocks and the partial block of a prompt; compute what is missing.

        Return the number of tokens computed: 0 if all were cached. Raises as `generate` does.
        """
        self.cache.calls.require_own_process()
        request = self._builder.build_prefill(token_ids)
        with self.step_loop.lock, self._attention:
            self._commits.model_check.check()
        if not self.step_loop.is_joint:  # then the other ranks make this call too
            num_cached = self.cache.match(request.token_ids).num_cached_tokens
            if agree_min(self.cache.ranks, num_cached, topic=b"prefill").lowest == request.prompt_tokens:
                return 0
        for _ in self._run([request], is_stream=False):
            pass
        return request.prompt_tokens - sum(request.result().cached_tokens.values())

    def check_model(self) -> None:
        """Compare the whole model with its state when the cache was opened. Raises ConfigError if it has changed.

        Every request checks modules, torch's counts of writes, and a sample of every tensor's bytes. That may miss a
        few numbers written through `.data`: call this method after such a write. It reads all weights once. If it
        raises, close this runner and open another.
        """
        with self.step_loop.lock, torch.inference_mode(), self._attention:
            self._commits.model_check.check_whole()

    def capture_graphs(self, *, max_sequences: int = 256, max_tokens: int = 4096) -> int:
        """Capture the CUDA graphs of decode steps now, which are else captured at their second use.

        For up to so many sequences of up to so many tokens each. Return how many graphs; 0 where none are used.
        All ranks of a split model call this together, before they have an engine: ConfigError after that.
        """
        if self.step_loop.is_joint:
            raise ConfigError("the ranks' engine runs", hint="capture graphs before you open it")
        if self._pass.graphs is None:
            return 0
        with self.step_loop.lock, torch.inference_mode(), self._attention:
            return self._pass.graphs.capture_decoding(max_sequences=max_sequences, max_tokens=max_tokens)

    def wait_for_kernels(self) -> None:
        """Wait for attention kernels that are compiled in the background, one or two minutes on a new machine.

        Requests are served meanwhile, by slower ones and without new CUDA graphs.
        """
        self._pass.attention.wait()

    @contextmanager
    def between_steps(self) -> Iterator[list[Sequence]]:
        """Hold generation between two forward passes and yield the running sequences.

        Inside, their block tables may be rewritten. Another thread may call this method, and no other, while the runner
        generates; it waits for the present pass.
        """
        self.cache.calls.require_own_process()
        with self.step_loop.lock:
            yield self.step_loop.scheduler.sequences()

    def _run(self, requests: list[ModelRequest], *, is_stream: bool) -> Iterator[TokenEvent]:
        """Submit requests, and step until all of them have ended; none of them holds anything at the end.

        is_stream: between two events the caller may run any code, such as training the model.
        """
        loop = self.step_loop
        events = EventQueue(len(requests), calls=self.cache.calls, wants_events=is_stream)
        for request in requests:
            request.reader = events
        try:
            loop.submit(requests)
            while True:
                while (event := events.take()) is not None:
                    yield event
                    self._commits.is_model_known = False
                if events.error is not None:
                    raise events.error
                if not events.num_open:
                    break
                self._drive(events)
        finally:
            loop.abandon(requests)

    def _drive(self, events: EventQueue) -> None:
        """Step once, unless an engine does; then wait for it."""
        self.cache.calls.require_own_process()
        if self.step_loop.is_attached:
            events.wait(_ENGINE_WAIT_S)  # not for ever: the engine may end, and leave the rest to this thread
        elif not self.step_loop.step():
            time.sleep(_POLL_S)


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
    fuse: str = "auto",
    mla: str = "auto",
    attention: str = "auto",
    attention_table: Path | None = None,
    sparse: SparseDecode | None = None,
) -> Iterator[Runner]:
    """Check that a model can be cached, open a cache for it, yield a `Runner`, and close the cache.

    loaded: from `load_model`, or any Hugging Face decoder as LoadedModel(model, tokenizer, name), in eval mode.
    adapter, salt: more of the cache's namespace: a digest of an unmerged adapter; what separates tenants.
    cold: an open store to use in place of `config.cold_path`.
    ranks: of a model that is split over several processes; all of them call this function together. Sizes in `config`
    are of one rank, except `cold_bytes`: one store serves all ranks of a machine. Unless `num_io_threads` is given, the
    ranks of a machine share its cores: together they have no more such threads, and reader processes, than cores.
    What every rank computes as a whole, such as the latent, is stored by one of them.
    mla: "auto" keeps the latent of multi-latent attention in place of K and V where that is supported (DeepSeek-V2 and
    V3) and passes the self-test, "expanded" never, "latent" raises where it cannot. The other options are `Runner`'s.
    Raises UnsupportedModelError, with the reason, before anything is opened. Raises ConfigError for other ranks than
    the model's and for a block_size beyond its context, CapacityError for pools that hold too few blocks.

    >>> loaded = load_model(None, cache_dir=Path("models"))
    >>> with open_runner(loaded, CacheConfig(cold_path="store", block_size=16)) as runner:
    ...     (answer,) = runner.generate([[1, 2, 3]], GenerationOptions(max_new_tokens=2))
    ...     len(answer.token_ids)
    2
    """
    group = ranks or OneRank()
    with ExitStack() as opened:
        monitor = opened.enter_context(open_monitor(group))
        with monitor.step() if monitor else nullcontext():  # opening has collectives, too
            model = loaded.model
            check_supported(model)
            check_split(model, group)
            check_block_size(model, config.block_size)
            config = _share_cores(config, group)
            state = read_stable_state(model)
            choice = choose_mla(model, mla, block_size=config.block_size, ranks=group)
            if choice.latent is None:
                fuse = test_fused(model, choice.layout, fuse, group)
            namespace = namespace_of(
                model,
                choice.layout,
                adapter=adapter,
                salt=salt,
                name=loaded.name,
                ranks=ranks,
                state=state,
                is_replicated=are_replicated(model, choice.layout, group, latent=choice.latent),
            )
            cache = opened.enter_context(
                TierCache(config, namespace=namespace, device=model.device, cold=cold, ranks=ranks)
            )
            runner = Runner(
                loaded,
                cache,
                max_step_tokens=max_step_tokens,
                cascade=cascade,
                cascade_cost=cascade_cost,
                use_graphs=use_graphs,
                fuse=fuse,
                attention=attention,
                attention_table=attention_table,
                state=state,
                mla=choice,
                sparse=sparse,
                monitor=monitor,
            )
            opened.callback(runner._pass.close)
        yield runner


def _mla_of(loaded: LoadedModel, cache: TierCache) -> MlaChoice:
    """Return the attention that a cache's layout wants."""
    latent = latent_attention(loaded.model, "latent") if cache.layout.is_latent else None
    return MlaChoice(layout=cache.layout, latent=latent)


def _share_cores(config: CacheConfig, ranks: RankGroup) -> CacheConfig:
    """Return the config with the I/O threads and reader processes of a rank that shares the machine's cores.

    A number that was given stays.
    """
    if ranks.size == 1:
        return config
    num_here = count_on_host(ranks)  # by all ranks, whether or not each has numbers of its own
    readers = config.num_reader_processes
    return replace(
        config,
        num_io_threads=config.num_io_threads or default_io_threads(num_here),
        num_reader_processes=choose_num_readers(None, ranks=num_here) if readers is None else readers,
    )
