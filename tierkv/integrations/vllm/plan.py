"""What the connector's scheduler side orders for one step, and what its worker side reports. Picklable values."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tierkv.block_store.load_or_compute import Origin
from tierkv.values.namespace import Namespace

__all__ = ["LoadOrder", "LoadReport", "SaveOrder", "StepPlan", "TokenUpdate", "WorkerNamespace", "WorkerReport"]


@dataclass(frozen=True, slots=True)
class TokenUpdate:
    """The next tokens of a request: a worker extends its keys by them. start: how many came before."""

    start: int
    tokens: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Load blocks [first, first + len(pages)) of a request. key: the request's number on the scheduler side.

    pages: the engine's blocks of each, -1 for one that the engine has already or that is not wanted.
    is_async: the request does not run in this step; the worker reports when the load has ended.
    """

    key: int
    request_id: str
    first: int
    pages: list[list[int]]
    is_async: bool


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save blocks [first, end) of a request after this step, or before it for a request that has ended.

    table: the engine's blocks from the request's beginning to block `end`. A worker saves nothing if one of them
    was not loaded: the request has computed over its garbage.
    """

    key: int
    first: int
    end: int
    table: list[int]


@dataclass(slots=True)
class StepPlan:
    """One step. Orders are carried out in the order: last_saves, loads, the model's forward pass, saves.

    fresh: engine's blocks that this step may overwrite. ended: requests whose keys the worker may forget.
    failures_seen: how many reports of failed loads the scheduler side has acted on.
    is_stopped: nothing is cached until further notice. salt: of the namespace; another one than before begins a new
    namespace. step: its number. is_idle: it computes nothing; vLLM runs such steps while requests wait for their loads.
    """

    step: int = 0
    salt: str = ""
    updates: dict[int, TokenUpdate] = field(default_factory=dict)
    last_saves: list[SaveOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    failures_seen: int = 0
    is_stopped: bool = False
    is_idle: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """An async load that has ended. origin: where the slowest blocks lay. is_whole: all its blocks have come."""

    origin: Origin
    is_whole: bool

    def aggregate(self, other: LoadReport) -> LoadReport:
        """Return the report of two ranks' loads for one request."""
        return LoadReport(max(self.origin, other.origin), self.is_whole and other.is_whole)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker reports after a step. step: the number of its plan. failures: steps with a failed load so far.

    stop_reason: why its weights are not those of the files any more; "" while they are. loads: async ones that have
    ended, by request id. saves: (key, end) of save orders that were carried out -> how many of their last blocks are
    new, and lie in the warm memory at least until they are on disk.
    """

    step: int
    failures: int = 0
    stop_reason: str = ""
    loads: dict[str, LoadReport] = field(default_factory=dict)
    saves: dict[tuple[int, int], int] = field(default_factory=dict)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Return the report of two workers together, as vLLM asks for it."""
        loads = self.loads | other.loads
        for request_id in self.loads.keys() & other.loads.keys():
            loads[request_id] = self.loads[request_id].aggregate(other.loads[request_id])
        return WorkerReport(
            max(self.step, other.step),
            max(self.failures, other.failures),
            self.stop_reason or other.stop_reason,
            loads,
            {order: min(self.saves[order], other.saves[order]) for order in self.saves.keys() & other.saves.keys()},
        )


@dataclass(frozen=True, slots=True)
class WorkerNamespace:
    """What a worker sends to the scheduler side when it starts: the namespace of its blocks."""

    namespace: Namespace
