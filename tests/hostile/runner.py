"""Runs an area's cases in processes of their own, so that one that hangs or dies is named and the rest goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from child_process import ENVIRONMENT, TESTS, command
from hostile.driver import DEADLINE_S, HANG_EXIT, Fault, Report

__all__ = ["run_area"]

_ENVIRONMENT = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{TESTS / 'daemon'}"}
WORKER = Path(__file__).with_name("fuzz_worker.py")
MOST_RESTARTS = 5
_POLL_S = 0.05


def run_area(area: str, *, seed: int, numbers: range, deadline_s: float = DEADLINE_S) -> Report:
    """Return what came of these cases. A process that hangs or dies costs the cases that it had tried their count."""
    whole = Report(area, seed)
    first, restarts = numbers.start, 0
    while first < numbers.stop and restarts <= MOST_RESTARTS:
        report, ended_at, how = _run_once(area, seed, range(first, numbers.stop), deadline_s)
        if report:
            _add(whole, report)
            first += report.cases
            if not how:
                break
        else:
            whole.faults.append(Fault(area, ended_at, how.splitlines()[0], area, trace=how))
            whole.cases += ended_at + 1 - first
            first = ended_at + 1
        restarts += 1
    return whole


def _run_once(area: str, seed: int, numbers: range, deadline_s: float) -> tuple[Report | None, int, str]:
    """Return the report if there is one, the number of the last case, and how it ended the process if it did."""
    with tempfile.NamedTemporaryFile() as progress, tempfile.TemporaryFile() as errors:
        progress.write(numbers.start.to_bytes(8, "little"))
        progress.flush()
        line = command(WORKER, area, seed, numbers.start, numbers.stop, progress.name, deadline_s)
        process = subprocess.Popen(line, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors)
        with process:
            at, since = -1, time.monotonic()
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                now_at = int.from_bytes(Path(progress.name).read_bytes()[:8], "little")
                if now_at != at:
                    at, since = now_at, time.monotonic()
                elif time.monotonic() - since > 3 * deadline_s + 30:  # not even its watchdog has a turn
                    process.kill()
            assert process.stdout is not None
            output = process.stdout.read()
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-6000:]
        number = int.from_bytes(Path(progress.name).read_bytes()[:8], "little")
        how = f"{'hang' if process.returncode == HANG_EXIT else 'died'}: exit {process.returncode}\n{said}"
        report = _parsed(output, how) if output else None
        return report, number, how if process.returncode else ""


def _parsed(output: bytes, how: str) -> Report:
    values = json.loads(output.splitlines()[-1])
    faults = [Fault(**fault) for fault in values["faults"]]
    told = [replace(each, trace=how) if each.what.startswith("hang") else each for each in faults]
    return Report(**{**values, "faults": told})


def _add(whole: Report, report: Report) -> None:
    whole.cases += report.cases
    whole.deep += report.deep
    whole.seconds += report.seconds
    whole.grown_bytes = max(whole.grown_bytes, report.grown_bytes)
    whole.faults += report.faults
    for name, count in report.refused.items():
        whole.refused[name] = whole.refused.get(name, 0) + count
