"""A daemon whose disk hangs: run as `python hanging_worker.py JSON WHAT`; says "up" when it serves.

WHAT: "put" (the store never takes a block), "loop" (the first question to the store never returns, on the loop).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.server import serve
from tierkv.storage.cold import ColdStore


def hang(*_: Any, **__: Any) -> Any:
    logging.getLogger("disk").info("a call hangs")
    time.sleep(600)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    setattr(ColdStore, {"put": "put", "loop": "lookup"}[sys.argv[2]], hang)
    store = options.pop("store", None)
    serve(
        DaemonConfig(socket=Path(options.pop("socket")), store=Path(store) if store else None, **options),
        started=lambda: print("up", flush=True),
    )
