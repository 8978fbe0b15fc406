"""The areas by name, and the share of all cases that each gets: what costs little per case gets many."""

from __future__ import annotations

import os
import signal
import time
from importlib import import_module
from pathlib import Path
from random import Random

from hostile.driver import Area

__all__ = ["LEAST_DEEP", "SHARES", "open_area"]

SHARES = {
    "records": 0.41,
    "descriptions": 0.17,
    "prompts": 0.12,
    "states": 0.09,
    "stores": 0.02,
    "requests": 0.14,
    "answers": 0.05,
}
"""Of all cases, by area."""

LEAST_DEEP = {
    "records": 0.5,
    "descriptions": 0.05,
    "prompts": 0.2,
    "states": 0.5,
    "stores": 0.3,
    "requests": 0.3,
    "answers": 0.1,
}
"""The share of an area's cases that must get past the outer checksum, or the parser, or the greeting."""


def open_area(name: str, directory: Path) -> Area:
    """Return an area, ready for cases; only what it needs is imported."""
    modules = {
        "hostile.files_area": SHARES,
        "hostile.daemon_area": ("requests", "answers"),
        __name__: ("hangs", "dies"),
    }
    module = import_module([module for module, names in modules.items() if name in names][-1])
    kinds = (each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Area))
    return next(kind for kind in kinds if kind.name == name)(directory)


class Hangs(Area):
    """For tests of the runner: the fourth case of seed 1 never ends."""

    name = "hangs"

    def case(self, random: Random) -> bool:
        if random.random() == Random("1:hangs:3").random():
            time.sleep(3600)
        return True


class Dies(Area):
    """For tests of the runner: the fourth case of seed 1 ends the process."""

    name = "dies"

    def case(self, random: Random) -> bool:
        if random.random() == Random("1:dies:3").random():
            os.kill(os.getpid(), signal.SIGKILL)
        return True
