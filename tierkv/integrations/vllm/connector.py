"""TierkvConnector: vLLM's KVConnectorBase_V1 over a block store. One source for vLLM 0.26 to 0.33.

vLLM builds one in the scheduler and one in each worker. With one worker in the scheduler's process, which is the
default, both share a block store: what is announced is held, and certain. Otherwise the scheduler's connector looks the
blocks up in the store on disk, and the workers load them while the request waits.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from tierkv.block_store.load_or_compute import LoadOrCompute
from tierkv.errors import ConfigError
from tierkv.integrations.vllm.finders import LocalFinder
from tierkv.integrations.vllm.identity import identity_of, refuse_unsupported
from tierkv.integrations.vllm.metrics import TierkvPromMetrics, TierkvStats
from tierkv.integrations.vllm.options import Options
from tierkv.integrations.vllm.pages import EnginePages
from tierkv.integrations.vllm.plan import StepPlan, WorkerNamespace, WorkerReport
from tierkv.integrations.vllm.scheduler_side import SchedulerSide
from tierkv.integrations.vllm.session import Session, close_session, find_session, open_session
from tierkv.integrations.vllm.shared_finder import SharedFinder
from tierkv.integrations.vllm.statistics import Statistics
from tierkv.integrations.vllm.step_times import StepTimes
from tierkv.integrations.vllm.weight_updates import observe_worker
from tierkv.integrations.vllm.worker_side import WorkerSide

__all__ = ["TierkvConnector"]

_log = logging.getLogger(__name__)


class TierkvConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's connector; see the module. Raises ConfigError or UnsupportedModelError for what is refused."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_as_vllm()
        transfer = vllm_config.kv_transfer_config
        self._options = Options.parse(transfer.kv_connector_extra_config)
        refuse_unsupported(vllm_config, kv_cache_config, self._options.weights)
        self._engine_id: str = transfer.engine_id
        self._spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._statistics = Statistics()
        self._worker: WorkerSide | None = None
        self._session: Session | None = None
        self._scheduler: SchedulerSide | None = None
        self._finder: LocalFinder | SharedFinder | None = None
        self._block_pool: Any = None
        if role == KVConnectorRole.SCHEDULER:
            self._session = find_session(self._engine_id)
            if self._session:
                self._start_scheduler(LocalFinder(self._session, self._statistics), self._session.costs)
            elif self._options.path is None and self._options.socket is None and not self._options.remote:
                raise ConfigError(
                    "the scheduler and the workers are different processes, which share no memory",
                    hint="give kv_connector_extra_config a path, a socket or a remote tier",
                )

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        block_tokens = self._options.tokens_of_block(self._spec.block_size)
        pages = EnginePages.of(
            kv_caches,
            num_engine_blocks=self._kv_cache_config.num_blocks,
            engine_block_size=self._spec.block_size,
            block_tokens=block_tokens,
            cache_dtype=str(self._vllm_config.cache_config.cache_dtype),
        )
        identity = identity_of(
            self._vllm_config,
            version=vllm.__version__,
            pages=pages.describe(),
            layout=pages.layout,
            device=_device_of(pages.tensors[0]),
            tp_rank=_tp_rank(),
            weights=self._options.weights,
        )
        num_workers = _workers_of_machine(self._vllm_config.parallel_config)
        self._session = open_session(
            self._engine_id, lambda: Session(self._options, identity.namespace(), num_workers=num_workers)
        )
        self._worker = WorkerSide(self._session, pages, self._statistics)
        _observe_this_worker()
        layout = pages.layout
        _log.info(
            "tierkv: blocks of %d tokens, %d bytes each; %d bytes of warm memory; "
            "store %s, decoded by the %s; namespace %s",
            *(layout.block_size, layout.block_bytes, self._options.warm_bytes, self._options.path),
            *("GPU" if self._session.store.decodes_on_gpu else "CPU", self._session.store.namespace.digest.hex()),
        )

    def get_handshake_metadata(self) -> WorkerNamespace | None:
        return WorkerNamespace(self._session.store.namespace) if self._session else None

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._side.begin_step(_plan(kv_connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._side.start_loads(layer_hooks=_layer_hooks(forward_context))

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._side.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved after the forward pass, when all their layers are there."""

    def wait_for_save(self) -> None:
        self._side.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._side.finished_loads() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._side.take_failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        return self._side.report()

    def unregister_kv_caches(self) -> None:
        """Wait for all copies, before vLLM 0.33 and later unmap the KV caches to sleep."""
        self._side.synchronize()

    def stop_caching(self, reason: str) -> None:
        """Load and save nothing until the cache is reset: the weights of this worker have changed."""
        self._side.stop(reason)

    def synchronize(self) -> None:
        """Wait until no copy reads or writes the engine's memory."""
        self._side.synchronize()

    @property
    def _side(self) -> WorkerSide:
        assert self._worker is not None, "the KV caches are registered first"
        return self._worker

    # --- scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        if self._scheduler is None:
            ranks = [metadata[rank].namespace for rank in sorted(metadata)]
            slices = list({namespace.digest: namespace for namespace in ranks}.values())
            finder = SharedFinder(self._options, slices, self._statistics)
            self._start_scheduler(finder, finder.costs)

    def _start_scheduler(self, finder: LocalFinder | SharedFinder, costs: LoadOrCompute) -> None:
        transfer, session = self._kv_transfer_config, self._session
        self._finder = finder
        self._scheduler = SchedulerSide(
            finder,
            self._statistics,
            engine_block_size=self._spec.block_size,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            save_now=session.run_now if session else None,
            evict=self._evict,
            times=StepTimes(costs),
        )

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._block_pool = gpu_block_pool

    def _evict(self, block_ids: set[int]) -> None:
        if self._block_pool is not None:
            self._block_pool.evict_blocks(block_ids)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._orders.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._orders.update_state_after_alloc(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return self._orders.build_plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        assert report is None or isinstance(report, WorkerReport)
        loaded = connector_output.finished_recving or ()
        self._orders.update_from_output(connector_output.invalid_block_ids, report, loaded)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Free the blocks at once: a later step that overwrites them waits for the copies that still read them."""
        self._orders.request_finished(request)
        return False, None

    def reset_cache(self) -> bool | None:
        """Find nothing from before any more: vLLM asks for this where weights may change."""
        self._orders.renew()
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a block that is not saved is a miss later."""
        return False

    @property
    def _orders(self) -> SchedulerSide:
        assert self._scheduler is not None, "the workers have sent their namespaces"
        return self._scheduler

    # --- both

    def get_kv_connector_stats(self) -> TierkvStats | None:
        new = self._statistics.drain()
        return TierkvStats(data=new) if new else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TierkvStats:
        return TierkvStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> TierkvPromMetrics:
        return TierkvPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        self._statistics.drain()
        if self._statistics.total:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self._statistics.total.items()))
            _log.info("tierkv: %s", counts)
        if self._finder:
            self._finder.close()
        if self._worker:
            self._worker.synchronize()
            close_session(self._engine_id)


def _log_as_vllm() -> None:
    """Let tierkv's messages go where vLLM's go, unless the application has its own handlers for them."""
    ours, theirs = logging.getLogger("tierkv"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def _plan(metadata: Any) -> StepPlan:
    assert isinstance(metadata, StepPlan)
    return metadata


def _layer_hooks(forward_context: Any) -> str | None:
    """Return a name for the way in which this forward pass calls the hooks of its layers; None if it calls none.

    A CUDA graph of the whole model calls none; there vLLM has no attention metadata, or names the graph's mode.
    """
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    if getattr(forward_context, "attn_metadata", None) is None or mode is None or mode.name == "FULL":
        return None
    return str(mode.name)


def _tp_rank() -> int:
    from vllm.distributed.parallel_state import get_tp_group

    return int(get_tp_group().rank_in_group)


def _workers_of_machine(parallel: Any) -> int:
    """Return how many workers share this machine's cores."""
    return int(getattr(parallel, "local_world_size", 0) or parallel.tensor_parallel_size)


def _device_of(tensor: torch.Tensor) -> str:
    """Return the type of the device. A CPU's attention packs K by what the CPU has, so a CPU is named by that."""
    if tensor.device.type != "cpu":
        return tensor.device.type
    import platform

    has_amx = bool(torch.cpu._is_amx_tile_supported())
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={has_amx}"


def _observe_this_worker() -> None:
    """Wrap the methods of vLLM's worker classes that change weights or unmap memory, once in a process."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    def connector() -> TierkvConnector | None:
        group = get_kv_transfer_group() if has_kv_transfer_group() else None
        return group if isinstance(group, TierkvConnector) else None

    def changed(name: str) -> None:
        found = connector()
        if found:
            found.stop_caching(f"the worker's {name} was called")

    def before_unmapping() -> None:
        found = connector()
        if found:
            found.synchronize()

    classes = [Worker]
    if current_platform.is_cpu():  # on a GPU the import would replace torch.cuda's streams
        from vllm.v1.worker.cpu_worker import CPUWorker

        classes.append(CPUWorker)
    for worker_class in classes:
        observe_worker(worker_class, changed=changed, before_unmapping=before_unmapping)
