"""One rank of tiny models, for tests. Run as `python rank_worker.py RANK SIZE DIRECTORY RUN DEVICE ACTION:FAMILY...`.

The ranks meet through a file in the folder RUN of the directory, where each also writes what it saw of every action.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forced_attention import FORCED, force_attention
from tiny_models import VOCABULARY, make_model
from torch import distributed
from transformers.distributed import DistributedConfig

from tierkv.config import CacheConfig
from tierkv.engine.engine import Engine
from tierkv.engine.fused_model import FusedDecoder
from tierkv.engine.model_identity import ModelCheck
from tierkv.engine.model_reader import read_state
from tierkv.engine.model_state import local_part
from tierkv.engine.models import LoadedModel, split_model
from tierkv.engine.runner import GenerationOptions, Runner, open_runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.engine.weights_digest import weights_digest
from tierkv.errors import ConfigError, RankError
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.storage.cold import ColdStore
from tierkv.values.block import Tier

__all__ = ["NUM_NEW", "block_size_of", "dtype_of", "prompt_of"]

TIMEOUT_S = 60
NUM_NEW = 4


def block_size_of(device: str) -> int:
    """Return what flash-attn asks for on a GPU, and something small on a CPU."""
    return 256 if device == "cuda" else 16


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def prompt_of(device: str) -> list[int]:
    """Return a prompt of three blocks and a half."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (block_size_of(device) * 7 // 2,), generator=generator).tolist()


class Worker:
    """One rank and its part of each model."""

    def __init__(self, rank: int, directory: Path, device: str) -> None:
        self.store = directory / "store"
        self.device = device
        self.place = f"cuda:{rank}" if device == "cuda" else device
        self.ranks = TorchRanks.of_process_group(timeout_s=TIMEOUT_S)
        assert self.ranks.rank == rank
        self.options: dict[str, Any] = {"block_size": block_size_of(device), "dtype": dtype_of(device)}
        self.models: dict[str, Any] = {}
        self.hashes: list[bytes] = []

    def use(self, family: str) -> None:
        """Switch to the model of a family."""
        self.family = family
        if family not in self.models:
            self.models[family] = split_model(make_model(family, device=self.place, **self.options))
        self.model = self.models[family]

    def load_in_slices(self) -> dict[str, Any]:
        """Go on with the same weights, of which Transformers loads only this rank's slice."""
        checkpoint = self.store.with_name(f"checkpoint-{self.family}")
        make_model(self.family, **self.options).save_pretrained(checkpoint)  # only the first rank writes
        distributed.barrier()
        self.model = type(self.model).from_pretrained(
            checkpoint,
            dtype=self.options["dtype"],
            attn_implementation=self.model.config._attn_implementation,
            distributed_config=DistributedConfig(tp_size=self.ranks.size),
        )
        self.models[self.family] = self.model
        return {"model_bytes": self.model_bytes()}

    def model_bytes(self) -> int:
        """Return how much this rank holds of the model, what is tied once."""
        return sum(part.nbytes for part in map(local_part, self.model.parameters()))

    @contextmanager
    def runner(self, *, fuse: str = "auto", mla: str = "auto", socket: Path | None = None) -> Iterator[Runner]:
        layer_bytes = 2 * 2 * 64 * dtype_of(self.device).itemsize  # both heads: more than a rank has
        block_bytes = 3 * layer_bytes * block_size_of(self.device)
        config = CacheConfig(
            cold_path=None if socket else self.store,
            socket=socket,
            block_size=block_size_of(self.device),
            hot_bytes=16 * block_bytes,
            warm_bytes=16 * block_bytes,
            cold_bytes=64 << 20,
            min_free_bytes=0,
        )
        loaded = LoadedModel(self.model, None, "tiny")
        with open_runner(loaded, config, ranks=self.ranks, fuse=fuse, mla=mla) as runner:
            yield runner

    def generate_fused(self) -> dict[str, Any]:
        """Do as `generate`, by fused passes."""
        return self.generate(fuse="on")

    def generate_expanded(self) -> dict[str, Any]:
        """Do as `generate`, with K and V in the cache of a model with a latent."""
        return self.generate(mla="expanded")

    def generate_of_daemon(self) -> dict[str, Any]:
        """Do as `generate`, over the daemon that the test has started."""
        return self.generate(socket=self.store.with_name("socket"))

    def generate(self, *, fuse: str = "auto", mla: str = "auto", socket: Path | None = None) -> dict[str, Any]:
        """Answer the prompt in a cache that has just been opened."""
        with self.runner(fuse=fuse, mla=mla, socket=socket) as runner:
            assert fuse != "on" or isinstance(runner._pass._compute, FusedDecoder)
            options = GenerationOptions(
                max_new_tokens=NUM_NEW, stop_ids=frozenset(), store_partial=True, keep_logits=True
            )
            (answer,) = runner.generate([prompt_of(self.device)], options)
            assert answer.logits is not None
            runner.cache.check()
            namespace = runner.cache.namespace
            runner.cache.flush()
            self.ranks.gather(b"all ranks have written")
            records = runner.cache.cold.stats().blocks if runner.cache.cold else 0
            written = runner.cache.stats().tiers[Tier.COLD].bytes_in
            self.hashes = list(runner.cache.match(prompt_of(self.device)).block_hashes)
            return {
                "logits": answer.logits.numpy(),
                "token_ids": answer.token_ids,
                "cached": [answer.cached_tokens[tier] for tier in Tier],
                "model_bytes": self.model_bytes(),
                "kv_heads": runner.cache.layout.layers[0].kv_heads,
                "is_latent": runner.cache.layout.is_latent,
                "records": records,
                "written_bytes": written,
                "num_io_threads": runner.cache.config.io_threads,
                "weights": namespace.weights,
                "namespace": namespace.digest.hex(),
                "reasons": [f"{reason}={count}" for reason, count in runner.cache.stats().miss_reasons.items()],
            }

    def serve(self) -> dict[str, Any]:
        """Serve requests on the first rank: more than there is room for, of two priorities, some cancelled or late."""
        generator = torch.Generator().manual_seed(2)
        shared = prompt_of(self.device)[: 2 * block_size_of(self.device)]
        lengths = torch.randint(1, 40, (14,), generator=generator).tolist()
        prompts = [
            [*shared[: (n % 3) * block_size_of(self.device)], *range(n, n + length)] for n, length in enumerate(lengths)
        ]
        plain = GenerationOptions(max_new_tokens=25, stop_ids=frozenset())
        drawn = replace(plain, sampling=SamplingOptions(temperature=0.8, seed=3))
        with self.runner() as runner:
            want = [runner.generate([each], replace(plain, use_cache=False))[0].token_ids for each in prompts]
            want += [runner.generate([each], replace(drawn, use_cache=False))[0].token_ids for each in prompts]
            with Engine(runner, decode_step_tokens=24) as engine:
                if self.ranks.rank == 0:
                    got, reasons = self._submit(engine, prompts, plain, drawn)
                else:
                    with pytest.raises(ConfigError, match="first rank"):
                        engine.submit([1], plain)
                    got, reasons = want, []
                    assert engine.wait(TIMEOUT_S)
            stats = engine.stats()
            runner.cache.flush()
            runner.cache.check()
            (after,) = runner.generate([prompts[0]], plain)  # all ranks make the same calls again
        assert got == want
        assert after.token_ids == want[0]
        return {
            "counts": [stats.steps, stats.submitted, stats.finished, stats.cancelled, stats.preempted],
            "reasons": reasons,
        }

    def _submit(
        self, engine: Engine, prompts: list[list[int]], plain: GenerationOptions, drawn: GenerationOptions
    ) -> tuple[list[list[int]], list[str | None]]:
        """Return the answers to all prompts, and how a cancelled request and one with a deadline have ended."""
        long = replace(plain, max_new_tokens=90)
        odd = [engine.submit([5, 6], long, priority=3), engine.submit([7], long, deadline_s=0.05)]
        next(odd[0])
        streams = [engine.submit(each, plain, priority=n % 2) for n, each in enumerate(prompts)]
        (inside,) = engine.runner.generate([prompts[3]], plain)
        streams += [engine.submit(each, drawn) for each in prompts]
        odd[0].cancel()
        answers = [stream.result().token_ids for stream in streams]
        assert inside.token_ids == answers[3]
        return answers, [stream.result().finish_reason for stream in odd]

    def fail(self) -> dict[str, Any]:
        """Let the last rank fail in its second pass, while the others are in that pass's collectives."""
        with self.runner() as runner:
            self._break(runner)
            try:
                runner.generate([prompt_of(self.device)], GenerationOptions(max_new_tokens=9, stop_ids=frozenset()))
            except ValueError as exc:
                self._live_on(exc)
        raise AssertionError("it went on")

    def fail_serving(self) -> dict[str, Any]:
        """Do as `fail`, in an engine; a thread reads a stream of the first rank's."""
        with self.runner() as runner:
            self._break(runner)
            with Engine(runner) as engine:
                if self.ranks.rank == 0:
                    options = GenerationOptions(max_new_tokens=9, stop_ids=frozenset())
                    with pytest.raises(RankError) as raised:
                        engine.submit(prompt_of(self.device), options).result()
                    print(f"the reader was told: {raised.value}", flush=True)
                try:
                    engine.wait()
                except ValueError as exc:
                    self._live_on(exc)
        raise AssertionError("it went on")

    def _break(self, runner: Runner) -> None:
        run, passes = runner._pass.run, itertools.count()

        def broken(*arguments: Any) -> Any:
            if self.rank_is_last() and next(passes) == 1:
                raise ValueError("this rank broke")
            return run(*arguments)

        runner._pass.run = broken  # type: ignore[method-assign]

    def _live_on(self, error: ValueError) -> None:
        print(f"failed: ValueError {error}", flush=True)
        time.sleep(10 * TIMEOUT_S)

    def prefill(self) -> dict[str, Any]:
        with self.runner() as runner:
            computed = []
            for _ in range(2):
                computed.append(runner.prefill(prompt_of(self.device)))
                runner.cache.flush()  # the partial block is written in the background
            return {"computed": computed, "weights": runner.cache.namespace.weights}

    def change_the_last_rank(self) -> dict[str, Any]:
        """Change a weight that only the last rank holds, and one that all hold a part of."""
        weights = self.model.model.layers[0]
        check = ModelCheck(self.model, read_state(self.model))
        before, states = weights_digest(self.model), [check._read_versions()]
        if self.rank_is_last():
            with torch.no_grad():
                weights.self_attn.v_proj.weight.to_local()[0, 0] += 1
        is_changed = weights_digest(self.model) != before
        states.append(check._read_versions())
        with torch.no_grad():
            weights.mlp.up_proj.weight.mul_(2)
        states.append(check._read_versions())
        return {"is_changed_here": is_changed, "is_noticed": [a != b for a, b in itertools.pairwise(states)]}

    def damage_one(self) -> dict[str, Any]:
        """Flip a bit of the last rank's second block on disk."""
        if self.rank_is_last():
            with ColdStore(self.store, quota_bytes=64 << 20, min_free_bytes=0) as store, store._writer.batch() as batch:
                value = bytearray(batch.txn.get(self.hashes[1], db=batch.databases.blocks))
                value[len(value) // 2] ^= 1
                batch.txn.put(self.hashes[1], bytes(value), db=batch.databases.blocks)
        return {}

    def rank_is_last(self) -> bool:
        return self.ranks.rank == self.ranks.size - 1


def main(rank: int, size: int, directory: Path, run: str, device: str, actions: list[str]) -> None:
    torch.set_num_threads(1)
    if FORCED:
        force_attention(pytest.MonkeyPatch(), FORCED)
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{directory / run}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    try:
        worker = Worker(rank, directory, device)
        for number, (action, family) in enumerate(each.split(":") for each in actions):
            worker.use(family)
            np.savez(directory / run / f"{number}-{rank}.npz", **getattr(worker, action)())
        distributed.barrier()  # the first rank serves the store in which the others still read what was decided
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:])
