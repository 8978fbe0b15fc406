"""Hostile records, prompt files, state files, stores and messages: an error of ours or a miss, never more.

"Never more" is no other exception, no wrong answer, no case beyond its deadline, no process that dies, no memory out
of proportion. TIERKV_FUZZ_CASES is the number of cases, TIERKV_FUZZ_SEED the seed of all of them; a fault is told with
its area, seed and number, and `TIERKV_FUZZ_ONLY=AREA:NUMBER` runs that case alone, in this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from child_process import ENVIRONMENT
from hostile.areas import LEAST_DEEP, SHARES, open_area
from hostile.driver import Area, Fault, Report, WrongAnswerError, peak_bytes, refused, resident_bytes, run_cases
from hostile.runner import run_area

from tierkv.errors import StoreError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="its processes need torch")

NUM_CASES = int(os.environ.get("TIERKV_FUZZ_CASES", "20000"))
SEED = int(os.environ.get("TIERKV_FUZZ_SEED", "1"))
ONLY = os.environ.get("TIERKV_FUZZ_ONLY", "")
NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Report]]]:
    """Start all areas at once, each in a process of its own, two at a time."""
    with ThreadPoolExecutor(NUM_PROCESSES) as threads:
        wanted = {name: max(round(NUM_CASES * share), 1) for name, share in SHARES.items()}
        order = sorted(wanted, key=lambda name: -COST_MS[name] * wanted[name])
        yield {name: threads.submit(run_area, name, seed=SEED, numbers=range(wanted[name])) for name in order}


COST_MS = {
    "records": 0.6,
    "descriptions": 0.6,
    "prompts": 0.3,
    "states": 9.0,
    "stores": 30.0,
    "requests": 5.0,
    "answers": 20.0,
}
"""What a case takes, roughly: the longest areas begin first, so that two processes end at about the same time."""


@pytest.mark.parametrize("area", list(SHARES))
def test_a_hostile_input_is_refused_or_a_miss(
    area: str, runs: dict[str, Future[Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    if ONLY:
        pytest.skip("one case alone is run")
    report = runs[area].result()
    with capsys.disabled():
        print(f"\n  {report}")
    told = "\n".join(f"{fault}\n{fault.trace}" for fault in report.faults)
    assert not report.faults, f"seed {report.seed}, {len(report.faults)} faults:\n{told}"
    assert report.cases == max(round(NUM_CASES * SHARES[area]), 1)
    assert report.deep >= LEAST_DEEP[area] * report.cases or report.cases < 200, "little of it is deep"


@pytest.mark.skipif(not ONLY, reason="TIERKV_FUZZ_ONLY=AREA:NUMBER names no case")
def test_the_one_case_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name, number = ONLY.split(":")
    monkeypatch.syspath_prepend(Path(__file__).with_name("daemon"))  # as the processes of `run_area` have it
    with tempfile.TemporaryDirectory(prefix="tkh") as directory:  # short enough for a socket
        area = open_area(name, Path(directory))
        report = run_cases(area, seed=SEED, numbers=range(int(number), int(number) + 1))
        area.close()
    assert not report.faults, "\n".join(f"{fault}\n{fault.trace}" for fault in report.faults)


# --- The harness itself, with faults planted ---------------------------------------------------------------


class Planted(Area):
    """An area whose seventh case does something."""

    name = "planted"

    def __init__(self, directory: Path, what: str) -> None:
        super().__init__(directory)
        self._what = what
        self._done = 0
        self._kept: list[bytes] = []

    def case(self, random: Random) -> bool:
        self._done += 1
        is_it = self._done == 7
        if self._what == "refusal":
            with refused(self):
                raise StoreError("no")
        if self._what == "IndexError" and is_it:
            with refused(self):
                raise IndexError("out of range")
        if self._what == "WrongAnswerError" and is_it:
            with refused(self):
                raise WrongAnswerError("another block")
        if self._what == "memory at once" and is_it:
            bytearray(b"\1") * (peak_bytes() - resident_bytes() + (40 << 20))
        if self._what == "memory kept":
            self._kept.append(b"\1" * (1 << 20))
        if self._what == "files":
            os.open(os.devnull, os.O_RDONLY)
        return self._done % 2 == 0


def print_report_of_planted(directory: str, what: str) -> None:
    area = Planted(Path(directory), what)
    report = run_cases(area, seed=5, numbers=range(40), case_bytes=30 << 20, growth_bytes=16 << 20)
    print(json.dumps(report.as_json()))


@pytest.mark.parametrize(
    ("what", "number"),
    [("IndexError", 6), ("WrongAnswerError", 6), ("memory at once", 6), ("memory kept", 39), ("files", 39)],
)
def test_a_planted_fault_is_found_with_its_case(tmp_path: Path, what: str, number: int) -> None:
    code = "import sys, test_hostile_inputs; test_hostile_inputs.print_report_of_planted(*sys.argv[1:])"
    line = [sys.executable, "-c", code, str(tmp_path), what]  # a process of its own: this one's memory has a history
    told = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=120).stdout
    report = Report(**{**json.loads(told), "faults": [Fault(**each) for each in json.loads(told)["faults"]]})
    assert [(fault.number, fault.what.startswith(what)) for fault in report.faults] == [(number, True)]


def test_a_sound_area_has_no_fault_and_its_refusals_are_counted(tmp_path: Path) -> None:
    report = run_cases(Planted(tmp_path, "refusal"), seed=5, numbers=range(40))
    assert (report.faults, report.cases, report.deep, report.refused) == ([], 40, 20, {"StoreError": 40})


@pytest.mark.parametrize(("area", "how"), [("hangs", "hang"), ("dies", "died")])
def test_a_case_that_hangs_or_dies_is_named_and_the_rest_goes_on(area: str, how: str) -> None:
    started = time.monotonic()
    report = run_area(area, seed=1, numbers=range(6), deadline_s=0.3)
    assert [(fault.number, fault.what.split(":")[0]) for fault in report.faults] == [(3, how)]
    assert report.cases == 6
    assert time.monotonic() - started < 30


def test_a_case_depends_on_its_seed_and_number_alone(tmp_path: Path) -> None:
    class Told(Area):
        name = "told"

        def case(self, random: Random) -> bool:
            drawn.append(random.getrandbits(64))
            return True

    drawn: list[int] = []
    run_cases(Told(tmp_path), seed=5, numbers=range(3))
    run_cases(Told(tmp_path), seed=5, numbers=range(1, 2))
    run_cases(Told(tmp_path), seed=6, numbers=range(1))
    assert drawn[1] == drawn[3]
    assert len({*drawn}) == 4
