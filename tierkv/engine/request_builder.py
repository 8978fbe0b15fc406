"""RequestBuilder: checks a call's prompts and makes its requests, before anything is computed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tierkv.cache import TierCache
from tierkv.engine.generation import GenerationOptions, ModelRequest
from tierkv.engine.model_support import context_of
from tierkv.engine.sampling import Sampler, SamplingOptions
from tierkv.errors import CapacityError, ConfigError
from tierkv.values.block import as_token_array, iter_chain

__all__ = ["RequestBuilder"]


class RequestBuilder:
    """Makes requests for one model and its cache.

    leads: the first rank alone takes requests, so it asks no other rank for seeds.
    """

    def __init__(self, model: Any, cache: TierCache) -> None:
        self._model = model
        self._cache = cache
        self._num_ids = model.get_input_embeddings().num_embeddings
        self._context = context_of(model)
        self.leads: bool = False

    def build(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> list[ModelRequest]:
        """Return a request for each prompt. Raises as `check_prompt`, with the index of the prompt in the message."""
        sampling = self.sampling_of_all_ranks(options.sampling)
        equal: Counter[bytes] = Counter()  # prompts so far, by their token ids
        requests: list[ModelRequest] = []
        for number, prompt in enumerate(prompts):
            try:
                token_ids = self.check_prompt(prompt, options.max_new_tokens)
            except (ConfigError, CapacityError) as exc:
                raise type(exc)(f"prompt {number} of the batch: {exc}") from exc
            key = token_ids.tobytes() if sampling.temperature else b""
            sampler = Sampler(sampling, number=equal[key])
            equal[key] += 1
            requests.append(self._request(token_ids, options, sampler, number=number))
        return requests

    def build_one(self, prompt: Sequence[int], options: GenerationOptions, *, number: int) -> ModelRequest:
        """Return a request for one prompt. number: its index among equal prompts. Raises as `check_prompt`."""
        token_ids = self.check_prompt(prompt, options.max_new_tokens)
        return self._request(token_ids, options, Sampler(options.sampling, number=number))

    def build_prefill(self, prompt: Sequence[int]) -> ModelRequest:
        """Return a request that computes a prompt, stores it, and chooses no token. Raises as `check_prompt`."""
        options = GenerationOptions(stop_ids=frozenset(), store_partial=True)
        request = self._request(self.check_prompt(prompt), options, Sampler(SamplingOptions()))
        request.max_new_tokens = 0
        return request

    def build_received(
        self,
        token_ids: npt.NDArray[np.uint32],
        sampler: Sampler,
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        use_cache: bool,
        keeps_partial: bool,
    ) -> ModelRequest:
        """Return a request that the first rank has checked."""
        return ModelRequest(
            token_ids=token_ids.tolist(),
            prompt_tokens=len(token_ids),
            max_new_tokens=max_new_tokens,
            hashes=self._hashes_of(token_ids) if use_cache else (),
            use_cache=use_cache,
            keeps_partial=keeps_partial,
            number=0,
            sampler=sampler,
            stop_ids=stop_ids,
            started=time.perf_counter(),
        )

    def _request(
        self, token_ids: npt.NDArray[np.uint32], options: GenerationOptions, sampler: Sampler, *, number: int = 0
    ) -> ModelRequest:
        return ModelRequest(
            token_ids=token_ids.tolist(),
            prompt_tokens=len(token_ids),
            max_new_tokens=options.max_new_tokens,
            hashes=self._hashes_of(token_ids) if options.use_cache else (),
            use_cache=options.use_cache,
            keeps_partial=options.store_partial and options.use_cache,
            number=number,
            sampler=sampler,
            stop_ids=self._model_stop_ids() if options.stop_ids is None else options.stop_ids,
            started=time.perf_counter(),
            keep_logits=options.keep_logits,
        )

    def _hashes_of(self, token_ids: npt.NDArray[np.uint32]) -> tuple[bytes, ...]:
        """Return the chained hashes of a prompt's whole blocks."""
        chain = iter_chain(self._cache.namespace.digest, token_ids.tobytes(), self._cache.config.block_size)
        return tuple(block_hash for block_hash, _ in chain)

    def check_prompt(self, prompt: Sequence[int], num_new: int = 1) -> npt.NDArray[np.uint32]:
        """Return a prompt's token ids.

        Raises ConfigError for an empty prompt, for unknown token ids, and for more tokens, `num_new` new ones included,
        than the model's context. Raises CapacityError for more tokens than the hot pool holds.
        """
        token_ids = as_token_array(prompt)
        limit, num_tokens = self._context, len(token_ids)
        if not num_tokens:
            raise ConfigError("a prompt needs at least one token")
        if limit is not None and num_tokens > limit:
            raise ConfigError(f"a prompt of {num_tokens} tokens is longer than the model's context of {limit}")
        if limit is not None and num_tokens + num_new - 1 > limit:  # the last new token is not computed
            raise ConfigError(
                f"{num_tokens} tokens of a prompt and {num_new} new ones exceed the model's context of {limit}",
                hint="lower max_new_tokens",
            )
        if (largest := int(token_ids.max())) >= self._num_ids:
            raise ConfigError(f"token id {largest} is not one of the model's {self._num_ids}")
        size, num_blocks = self._cache.config.block_size, self._cache.hot.num_blocks
        if num_tokens + num_new - 1 > size * num_blocks:
            raise CapacityError(
                f"{num_tokens} tokens of a prompt and {num_new} new ones never fit the hot pool, which holds "
                f"{num_blocks} blocks of {size}",
                hint="raise hot_bytes" if num_tokens > size * num_blocks else "raise hot_bytes or lower max_new_tokens",
            )
        return token_ids

    def sampling_of_all_ranks(self, sampling: SamplingOptions) -> SamplingOptions:
        """Return sampling with the first rank's seed: without one, each rank would choose other tokens."""
        if self._cache.ranks.size == 1 or self.leads or sampling.seed is not None or not sampling.temperature:
            return sampling
        seeds = self._cache.ranks.gather(str(torch.Generator().seed()).encode())
        return replace(sampling, seed=int(seeds[0]))

    def _model_stop_ids(self) -> frozenset[int]:
        ids = getattr(self._model.generation_config, "eos_token_id", None)
        return frozenset() if ids is None else frozenset(ids if isinstance(ids, list) else [ids])
