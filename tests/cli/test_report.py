"""`tierkv report` and `tierkv top`, as a user types them, on the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fake_cache import FakeCache
from one_command import Command

from tierkv.profiling.metrics import serve_metrics
from tierkv.values.block import Tier
from tierkv.values.events import EventKind


def short_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("You sort letters. " * 40 + "\n---\n" + "You sort letters. " * 20 + "Numbers too. " * 30)
    return path


def test_a_report_of_prompts_is_a_page_and_a_trace_that_agree(command: Command, tmp_path: Path) -> None:
    result = command(
        "report", short_prompts(tmp_path), "--max-new-tokens", 2, "--no-plots", "--output", "out", "--json"
    ).json()
    assert result["requests"] == 4 and result["hit_tokens"]["hot"] > 600
    assert result["files"] == ["out/memory_profile.html", "out/trace.json"]
    page = (tmp_path / "out/memory_profile.html").read_text()
    assert f"4 requests with {result['prompt_tokens']:,} prompt tokens" in page
    trace = json.loads((tmp_path / "out/trace.json").read_text())
    assert [e["name"] for e in trace["traceEvents"] if e.get("cat") == "iteration"] == [
        "prompt 1, round 1", "prompt 2, round 1", "prompt 1, round 2", "prompt 2, round 2",
    ]  # fmt: skip


def test_a_report_draws_three_plots(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command("report", short_prompts(tmp_path), "--rounds", 1, "--max-new-tokens", 1, "--output", "out", "--json").json()
    plots = sorted(path for path in (tmp_path / "out").glob("*.png"))
    assert [path.stem for path in plots] == ["allocation_timeline", "fragmentation", "memory_heatmap"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in plots)


def test_a_report_where_plots_cannot_be_drawn_is_the_page_and_a_word_about_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = command("report", short_prompts(tmp_path), "--max-new-tokens", 1, "--output", "out", "--json")
    assert code == 0 and json.loads(out)["files"] == ["out/memory_profile.html", "out/trace.json"]
    assert "no plots: plots need matplotlib (pip install 'tierkv[report]')" in err


def test_a_report_without_a_file_runs_the_prompts_of_the_store(command: Command, tmp_path: Path) -> None:
    command("warm", short_prompts(tmp_path), "--json")
    result = command("report", "--rounds", 1, "--max-new-tokens", 1, "--no-plots", "--json").json()
    assert result["requests"] == 2
    assert result["hit_tokens"]["cold"] + result["hit_tokens"]["hot"] == result["prompt_tokens"] - 2


def test_a_report_of_an_empty_store_says_what_to_do(command: Command) -> None:
    code, _, err = command("report", "--no-plots")
    assert code == 2 and "run tierkv warm first" in err


def test_a_pool_that_is_too_small_is_told_a_size_that_is_not(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierkv.profiling.advice.LEAST_REQUESTS", 1)  # a hundred requests take too long here
    (tmp_path / "three.txt").write_text("\n---\n".join(f"{n} is a number. " * 40 for n in (1, 2, 3)))
    arguments = ("report", "three.txt", "--max-new-tokens", 1, "--no-plots", "--json")
    result = command(*arguments, "--hot", "6M").json()
    assert result["evictions"]["hot"] > 0
    suggested = {each["setting"]: each["proposed"] for each in result["suggestions"]}
    blocks = int(suggested["hot_bytes"].split("(")[1].split()[0])
    again = command(*arguments, "--hot", f"{blocks * 1536}K").json()
    assert "hot_bytes" not in {each["setting"] for each in again["suggestions"]}


def test_top_shows_a_running_process_once(command: Command) -> None:
    pytest.importorskip("prometheus_client")
    cache = FakeCache()
    cache.counters = {"requests": 12, "misses": 5, "miss_reasons": {"absent": 5}, "skipped_writes": 2}
    with serve_metrics(cache, 0) as server:
        cache.tell(EventKind.REGISTER, Tier.HOT, 0xAB)
        code, out, err = command("top", "--url", server.url, "--once")
        status = command("top", "--url", server.url + "/metrics", "--once", "--json").json()
    assert code == 0, err
    for words in ("12 requests", "misses: 5 absent", "writes that were dropped: 2", "largest prefixes", "ab"):
        assert words in out
    assert status["tiers"]["hot"]["capacity_bytes"] == 256


def test_top_shows_a_store_once(command: Command, tmp_path: Path) -> None:
    command("warm", short_prompts(tmp_path), "--json")
    status = command("top", "--store", tmp_path / "store", "--json").json()
    assert status["tiers"]["cold"]["blocks"] == sum(prefix["blocks"]["cold"] for prefix in status["prefixes"])
    code, out, err = command("top", "--store", tmp_path / "store", "--once")
    assert code == 0 and "a store on disk" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "run/tierkv/daemon.sock"),
        (("--socket", "nobody.sock"), "nobody.sock"),
        (("--url", "127.0.0.1:9", "--store", "x"), "--url of a process"),
        (("--url", "127.0.0.1:9"), "nothing answers at http://127.0.0.1:9/status"),
        (("--url", "127.0.0.1:9", "--interval", "0"), "--interval must be positive"),
        (("--store", "nowhere"), "there is no store"),
    ],
)
def test_top_says_in_one_line_what_it_cannot_look_at(command: Command, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = command("top", "--once", *arguments)
    assert code == 2 and words in err and err.count("\n") == 1
