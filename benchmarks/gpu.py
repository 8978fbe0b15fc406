"""All figures of the GPU path in one table, each beside a limit measured in the same run."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import attention, cascade, mover, race_hunt
from benchmarks.ttft import Timing, machine, measure, random_model
from tierkv.config import CacheConfig
from tierkv.engine.backends.protocol import LayerShape
from tierkv.engine.models import LoadedModel
from tierkv.engine.runner import open_runner

__all__ = ["Row", "main"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a measurement, the limit or baseline beside it, their ratio, and the aim for the ratio."""

    what: str
    measured: str
    beside: str
    ratio: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """Return whether the aim is met, as a word; empty without an aim."""
        if self.ratio is None or (self.at_least is None and self.at_most is None):
            return ""
        is_met = self.ratio >= self.at_least if self.at_least is not None else self.ratio <= (self.at_most or 0)
        return "yes" if is_met else "NO"


def main() -> None:
    """Run all sections on one GPU; `--json FILE` keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(_SECTIONS), default=list(_SECTIONS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a GPU: there is no CUDA device here")
        return
    described = machine(torch.device("cuda")) | _versions()
    print("  ".join(f"{name}: {value}" for name, value in described.items()), flush=True)
    print(f"{'what':<66}{'measured':>14}  {'beside':<34}{'ratio':>7}  {'aim':<9}met")
    rows: list[Row] = []
    for name in arguments.only:
        try:
            for row in _SECTIONS[name]():
                rows.append(row)
                _print(row)
        except Exception as exc:  # noqa: BLE001 - a failed section must not lose the others
            print(f"{name} failed: {type(exc).__name__}: {exc}", flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": described, "rows": [asdict(row) for row in rows]}, indent=1))


def _print(row: Row) -> None:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}" if row.ratio < 10 else f"{row.ratio:.1f}"
    aim = f">= {row.at_least}" if row.at_least is not None else f"<= {row.at_most}" if row.at_most is not None else ""
    print(f"{row.what:<66}{row.measured:>14}  {row.beside:<34}{ratio:>7}  {aim:<9}{row.verdict}", flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("triton", "flash_attn"):
        found[name] = str(__import__(name).__version__)
    return found


def _moves() -> Iterator[Row]:
    link_in, link_out = mover.link_gb_s(to_gpu=True), mover.link_gb_s(to_gpu=False)
    aims = {"raw": 0.98, "compressed": 1.35, "pages": 0.92}
    for figure in mover.block_moves():
        link = link_in if figure.is_up else link_out
        aim = aims.get(figure.kind)
        yield Row(figure.what, f"{figure.gb_s:.1f} GB/s", f"link {link:.1f} GB/s", figure.gb_s / link, aim)
    yield Row("LMCache 0.5.1's kernel on such a machine, quoted", "50.3 to 52.1", "link 55.1 GB/s", 52.1 / 55.1)


def _decode() -> Iterator[Row]:
    for what, step_ms, alone_ms, at_most in mover.decode_beside_moves():
        yield Row(what, f"{step_ms:.2f} ms", f"alone {alone_ms:.2f} ms", step_ms / alone_ms, at_most=at_most)


def _ttft() -> Iterator[Row]:
    """Measure the time to the first token, as a ratio to recompute in the same run."""
    device = torch.device("cuda")
    loaded = LoadedModel(random_model("8b", device), None, "8b")
    for warm_codec in ("raw", "windows"):
        with tempfile.TemporaryDirectory() as directory:
            config = CacheConfig(
                cold_path=Path(directory) / "store",
                hot_bytes=12 << 30,
                warm_bytes=10 << 30,
                cold_bytes=16 << 30,
                warm_codec=warm_codec,
            )
            with open_runner(loaded, config, max_step_tokens=65_536) as runner:
                for tokens in (1024, 8192, 32_768):
                    timing = (
                        measure(runner, tokens, 32, 5)
                        if warm_codec == "raw"
                        else measure(runner, tokens, 32, 5, ["recompute", "warm"])
                    )
                    yield from _ttft_rows(timing, warm_codec)


def _ttft_rows(timing: Timing, warm_codec: str) -> Iterator[Row]:
    base = timing.times_s["recompute"]
    beside = f"recompute {base * 1e3:.1f} ms"
    for name, seconds in timing.times_s.items():
        if name == "recompute":
            continue
        what = f"{timing.tokens} tokens cached: {name}" + (", compressed" if warm_codec == "windows" else "")
        aim = 12.0 if (timing.tokens, name) == (8192, "warm") else 1.0 if "compute or load" in name else None
        yield Row(what, f"{seconds * 1e3:.1f} ms", beside, base / seconds, aim)


def _attention() -> Iterator[Row]:
    """Measure what the choice among attention backends gains in one layer of Llama-3.1-8B's shape."""
    layer = LayerShape("cuda", torch.bfloat16, 32, 8, 128, 128, 256, 128**-0.5)
    shapes = [attention.Shape(1, 32, 32_768), attention.Shape(8, 128, 4096), attention.Shape(16, 1, 8192)]
    table = attention.measure(layer, shapes)
    for each in attention.choices(table, layer, shapes, num_layers=32):
        shape = each.shape
        what = f"attention of {shape.sequences} x {shape.new} new tokens of {shape.kv}, {each.name}"
        aim = 1.54 if shape.new == 128 else 1.0
        yield Row(what, f"{each.us:.1f} us", f"flash-attn {each.flash_us:.1f} us", each.flash_us / each.us, aim)


def _cascade() -> Iterator[Row]:
    for batch, shared, aim in ((64, 8192, 3.5), (16, 8192, None), (64, 1024, None)):
        plain_us, cascade_us = cascade.compare(batch, shared)
        what = f"decode attention of {batch} sequences, {shared} shared tokens, 200 own"
        yield Row(what, f"{cascade_us:.1f} us", f"plain {plain_us:.1f} us", plain_us / cascade_us, aim)


def _races() -> Iterator[Row]:
    for warm_codec in ("raw", "windows"):
        found = race_hunt.hunt(num_steps=4000, seed=0, warm_codec=warm_codec, device="cuda")
        what = f"race hunt, {found.steps} random steps, warm tier {warm_codec}: wrong bytes in"
        yield Row(what, f"{found.wrong} reads", f"{found.checked_blocks} blocks checked", float(found.wrong), at_most=0)


def _sanitizer() -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tests = str(Path(__file__).resolve().parent.parent / "tests" / "kernels")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    command += ["-p", "no:cacheprovider", "-W", "default", tests]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        yield Row("compute-sanitizer memcheck of the kernels' tests", "not run", type(exc).__name__)
        return
    summary = next((line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line), "no summary")
    outcome = next((line for line in reversed(done.stdout.splitlines()) if " passed" in line), "tests did not run")
    errors = 0.0 if "ERROR SUMMARY: 0 errors" in summary and done.returncode == 0 else 1.0
    beside = outcome.strip("= ")[:34]
    yield Row(
        "compute-sanitizer memcheck of the kernels' tests", summary.split(":")[-1].strip(), beside, errors, at_most=0
    )


_SECTIONS: dict[str, Callable[[], Iterable[Row]]] = {
    "moves": _moves,
    "decode": _decode,
    "ttft": _ttft,
    "attention": _attention,
    "cascade": _cascade,
    "races": _races,
    "sanitizer": _sanitizer,
}


if __name__ == "__main__":
    main()
