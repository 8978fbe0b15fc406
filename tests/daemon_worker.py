"""A daemon as a process of its own, without torch: run as `python daemon_worker.py JSON`; says "up" when it serves."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.limits import Limits
from tierkv.daemon.server import serve

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    store = options.pop("store", None)
    limits = Limits(**options.pop("limits", {}))
    serve(
        DaemonConfig(
            socket=Path(options.pop("socket")), store=Path(store) if store else None, limits=limits, **options
        ),
        started=lambda: print("up", flush=True),
    )
