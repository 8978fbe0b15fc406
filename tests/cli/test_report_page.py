"""The page of `tierkv report` in headless Chromium, at two widths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_profiler import busy_profiler

from tierkv.profiling.profiler import MemoryProfiler

sync_api = pytest.importorskip("playwright.sync_api", reason="of the extra dev")
pytest.importorskip("matplotlib", reason="of the extra report")
CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

SHOTS = os.environ.get("TIERKV_SCREENSHOTS")  # a folder that keeps pictures of the page
WIDTHS = {"narrow": (390, 844), "wide": (1280, 800)}
LABEL_PX = 11  # of a chart's text, that can be read on a phone
TEXTS = """() => [...document.querySelectorAll('svg')].map(svg => ({
    edge: svg.getBoundingClientRect().toJSON(),
    texts: [...svg.querySelectorAll('text')].map(each => each.getBoundingClientRect().toJSON()),
    size: Math.min(...[...svg.querySelectorAll('text')].map(each =>
        parseFloat(getComputedStyle(each).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=[*WIDTHS])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    yield context.new_page()
    context.close()


def show(page: Any, profiler: MemoryProfiler, folder: Path) -> None:
    path = profiler.generate_report().save_html(folder / "report.html")
    page.goto(path.absolute().as_uri())
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/report-{page.viewport_size['width']}.png", full_page=True)


def timed_profiler() -> MemoryProfiler:
    profiler = busy_profiler()
    for cached in (0, 900, 900, 900):
        profiler.record_first_token(prompt_tokens=1000, cached_tokens=cached, seconds=0.1 if cached else 2.0)
    return profiler


def test_the_first_numbers_are_the_seconds_saved_and_the_time_to_the_first_token(page: Any, tmp_path: Path) -> None:
    show(page, timed_profiler(), tmp_path)
    tiles = page.locator(".tile").all_inner_texts()
    assert tiles[0].startswith("2.7 s") and tiles[1].startswith("100 ms") and "2 s where nothing was cached" in tiles[1]
    assert "Advice needs 100 requests; this run had 8." in page.inner_text("main")


def test_the_labels_of_charts_are_large_enough_and_do_not_overlap(page: Any, tmp_path: Path) -> None:
    show(page, timed_profiler(), tmp_path)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    charts = page.evaluate(TEXTS)
    assert len(charts) >= 4
    for chart in charts:
        assert chart["size"] >= LABEL_PX
        edge, texts = chart["edge"], chart["texts"]
        for at, one in enumerate(texts):
            assert edge["left"] - 1 <= one["left"] and one["right"] <= edge["right"] + 1, "it is cut off"
            for other in texts[at + 1 :]:
                is_beside = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
                assert is_beside or one["bottom"] <= other["top"] + 3 or other["bottom"] <= one["top"] + 3


def test_charts_that_show_nothing_are_folded(page: Any, tmp_path: Path) -> None:
    show(page, timed_profiler(), tmp_path)
    folded = page.locator("details")
    assert "Fragmentation of the hot pool" in folded.locator("summary").inner_text()
    assert not folded.locator("dl").is_visible()
    folded.locator("summary").click()
    assert "No tier held a block" in folded.locator("dl").inner_text()
    assert "outside the longest run" in folded.locator("dl").inner_text()
    assert "Memory held" not in page.locator("h2").all_inner_texts(), "no observer named memory"
