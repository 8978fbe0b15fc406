"""SharedFinder: finds blocks for workers that are other processes, in the store that it shares with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tierkv.block_store.cost_file import cost_path
from tierkv.block_store.keys import BlockKeys
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.misses import log_recomputed
from tierkv.block_store.store import BlockStore
from tierkv.integrations.vllm.finders import Found
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.plan import LoadReport, SaveOrder, WorkerReport
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.step_times import SyncLoad
from tierkv.integrations.vllm.worker_blocks import WorkerBlocks
from tierkv.integrations.vllm.worker_costs import WorkerCosts
from tierkv.storage.cold import ColdStore
from tierkv.values.block import BlockHash
from tierkv.values.namespace import Namespace

__all__ = ["SharedFinder"]

_MOST_ORDERS = 1024  # of saves whose report is waited for


@dataclass(slots=True)
class _Loading:
    """A load that was ordered. hashes: of its blocks. origin: where they were thought to lie. report: of the ranks."""

    hashes: Sequence[BlockHash]
    origin: Origin
    started: float = 0.0
    report: LoadReport | None = None


class SharedFinder:
    """Finds blocks that every worker has. Nothing is held: the workers reserve them, and load them async.

    They are on disk, or the workers have reported that they took them over and are about to write them. Only the disk
    can be looked at from here, so whether blocks are warm is an estimate from those reports.
    namespaces: of the workers' blocks, one for each rank. cold: the store on disk, if this process has it open.
    costs: of loading, as the scheduler sees it, and of computing. Raises what `BlockStore` raises.
    """

    def __init__(
        self,
        options: Options,
        namespaces: Sequence[Namespace],
        statistics: Statistics,
        *,
        cold: ColdStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout = namespaces[0].layout
        self.block_size: int = layout.block_size
        self.costs: LoadOrCompute = LoadOrCompute(block_size=layout.block_size)
        self._statistics = statistics
        self._clock = clock
        self._found: dict[str, _Loading] = {}  # blocks of waiting requests
        self._loading: dict[str, _Loading] = {}
        self._ordered: dict[tuple[int, int], Sequence[BlockHash]] = {}  # blocks of save orders
        self._has_daemon = options.socket is not None  # which evicts from the warm memory as all its clients want
        num_warm = 0 if self._has_daemon else options.warm_bytes // layout.block_bytes
        self._workers = WorkerBlocks(num_warm, clock=clock)
        self._options = options
        self._namespaces = namespaces
        self._cold = cold
        self._stack = ExitStack()
        self._stores: list[BlockStore] = []
        self._keys: dict[str, list[BlockKeys]] = {}
        self.renew("")
        self._stores[0].keep_costs(self.costs, process="scheduler")
        folder = self._stores[0].config.cold_path
        paths = [cost_path(folder, store.namespace.digest.hex()) for store in self._stores] if folder else []
        self._worker_costs = WorkerCosts(paths, block_size=self.block_size, clock=clock) if paths else None

    def find(
        self, request_id: str, tokens: Sequence[int], first: int, end: int, *, is_idle: bool = False
    ) -> Found | None:
        ranks = self._keys.get(request_id)
        if ranks is None:
            ranks = self._keys[request_id] = [store.keys() for store in self._stores]
        for keys in ranks:
            keys.extend(tokens[keys.num_tokens : end * self.block_size])
        num_blocks = self._count(ranks, first, end)
        origin = self._origin(ranks, first, first + num_blocks)
        known = self._found.get(request_id)
        if num_blocks and self._options.compute_or_load and (known is None or len(known.hashes) != num_blocks):
            rest = max(1, len(tokens) - (first + num_blocks) * self.block_size)
            self._ask_workers(origin)
            worth = self.costs.worth_loading(num_blocks, origin=origin, num_rest_tokens=rest)
            self._statistics.add("computed_instead_tokens", (num_blocks - worth) * self.block_size)
            log_recomputed(num_blocks - worth)
            num_blocks = worth
        hashes = [key.block_hash for key in ranks[0][first : first + num_blocks]]
        self._found[request_id] = _Loading(hashes, origin)
        return Found(num_blocks, is_async=num_blocks > 0)

    def keep(self, request_id: str) -> SyncLoad | None:
        loading = self._loading[request_id] = self._found.pop(request_id)
        loading.started = self._clock()
        return None

    def drop(self, request_id: str) -> None:
        self._found.pop(request_id, None)

    def saving(self, request_id: str, tokens: Sequence[int], order: SaveOrder) -> None:
        ranks = self._keys.get(request_id)
        if ranks is None or not self._workers.most:
            return
        keys = ranks[0]
        keys.extend(tokens[keys.num_tokens : order.end * self.block_size])
        self._ordered[order.key, order.end] = [key.block_hash for key in keys[order.first : order.end]]
        if len(self._ordered) > _MOST_ORDERS:
            del self._ordered[next(iter(self._ordered))]

    def update(self, report: WorkerReport) -> None:
        for order, num_new in report.saves.items():
            self._workers.saved(self._ordered.pop(order, ())[-num_new:])
        for request_id, load in report.loads.items():
            if loading := self._loading.get(request_id):
                loading.report = loading.report.aggregate(load) if loading.report else load

    def loaded(self, request_id: str) -> None:
        loading = self._loading.pop(request_id, None)
        if loading is None or not loading.hashes:
            return
        origin, report = loading.origin, loading.report
        if report:
            if not report.is_whole or (origin is Origin.WARM and report.origin is not Origin.WARM):
                self._workers.clear()
            if not report.is_whole:
                return
            self._workers.loaded(loading.hashes)
            origin = origin if self._has_daemon else report.origin
        self.costs.record_load(len(loading.hashes), origin=origin, seconds=self._clock() - loading.started)

    def forget(self, request_id: str) -> None:
        self.drop(request_id)
        self._loading.pop(request_id, None)
        self._keys.pop(request_id, None)

    def renew(self, salt: str) -> None:
        self.close()
        config, cold = self._options.store_config(lookup_only=True), self._cold
        for namespace in self._namespaces:
            salted = replace(namespace, salt=salt)
            store = self._stack.enter_context(BlockStore(config, namespace=salted, cold=cold))
            self._stores.append(store)
            cold = store.cold  # a process opens a store once

    def close(self) -> None:
        self._keys.clear()
        self._found.clear()
        self._loading.clear()
        self._ordered.clear()
        self._workers.clear()
        self._stores.clear()
        self._stack.close()

    def _count(self, ranks: Sequence[BlockKeys], first: int, end: int) -> int:
        """Return how many of the blocks [first, end) every rank has on disk, or is about to write."""
        at = first
        while at < end:
            before = at
            while at < end and self._workers.is_saved(ranks[0][at].block_hash):
                at += 1
            num_cold = end - at
            for store, keys in zip(self._stores, ranks, strict=True):
                num_cold = store.contains(keys[at : at + num_cold]) if num_cold else 0
            at += num_cold
            if at == before:
                break
        return at - first

    def _origin(self, ranks: Sequence[BlockKeys], first: int, end: int) -> Origin:
        """Return where the blocks [first, end) come from, judged by the rank that has the slowest."""
        missing = [at for at in range(first, end) if not self._workers.is_warm(ranks[0][at].block_hash)]
        return max(store.origin([keys[at] for at in missing]) for store, keys in zip(self._stores, ranks, strict=True))

    def _ask_workers(self, origin: Origin) -> None:
        """Take over what loads from an origin took in the workers, if this process has not seen one."""
        if self._worker_costs and self.costs.load_s(1, origin=origin) is None:
            self.costs.record_loads(self._worker_costs.slowest(origin), origin=origin)
