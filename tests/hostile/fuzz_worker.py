"""Runs the cases of one area in a process of its own: `python fuzz_worker.py AREA SEED FIRST LAST PROGRESS DEADLINE`.

Prints the report as JSON. A hang ends the process with HANG_EXIT; PROGRESS is a file that has the case's number.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import mmap
import os
import sys
import tempfile
from pathlib import Path

from hostile.areas import open_area
from hostile.driver import Report, run_cases


def tell(report: Report) -> None:
    print(json.dumps(report.as_json()), flush=True)


if __name__ == "__main__":
    name, seed, first, last, progress_path, deadline_s = sys.argv[1:]
    faulthandler.enable()
    logging.getLogger().addHandler(logging.NullHandler())
    with open(progress_path, "r+b") as file, tempfile.TemporaryDirectory(prefix="tkh") as directory:
        progress = mmap.mmap(file.fileno(), 8)
        area = open_area(name, Path(directory))
        numbers = range(int(first), int(last))
        report = run_cases(
            area, seed=int(seed), numbers=numbers, deadline_s=float(deadline_s), progress=progress, on_hang=tell
        )
        area.close()
    tell(report)
    os._exit(0)  # not behind a thread that a fault has left behind
