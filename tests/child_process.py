"""How tests start a Python process that finds tierkv and the helpers of this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}


def command(script: Path, *arguments: object) -> list[str]:
    """Return the command line that runs a script in this interpreter."""
    return [sys.executable, str(script), *map(str, arguments)]
