"""Runs hostile cases of one area: each has a seed, a deadline and a bound on the memory that it may take.

A case is reproduced by its area, the run's seed and its number. What is wrong with it is a `Fault`; all faults of one
exception at one place count as one, so that a run goes on and finds the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import mmap
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tierkv.errors import TierKVError

__all__ = [
    "DEADLINE_S",
    "Area",
    "Fault",
    "Report",
    "WrongAnswerError",
    "peak_bytes",
    "refused",
    "resident_bytes",
    "run_cases",
]

DEADLINE_S = 10.0
CASE_BYTES = 64 << 20
"""How much resident memory one case may add to the most that the process ever had."""

GROWTH_BYTES = 48 << 20
"""How much resident memory all cases together may leave behind."""

ADDRESS_BYTES = 4 << 30
"""How much address space the cases may take: a size that a file claims is no reason to ask for more."""

FD_GROWTH = 8
MOST_FAULTS = 50
HANG_EXIT = 3

_ROOT = Path(__file__).resolve().parent.parent.parent


class WrongAnswerError(Exception):
    """A hostile input was answered with something that is not true."""


class Area:
    """One kind of hostile input. `reached` counts the errors of tierkv's own that refused something."""

    name = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reached: Counter[str] = Counter()

    def case(self, random: Random) -> bool:
        """Try one hostile input; return whether it got past the outer checksum. Raises what is a fault."""
        raise NotImplementedError

    def around(self, work: Callable[[], None]) -> None:
        """Call `work`, which runs the cases, where and when this area wants it."""
        work()

    def close(self) -> None:
        """Give back what the cases shared."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong, first in the case `number`, and how often it did."""

    area: str
    number: int
    what: str
    place: str
    count: int = 1
    trace: str = ""

    def __str__(self) -> str:
        return f"{self.area} case {self.number} ({self.count} times): {self.what} at {self.place}"


@dataclass(slots=True)
class Report:
    """What a run of cases came to."""

    area: str
    seed: int
    cases: int = 0
    deep: int = 0
    seconds: float = 0.0
    grown_bytes: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        share = self.deep / max(self.cases, 1)
        errors = ", ".join(f"{name} {count}" for name, count in sorted(self.refused.items()))
        return (
            f"{self.area}: {self.cases} cases in {self.seconds:.1f} s, seed {self.seed}, {share:.0%} past the outer "
            f"checksum, {self.grown_bytes >> 20} MiB kept, refused: {errors or 'none'}"
        )


@contextlib.contextmanager
def refused(area: Area, *others: type[Exception]) -> Iterator[None]:
    """Take tierkv's own errors, and those others that a docstring names, for the right answer."""
    try:
        yield
    except (TierKVError, *others) as exc:
        area.reached[type(exc).__name__] += 1


def run_cases(
    area: Area,
    *,
    seed: int,
    numbers: range,
    deadline_s: float = DEADLINE_S,
    progress: mmap.mmap | None = None,
    case_bytes: int = CASE_BYTES,
    growth_bytes: int = GROWTH_BYTES,
    on_hang: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run the cases of these numbers. A case beyond its deadline ends the process with HANG_EXIT.

    on_hang: gets the report so far before that. progress: gets the number of each case before it begins, for the
    process that must name the case that ended this one.
    """
    report = Report(area.name, seed)
    found: dict[tuple[str, str], Fault] = {}
    logged = _LoggedErrors()

    def note(number: int, what: str, place: str, trace: str) -> None:
        known = found.get((what.split(":")[0], place))
        count = known.count + 1 if known else 1
        first = known.number if known else number
        kept = known.trace if known else trace
        text = known.what if known else what
        found[what.split(":")[0], place] = Fault(area.name, first, text, place, count, kept)

    def hangs(number: int) -> None:
        what = "hang: beyond its deadline" if number in numbers else "hang: it does not end after the last case"
        note(number, what, area.name, "")
        report.cases += number in numbers
        on_hang(complete())

    def complete() -> Report:
        report.seconds = time.monotonic() - started
        report.refused = dict(area.reached)
        report.faults = sorted(found.values(), key=lambda fault: fault.number)
        return report

    def work() -> None:
        warm_up, kept_bytes, num_fds = max(len(numbers) // 4, 1), 0, 0
        for done, number in enumerate(numbers):
            if done == warm_up or len(numbers) == 1:
                _free_unused_memory()
                kept_bytes, num_fds = resident_bytes(), len(os.listdir("/proc/self/fd"))
            if progress is not None:
                progress[:8] = number.to_bytes(8, "little")
            most = peak_bytes()
            watchdog.begin(number)
            try:
                report.deep += area.case(Random(f"{seed}:{area.name}:{number}"))
            except Exception as exc:  # noqa: BLE001 - that is what is looked for
                note(number, f"{type(exc).__name__}: {str(exc)[:200]}", place_of(exc), traceback.format_exc()[-3000:])
            watchdog.end()
            report.cases += 1
            for what, place, trace in logged.take():
                note(number, what, place, trace)
            if peak_bytes() - most > case_bytes:
                note(number, f"memory at once: {peak_bytes() - most >> 20} MiB in one case", area.name, "")
            if len(found) >= MOST_FAULTS:
                break
        _free_unused_memory()
        report.grown_bytes = max(resident_bytes() - kept_bytes, 0)
        if report.grown_bytes > growth_bytes:
            note(numbers[-1], f"memory kept: {report.grown_bytes >> 20} MiB after all cases", area.name, "")
        if (more := len(os.listdir("/proc/self/fd")) - num_fds) > FD_GROWTH:
            note(numbers[-1], f"files: {more} left open after all cases", area.name, "")

        watchdog.begin(numbers.stop)  # what ends it has a deadline too

    started = time.monotonic()
    with logged, _Watchdog(area.name, seed, deadline_s, hangs) as watchdog, _bounded_memory():
        area.around(work)
        watchdog.end()
    return complete()


def place_of(exc: BaseException) -> str:
    """Return the innermost line of tierkv, or else of anything, that an exception came through."""
    frames = traceback.extract_tb(exc.__traceback__)
    ours = [each for each in frames if _is_ours(each.filename)] or list(frames)
    return f"{_short(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"


def _is_ours(name: str) -> bool:
    path = _short(name)
    return not path.startswith(("tests", "/", ".venv"))


def _short(name: str) -> str:
    return name.removeprefix(f"{_ROOT}{os.sep}")


def _free_unused_memory() -> None:
    """Have the allocator give the system what is free: it keeps tens of MiB, and not always equally many."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it
        trim(0)


def resident_bytes() -> int:
    """Return the memory that this process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def peak_bytes() -> int:
    """Return the most memory that this process ever had; ru_maxrss would begin with that of its parent."""
    with open("/proc/self/status", "rb") as file:
        line = next(each for each in file if each.startswith(b"VmHWM:"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    with open("/proc/self/statm", "rb") as file:
        size = int(file.read().split()[0]) * mmap.PAGESIZE
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _LoggedErrors(logging.Handler):
    """Keeps what is logged with an exception that is not tierkv's own, and what threads die of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._faults: list[tuple[str, str, str]] = []
        self._guard = threading.Lock()

    def __enter__(self) -> _LoggedErrors:
        logging.getLogger().addHandler(self)
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda args: self._add(args.exc_value)
        sys.unraisablehook = lambda args: self._add(args.exc_value)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        threading.excepthook, sys.unraisablehook = self._hooks

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._add(record.exc_info[1])

    def take(self) -> list[tuple[str, str, str]]:
        with self._guard:
            faults, self._faults = self._faults, []
        return faults

    def _add(self, exc: BaseException | None) -> None:
        if exc is None or isinstance(exc, TierKVError | SystemExit):
            return
        trace = "".join(traceback.format_exception(exc))[-3000:]
        with self._guard:
            self._faults.append((f"{type(exc).__name__}: {str(exc)[:200]}", place_of(exc), trace))


class _Watchdog:
    """Ends the process, naming the case, when one takes longer than it may."""

    def __init__(self, area: str, seed: int, deadline_s: float, hangs: Callable[[int], None]) -> None:
        self._area, self._seed, self._deadline_s, self._hangs = area, seed, deadline_s, hangs
        self._began: tuple[int, float] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> _Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def begin(self, number: int) -> None:
        self._began = number, time.monotonic()

    def end(self) -> None:
        self._began = None

    def _watch(self) -> None:
        while not self._is_over.wait(min(self._deadline_s / 4, 0.5)):
            began = self._began
            if began and time.monotonic() - began[1] > self._deadline_s:
                print(f"{self._area}, seed {self._seed}: case {began[0]} is beyond its deadline", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                self._hangs(began[0])
                os._exit(HANG_EXIT)
