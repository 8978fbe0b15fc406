"""How tests start a Python process that finds tierkv and the helpers of this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent

_ELSEWHERE = [path for path in (os.environ.get("PYTHONPATH"),) if path]  # packages that are not installed
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent), *_ELSEWHERE))}


def command(script: Path, *arguments: object) -> list[str]:
    """Return the command line that runs a script in this interpreter."""
    return [sys.executable, str(script), *map(str, arguments)]
