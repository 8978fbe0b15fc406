"""Notices when the weights of a running vLLM worker change, and when its memory is about to be unmapped.

vLLM has no hook for either, so the worker's own methods are wrapped. Weights that a user's own function
writes (`collective_rpc` with a callable, a worker extension) are not noticed here;
`reset_prefix_cache(reset_connector=True)`, which vLLM calls when it is paused or put to sleep, begins a new namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["CHANGES_WEIGHTS", "UNMAPS_MEMORY", "observe_worker"]

CHANGES_WEIGHTS = (
    *(
        "reload_weights",
        "update_weights",
        "start_weight_update",
        "finish_weight_update",
        "update_config",
        "reset_weights",
    ),
)
UNMAPS_MEMORY = ("sleep", "discard", "checkpoint_prepare")
_MARK = "_tierkv_observed"


def observe_worker(worker_class: type, *, changed: Callable[[str], None], before_unmapping: Callable[[], None]) -> None:
    """Call `changed` with a method's name before it changes weights, and `before_unmapping` before memory goes.

    Wraps the methods of the class once; the callbacks find the connector of their process themselves.
    """
    for name in (*CHANGES_WEIGHTS, *UNMAPS_MEMORY):
        method = getattr(worker_class, name, None)
        if method is None or getattr(method, _MARK, False):
            continue
        before = before_unmapping if name in UNMAPS_MEMORY else _call_with(changed, name)
        setattr(worker_class, name, _wrapped(method, before))


def _call_with(changed: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: changed(name)


def _wrapped(method: Any, before: Callable[[], None]) -> Any:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        return method(self, *args, **kwargs)

    setattr(call, _MARK, True)
    return call
