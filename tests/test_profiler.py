"""The profiler over a fake cache: what it records, and the report that it makes."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_cache import BLOCK_BYTES, FakeCache

from tierkv.errors import ConfigError
from tierkv.profiling.advice import LEAST_REQUESTS, suggest
from tierkv.profiling.first_tokens import FirstTokenRecorder
from tierkv.profiling.measured import Eviction, EvictionSummary, Measured
from tierkv.profiling.profiled_run import HeatMap
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.profiling.recorder import EvictionRecorder
from tierkv.values.block import Tier
from tierkv.values.events import EventKind, Span


class Clock:
    """Goes on by a second each time it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in order."""

    void = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def profiled(cache: FakeCache, **options: Any) -> MemoryProfiler:
    return MemoryProfiler(cache, clock=Clock(), **options)


# --- Recording --------------------------------------------------------------------------------------------


def test_a_profiler_without_a_cache_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="observes no cache"):
        MemoryProfiler().generate_report()


def test_iterations_without_a_cache_are_only_timed() -> None:
    profiler = MemoryProfiler(clock=Clock())
    profiler.start_iteration("a")
    profiler.end_iteration()
    assert [each.label for each in profiler.iterations] == ["a"]


def test_an_iteration_that_was_not_begun_cannot_end() -> None:
    with pytest.raises(ConfigError, match="start_iteration"):
        MemoryProfiler().end_iteration()


def test_requests_belong_to_the_iteration_that_is_open() -> None:
    cache = FakeCache()
    profiler = profiled(cache)
    cache.request((None, 1))
    with profiler.iteration():
        cache.request((Tier.HOT, 1), (None, 2))
    (iteration,) = profiler.iterations
    assert (iteration.requests, iteration.hits[Tier.HOT], iteration.misses, iteration.prompt_tokens) == (1, 1, 1, 8)


def test_a_closed_profiler_records_nothing_and_still_reports() -> None:
    cache = FakeCache()
    profiler = profiled(cache)
    cache.request((Tier.HOT, 1))
    profiler.close()
    profiler.close()
    assert cache.observers == []
    assert profiler.generate_report().memory_heatmap


@pytest.mark.parametrize("ended_first", ["the cache", "the profiler"])
def test_a_run_is_reported_although_its_cache_is_closed(ended_first: str) -> None:
    cache = FakeCache()
    profiler = profiled(cache)
    with profiler.iteration("one"):
        cache.request((Tier.HOT, 1))
        if ended_first == "the cache":
            cache.is_closed = True
    profiler.generate_report()
    cache.is_closed = True
    profiler.close()
    profiler.close()
    assert [each.label for each in profiler.generate_report().run.iterations] == ["one"]


def test_snapshots_of_a_long_run_thin_out_and_keep_both_ends() -> None:
    profiler = profiled(FakeCache())
    for _ in range(3000):
        profiler.take_snapshot()
    times = [each.timestamp for each in profiler.snapshots]
    assert len(times) <= 1001 and times == sorted(times)
    assert times[0] < 10 and times[-1] > 2900


def test_a_heat_map_merges_its_bins_and_loses_no_use() -> None:
    heat = HeatMap(0.0, bin_s=1.0, max_bins=4)
    for second in range(13):
        heat.add([7], float(second), 1)
    assert heat.bin_s == 4.0
    assert heat.cells == {(7, 0): 4, (7, 1): 4, (7, 2): 4, (7, 3): 1}


def test_an_eviction_is_matched_with_the_request_that_wanted_the_block_back() -> None:
    log = EvictionRecorder()
    log.record_arrival(Tier.HOT, b"a", 1.0)
    log.record_request(b"a", Tier.HOT, 2.0, was_lost=False)
    log.record_eviction(Tier.HOT, b"a", 5.0)
    log.record_eviction(Tier.HOT, b"b", 6.0)
    log.record_request(b"a", None, 8.0, was_lost=True)
    log.record_request(b"a", None, 9.0, was_lost=True)
    first, second = log.evictions
    assert (first.age_s, first.idle_s, first.hits) == (4.0, 3.0, 1)
    assert (first.asked_after_blocks, first.was_lost) == (1, True)
    assert second.asked_after_blocks is None


def test_an_eviction_log_is_bounded_and_says_what_it_dropped() -> None:
    log = EvictionRecorder(max_evictions=3)
    for number in range(5):
        log.record_eviction(Tier.HOT, bytes([number]), float(number))
    log.record_request(bytes([0]), None, 9.0, was_lost=True)
    assert log.dropped == 2 and len(log.evictions) == 3
    assert all(each.asked_after_blocks is None for each in log.evictions)


# --- Advice -------------------------------------------------------------------------------------------------


def measured(cache: FakeCache, **changes: Any) -> Measured:
    before = FakeCache(hot=cache.hot, warm=cache.warm).stats()
    fields: dict[str, Any] = {
        "config": cache.config,
        "block_bytes": BLOCK_BYTES,
        "before": before,
        "after": cache.stats(),
        "largest_request": 1,
        "peak_hot_blocks": cache.hot,
        "distances": (),
        "evictions": (),
        "work": {},
        "skips": {},
        "misses": {},
    }
    return Measured(**{**fields, **changes})


def evicted(number: int, *, after: int | None, lost: bool = False, tier: Tier = Tier.HOT) -> Eviction:
    return Eviction(
        time=1.0, tier=tier, block_hash=bytes([number]), age_s=2.0, idle_s=1.0, hits=0,
        asked_after_blocks=after, was_lost=lost,
    )  # fmt: skip


def test_evictions_are_too_early_within_one_turnover_of_the_tier() -> None:
    evictions = [evicted(1, after=0, lost=True), evicted(2, after=3), evicted(3, after=4), evicted(4, after=None)]
    summary = EvictionSummary.of(Tier.HOT, evictions, capacity=4)
    assert (summary.count, summary.asked_again, summary.premature, summary.lost) == (4, 3, 2, 1)
    assert summary.room_missed == 4


def test_a_cyclic_run_gets_the_hot_size_that_holds_it_suggested() -> None:
    cache = FakeCache(hot=4)
    cache.counters = {"requests": 120, "misses": 20}
    run = measured(cache, distances=[None] * 5 + [5] * 15, evictions=[evicted(1, after=5, lost=True)])
    (suggestion,) = suggest(run)
    assert suggestion.setting == "hot_bytes"
    assert suggestion.proposed == "448 B (7 blocks)"  # five others, the block itself, one in use
    assert suggestion.effect.startswith(
        "15 of 20 blocks asked for (75.0%) would have been hot under LRU instead of computed"
    )


def test_cold_hits_of_blocks_used_before_ask_for_a_larger_warm_tier() -> None:
    cache = FakeCache(hot=2, warm=2)
    cache.counters = {"requests": 110, "misses": 2}
    cache.hits[Tier.COLD] = 8
    run = measured(
        cache, distances=[None] * 2 + [5] * 8, work={"read cold": (4, 1.5), "load in the background": (4, 0.5)}
    )
    (suggestion,) = suggest(run)
    assert suggestion.setting == "warm_bytes"
    assert "under LRU: the cache's own policy may need more or less" in suggestion.evidence
    assert "8 of 8 cold hits would have been warm under LRU, 2.00 s of reading" in suggestion.effect


def test_a_hot_pool_that_was_never_full_may_shrink() -> None:
    cache = FakeCache(hot=100)
    cache.counters = {"requests": 100, "misses": 3}
    (suggestion,) = suggest(measured(cache, peak_hot_blocks=9))
    assert (suggestion.setting, suggestion.proposed) == ("hot_bytes", "640 B (10 blocks)")
    assert suggestion.effect.startswith("5.6 KiB would be free")


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"skips": {"full": (3, 192)}}, "cold_bytes", "3 blocks, 192 B before compression"),
        ({"skips": {"queue_full": (5, 320)}}, "num_io_threads", "up to 5 blocks, 320 B, would have been written"),
        ({"misses": {"too_short": (2, 8)}}, "min_partial_tokens", "2 requests would have reused"),
    ],
)
def test_what_was_dropped_names_the_setting_that_dropped_it(changes: Any, setting: str, words: str) -> None:
    cache = FakeCache()
    cache.counters = {"requests": 100, "misses": 3}
    (suggestion,) = suggest(measured(cache, **changes))
    assert suggestion.setting == setting and words in suggestion.effect


def test_a_run_that_went_well_suggests_nothing() -> None:
    cache = FakeCache()
    cache.counters = {"requests": 300, "misses": 1}
    assert list(suggest(measured(cache, distances=[None, 0, 0]))) == []


def test_advice_says_on_how_many_requests_it_rests_and_is_silent_below_a_hundred() -> None:
    cache = FakeCache(hot=100)
    cache.counters = {"requests": LEAST_REQUESTS - 1, "misses": 3}
    assert list(suggest(measured(cache, peak_hot_blocks=9))) == []
    cache.counters = {"requests": LEAST_REQUESTS, "misses": 3}
    (suggestion,) = suggest(measured(cache, peak_hot_blocks=9))
    assert suggestion.evidence.endswith("; from 100 requests")


def test_seconds_saved_are_measured_by_the_fastest_computed_prompt() -> None:
    recorder = FirstTokenRecorder(max_requests=4)
    assert recorder.recorded().saved_s is None and recorder.recorded().median_s is None
    recorder.add(1000, 0, 9.0)  # falls out: there is room for four
    for tokens, cached, seconds in ((1000, 0, 3.0), (1000, 0, 2.0), (1000, 990, 0.5), (1000, 1000, 4.0)):
        recorder.add(tokens, cached, seconds)
    first = recorder.recorded()
    assert first.token_s == 0.002 and first.saved_s == 1.5, "a load that was slower saved nothing"
    assert first.median_s == 2.25 and first.computed_median_s == 2.5
    for nonsense in ((1, 2, 1.0), (1, -1, 1.0), (1, 1, -1.0), (1, 1, float("nan"))):
        with pytest.raises(ConfigError):
            recorder.add(*nonsense)


def test_a_run_without_requests_suggests_nothing() -> None:
    assert list(suggest(measured(FakeCache(hot=100), peak_hot_blocks=1))) == []


# --- The page and the trace ------------------------------------------------------------------------------------


def busy_profiler() -> MemoryProfiler:
    cache = FakeCache()
    profiler = profiled(cache)
    for number in range(8):
        with profiler.iteration():
            cache.request((Tier.HOT if number % 2 else None, number % 3))
            cache.tell(EventKind.REGISTER, Tier.HOT, number, slot=number % 4)
            cache.tell(EventKind.EVICT, Tier.HOT, number, slot=number % 4)
            for observer in cache.observers:
                observer.on_span(Span("acquire", 1.0, 1.5, "main", {"blocks": 1}))
    cache.counters = {"requests": 8, "misses": 4, "prompt_tokens": 32}
    return profiler


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = busy_profiler().generate_report().save_html(tmp_path / "memory_profile.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 4 and page.tags.count("details") == 1, "nothing was stored or fragmented"
    assert "script" not in page.tags
    assert {name for name, _ in page.attributes} & {"src", "href", "srcset"} == set()
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text
    assert ("name", "viewport") in page.attributes


def test_a_page_without_matplotlib_has_its_text_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = busy_profiler().generate_report().save_html(tmp_path / "page.html").read_text()
    page = Page(text)
    assert "svg" not in page.tags and "Charts need matplotlib" in text and "8 requests" in text


def test_charts_take_their_colors_from_the_style_sheet_and_repeat_no_id(tmp_path: Path) -> None:
    page = Page(busy_profiler().generate_report().save_html(tmp_path / "page.html").read_text())
    styles = " ".join(value or "" for name, value in page.attributes if name == "style")
    assert "var(--hot)" in styles and "var(--soft)" in styles and "#000000" not in styles
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_of_an_idle_cache_says_so(tmp_path: Path) -> None:
    text = profiled(FakeCache()).generate_report().save_html(tmp_path / "page.html").read_text()
    Page(text)
    assert "No request was made" in text


def test_what_the_caller_says_of_a_run_is_text_on_the_page(tmp_path: Path) -> None:
    report = busy_profiler().generate_report(title="<b>run</b>", about={"model": "<script>alert(1)</script>"})
    text = report.save_html(tmp_path / "page.html").read_text()
    assert "<script>" not in text and "&lt;b&gt;run&lt;/b&gt;" in text


def test_the_names_of_the_plan_are_there() -> None:
    report = busy_profiler().generate_report()
    assert report.allocation_timeline[0].fragmentation_ratio == 0
    assert report.eviction_analysis[Tier.HOT].count == 8
    assert list(report.optimization_suggestions) == list(report.run.suggestions)
