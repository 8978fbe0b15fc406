"""PersistentCache: tierkv's warm and cold tiers below `model.generate` of one Transformers model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.store import BlockStore
from tierkv.engine.model_seam import Seam
from tierkv.errors import ConfigError
from tierkv.integrations.transformers.blocks import BlockCopier
from tierkv.integrations.transformers.call import CachedModel, GenerateCall
from tierkv.integrations.transformers.identity import identify
from tierkv.integrations.transformers.statistics import GenerateStats, StatsRecorder
from tierkv.storage.cold import ColdStore
from tierkv.values.namespace import Namespace

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PersistentCache", "persistent_cache"]


def persistent_cache(
    model: Any,
    path: str | Path | None = None,
    *,
    block_size: int = 64,
    adapter: str = "",
    salt: str = "",
    name: str = "",
    compute_or_load: bool = True,
    config: BlockStoreConfig | None = None,
    cold: ColdStore | None = None,
) -> PersistentCache:
    """Give `model.generate` a prefix cache that survives a restart, until the returned object is closed.

    model: a decoder of Transformers, in eval mode, on one device; or PEFT's wrapper of one.
    path: directory of the store; several processes may share it. None, without `config`: memory only.
    block_size: tokens of a block; only whole blocks are kept.
    adapter: a digest of an unmerged adapter's content and scale. salt: separates tenants. name: for humans.
    compute_or_load: load a prefix only where that was measured to be faster than computing it; False always loads.
    config: more options of the store, in place of `path`. cold: an open store, which a process opens only once.
    Raises UnsupportedModelError, with the reason, for a model whose K and V cannot be reused by prefix. Raises
    ConfigError in train mode, for a model with a persistent cache, and for a block_size beyond its context.

    >>> with persistent_cache(model, "store") as cache:
    ...     output = model.generate(**inputs, max_new_tokens=32)
    ...     cache.stats().num_loaded_tokens
    0
    """
    if path is not None and config is not None:
        raise ConfigError("say path or config, not both")
    if config is None:
        config = BlockStoreConfig(cold_path=Path(path) if path is not None else None)
    if not config.warm_bytes:
        raise ConfigError("a persistent cache needs warm_bytes")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return PersistentCache(
        inner,
        config,
        block_size=block_size,
        adapter=adapter,
        salt=salt,
        name=name,
        compute_or_load=compute_or_load,
        cold=cold,
    )


class PersistentCache:
    """The prefix cache of one model; `persistent_cache` makes it. Context manager; thread-safe.

    `model.generate` returns what it would return without the cache, but for rounding: the prefill computes fewer tokens
    at once. Calls that cannot be cached run as plain `generate`, and are counted with their reason. All else that the
    model does is not touched, and its weights may be trained: then nothing is loaded or saved any more.
    """

    def __init__(
        self,
        model: Any,
        config: BlockStoreConfig,
        *,
        block_size: int,
        adapter: str = "",
        salt: str = "",
        name: str = "",
        compute_or_load: bool = True,
        cold: ColdStore | None = None,
    ) -> None:
        if any(isinstance(held, Seam) for held in vars(model).values()):
            raise ConfigError(f"{type(model).__name__} has a persistent cache already", hint="close it first")
        identity = identify(model, block_size=block_size, adapter=adapter, salt=salt, name=name)
        self.model: Any = model
        self.namespace: Namespace = identity.namespace
        self.store: BlockStore = BlockStore(config, namespace=identity.namespace, cold=cold)
        self._stats = StatsRecorder()
        self._calls = threading.local()
        self._seams: dict[str, tuple[Seam, Any]] = {}
        self._is_closed = False
        try:
            blocks = BlockCopier(self.store, model.device, compute_or_load=compute_or_load)
            self._cached = CachedModel(
                model=model,
                store=self.store,
                blocks=blocks,
                guard=identity.guard,
                stats=self._stats,
                caches_padding=identity.caches_padding,
            )
            handlers = {
                "generate": self._generate,
                "_prefill": self._prefill,
                "prepare_inputs_for_generation": self._prepare_inputs,
            }
            for method, handler in handlers.items():
                seam = Seam(getattr(model, method), handler)
                self._seams[method] = seam, vars(model).get(method)
                vars(model)[method] = seam
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stats(self) -> GenerateStats:
        """Return what the cache did so far. `store.stats()` has the tiers."""
        return self._stats.snapshot()

    def flush(self) -> None:
        """Wait until everything saved lies on the disk. Raises StoreError where that cannot be."""
        self.store.flush()

    def close(self) -> None:
        """Make `model.generate` plain again, and close the store. May be called twice."""
        self._is_closed = True
        held = vars(self.model)
        for method, (seam, before) in self._seams.items():
            if held.get(method) is not seam:
                continue  # another wrapper was put around it, and finds a plain function in it
            del held[method]
            if before is not None:
                held[method] = before
        self.store.close()

    # What Transformers calls in place of the model's methods.

    def _generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_closed or getattr(self._calls, "call", None) is not None:  # a call inside another one is plain
            return original(*args, **kwargs)
        call = GenerateCall(self._cached, _fault_of_arguments(kwargs))
        self._stats.add(num_calls=1)
        self._calls.call = call
        try:
            result = original(*args, **kwargs)
        finally:
            self._calls.call = None
            call.detach()
        call.finish(result)
        if call.fault and not self._is_closed:
            self._stats.add_uncached(call.fault)
        return result

    def _prefill(self, original: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, **options: Any) -> Any:
        call: GenerateCall | None = getattr(self._calls, "call", None)
        if call is None:
            return original(input_ids, generation_config, model_kwargs, **options)
        return call.prefill(original, input_ids, generation_config, model_kwargs, **options)

    def _prepare_inputs(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = original(*args, **kwargs)
        call: GenerateCall | None = getattr(self._calls, "call", None)
        if call is not None:
            call.add_pass(inputs)
        return inputs


def _fault_of_arguments(arguments: dict[str, Any]) -> str | None:
    """Return why a call is plain that its arguments decide, of those that its prefill does not see."""
    for name in ("cache", "past_key_values"):
        if arguments.get(name) is not None:
            return "the caller's own cache"
    for name in ("custom_generate", "assistant_model", "synced_gpus", "inputs_embeds"):
        if arguments.get(name) is not None and arguments[name] is not False:
            return f"the argument {name}"
    return None
