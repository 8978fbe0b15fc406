"""Puts handlers in place of the attention modules' forward methods for as long as a `with` block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tierkv.engine.mla.layers import MlaLayer
from tierkv.engine.model_seam import Seam

__all__ = ["ModuleSeams"]


class ModuleSeams:
    """A context manager; blocks may nest. handler_of: makes the callable for a layer, which `Seam` calls."""

    def __init__(self, layers: Iterable[MlaLayer], handler_of: Callable[[MlaLayer], Callable[..., Any]]) -> None:
        self._seams = [(layer.module, Seam(layer.module.forward, handler_of(layer))) for layer in layers]
        self._depth = 0

    @property
    def is_open(self) -> bool:
        """Whether a block runs."""
        return self._depth > 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for module, seam in self._seams:
                vars(module)["forward"] = seam

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if not self._depth:
            for module, _ in self._seams:
                del vars(module)["forward"]
