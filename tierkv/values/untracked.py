"""Take objects out of Python's garbage collection, whose full passes visit every tracked object.

With a million blocks in the index one pass takes half a second, in whatever request sets it off. An untracked object is
still freed when its last reference goes; only cycles of untracked objects have to be broken by their owner.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

__all__ = ["untrack"]


def _untracker() -> Callable[[object], None]:
    if sys.implementation.name != "cpython":
        return lambda _: None
    function = ctypes.PyDLL("the interpreter", handle=ctypes.pythonapi._handle).PyObject_GC_UnTrack
    function.argtypes = [ctypes.py_object]
    function.restype = None
    return function


untrack: Callable[[object], None] = _untracker()
"""Take a list, or an instance of a class written in Python, out of garbage collection; 0.2 us. A dict that gets a value
which can be tracked comes back by itself. Source: CPython's PyObject_GC_UnTrack."""
