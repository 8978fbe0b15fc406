"""Memory barriers between processes: one process orders the memory accesses of all others that have registered.

Two processes that each write one place and then read the other's may both miss the other's write: a processor keeps
writes back for a moment. With this call only the rare side pays for order, and the frequent side makes no system call.
Source: membarrier(2) of Linux, 4.16 and later.
"""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["order_all", "register"]

_NUMBERS = {"x86_64": 324, "aarch64": 283}
_GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 2, 4


def register() -> bool:
    """Let the other processes' `order_all` order this one's accesses. False where the system has no such call."""
    return _call(_REGISTER_GLOBAL_EXPEDITED)


def order_all() -> bool:
    """Order the memory accesses of this process and of all that have registered. False where that is not possible.

    What another process wrote before this call is read after it; what it does later sees what this one has written.
    """
    return _call(_GLOBAL_EXPEDITED)


def _call(command: int) -> bool:
    number = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    return int(system_call(number, command, 0, 0)) == 0
