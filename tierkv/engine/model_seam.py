"""Seam: stands for a method of one model while an integration is open, without being a part of the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Seam"]


class Seam:
    """A callable in a model's own attributes that calls a handler in place of the model's method.

    The reader of a model's state skips it. A copy of the model, by `copy.deepcopy` or pickle, has the plain method.

    replaced: the method as it was. handler: called with `replaced` and the caller's arguments.
    """

    __wrapped__: Callable[..., Any]  # `inspect.signature` follows it, and Transformers looks at signatures

    def __init__(self, replaced: Callable[..., Any], handler: Callable[..., Any]) -> None:
        functools.update_wrapper(self, replaced, updated=())
        self._handler = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.__wrapped__,)


def _itself(value: Any) -> Any:
    return value
