"""The page in headless Chromium, at two widths: a chat of two turns in which the cached tokens go up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedEngine, scripted_server
from serve_process import running_server

sync_api = pytest.importorskip("playwright.sync_api", reason="of the extra dev")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

expect = sync_api.expect
SHOTS = os.environ.get("TIERKV_SCREENSHOTS")  # a folder that keeps pictures of the page
WIDTHS = {"narrow": (390, 844), "wide": (1280, 800)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        expect.set_options(timeout=30_000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=[*WIDTHS])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return an empty page of one width that collects its errors."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    yield page
    context.close()


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#send")
    expect(page.locator("#send")).to_have_text("Send")


def number_of(page: Any, selector: str) -> int:
    return int(page.text_content(selector).replace(",", ""))


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}-{page.viewport_size['width']}.png"))


def assert_fits(page: Any) -> None:
    """Nothing is wider than the window, and the field to write in is on the screen."""
    size = page.viewport_size
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("document.documentElement.scrollHeight") <= size["height"]
    box = page.locator("#prompt").bounding_box()
    assert box["y"] + box["height"] <= size["height"]


def test_a_chat_of_two_turns_sees_its_cached_tokens_go_up(page: Any, model_path: Path, tmp_path: Path) -> None:
    with running_server(model_path, tmp_path) as server:
        page.goto(server.url)
        expect(page.locator("#cold-text")).to_contain_text("of 256 MiB")
        assert_fits(page)
        shoot(page, "empty")
        page.fill("#prompt", "What do you know about caches?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".note")
        first = number_of(page, "#last-cached")
        expect(page.locator("#load")).to_have_text("0, 0")
        page.wait_for_timeout(500)  # the partial block is written in the background
        say(page, "And about disks?")
        page.wait_for_selector(".message:nth-of-type(4) .note")
        second = number_of(page, "#last-cached")
        answer = page.text_content(".message.assistant p")
        assert len(answer) == 256
        assert second >= first + 256, "the second turn finds the first one, answer included"
        expect(page.locator("#hit-rate")).not_to_have_text("0.0 %")
        assert float(page.evaluate("document.getElementById('hot-bar').value")) > 0
        assert_fits(page)
        shoot(page, "chat")
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        shoot(page, "dark")
        page.click("summary")
        assert_fits(page)
        shoot(page, "options")
        page.click("#clear")
        assert page.locator(".message").count() == 0
        assert page.errors == []


def test_an_answer_of_markup_is_shown_as_text(page: Any, model_path: Path) -> None:
    from transformers import AutoTokenizer

    attack = "<img/src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    ids = AutoTokenizer.from_pretrained(model_path).encode(attack)
    with scripted_server(model_path, ScriptedEngine(ids)) as (url, _):
        page.goto(url)
        expect(page.locator("#model")).to_have_text("scripted")
        say(page, attack)
        assert page.text_content(".message.assistant p") == attack
        assert page.text_content(".message.user p") == attack
        assert page.locator(".messages img").count() == 0
        assert page.title() == "tierkv"
        assert page.errors == []


def test_errors_the_key_and_the_stop_button(page: Any, model_path: Path) -> None:
    import threading

    from tierkv.errors import QueueFullError

    gate = threading.Event()
    engine = ScriptedEngine(list(range(40)), refusal=QueueFullError("1,024 requests wait"), gate=gate)
    with scripted_server(model_path, engine, api_key="sesame") as (url, service):
        page.goto(url)
        expect(page.locator("#state")).to_have_text("needs the API key")
        page.fill("#key", "sesame")
        expect(page.locator("#model")).to_have_text("scripted")
        say(page, "Hello")
        assert page.text_content(".note.bad") == "1,024 requests wait"
        shoot(page, "error")
        assert_fits(page)
        engine.refusal = None
        page.fill("#prompt", "Hello again")
        page.click("#send")
        expect(page.locator(".message.assistant p").nth(1)).not_to_be_empty()
        assert page.text_content("#send") == "Stop"
        page.click("#send")
        expect(page.locator("#send")).to_have_text("Send")
        assert page.locator(".note").last.text_content() == "stopped"
        for _ in range(100):
            if not service.num_active:
                break
            page.wait_for_timeout(50)
        assert service.num_active == 0
