"""The page in a real headless Chromium, against the service over the walk's model and index.

With CLIPKIT_SCREENSHOT set to the address of a service over the whole demo, the last test also writes
docs/page.png; otherwise it writes to a temporary folder.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.e2e.support import Walk, chromium_path

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DROP = """async ({selector, bytes}) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "dropped.webp", {type: "image/webp"}));
  const target = document.querySelector(selector);
  for (const type of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium_path()
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server_url: str) -> Iterator[Page]:
    """A fresh visitor; console errors and policy violations fail the test."""
    context = browser.new_context(
        base_url=server_url, locale="en-US", viewport={"width": 1280, "height": 800}
    )
    opened = context.new_page()
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    opened.on("console", listen)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    wanted = [text for text in complaints if "status of 4" not in text]
    assert wanted == []


def results(page: Page, count: int = 24) -> None:
    """Wait for a whole page of results, with their pictures drawn."""
    expect(page.locator("#results .tile")).to_have_count(count)
    expect(page.locator("#results img.ready")).to_have_count(count)


def test_search_shows_pictures_with_scores(page: Page) -> None:
    page.goto("/")
    page.fill("#query", "a smiling cat")
    page.press("#query", "Enter")
    results(page)
    scores = [float(text) for text in page.locator("#results .score b").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert re.search(r"q=a(\+|%20)smiling", page.url)
    assert "24" in page.locator("#summary").inner_text()
    assert "24 results" in page.locator("#live").inner_text()
    page.locator("#results .tile").nth(3).click()
    expect(page).to_have_url(re.compile(r"id=\d+"))
    results(page)
    page.go_back()
    expect(page.locator("#query")).to_have_value("a smiling cat")
    results(page)


def test_search_with_a_chosen_and_a_dropped_picture(page: Page, walk: Walk) -> None:
    page.goto("/")
    page.set_input_files("#file", walk.pictures / "0011.webp")
    results(page)
    expect(page.locator("#query-chip img")).to_be_visible()
    best = page.locator("#results .tile").first
    assert best.get_attribute("href") == "/?id=11"
    page.evaluate(DROP, {"selector": "main", "bytes": list((walk.pictures / "0023.webp").read_bytes())})
    expect(page.locator("#results .tile").first).to_have_attribute("href", "/?id=23")


def test_classify_shows_bars_that_sum_to_one(page: Page, walk: Walk) -> None:
    page.goto("/?mode=classify")
    page.set_input_files("#file", walk.pictures / "0005.webp")
    page.click("#labels-clear")
    page.fill("#label", "a flag, a face, a hand")
    page.press("#label", "Enter")
    expect(page.locator("#bars li.first")).to_be_visible()
    expect(page.locator("#bars li")).to_have_count(3)
    values = [
        float(bar.get_attribute("aria-valuenow") or "nan") for bar in page.locator("#bars .track").all()
    ]
    assert sum(values) == pytest.approx(100, abs=0.1)
    assert values == sorted(values, reverse=True)
    widths = [bar.bounding_box() for bar in page.locator("#bars .track i").all()]
    assert all(box is not None for box in widths)
    page.locator("#chips button").first.click()
    expect(page.locator("#bars li")).to_have_count(2)


def test_chinese(page: Page) -> None:
    page.goto("/")
    page.click("#language")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("#search-title")).to_have_text("用文字，找到图片")
    page.fill("#query", "猫")
    page.press("#query", "Enter")
    results(page)
    names = page.locator("#results .name").all_inner_texts()
    assert any(re.search(r"[\u4e00-\u9fff]", name) for name in names)
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.click("#language")
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_a_chinese_browser_gets_chinese(browser: Browser, server_url: str) -> None:
    context = browser.new_context(locale="zh-CN")
    opened = context.new_page()
    opened.goto(server_url)
    expect(opened.locator("#query")).to_have_attribute("placeholder", "描述一张图片……")
    context.close()


def test_keyboard_alone(page: Page) -> None:
    page.goto("/")
    page.locator("body").click(position={"x": 5, "y": 300})
    page.keyboard.press("/")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type("fruit")
    page.keyboard.press("Enter")
    results(page)
    page.keyboard.press("ArrowDown")
    expect(page.locator("#results .tile").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    second = page.locator("#results .tile").nth(1)
    expect(second).to_be_focused()
    wanted = second.get_attribute("href")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(re.escape(wanted or "?") + "$"))
    page.keyboard.press("Escape")
    expect(page.locator("#query")).to_be_focused()
    expect(page.locator("#query")).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/?q=cat", "/?mode=classify"])
def test_a_phone_has_no_sideways_scroll(browser: Browser, server_url: str, scheme: str, path: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, locale="en-US")  # pyright: ignore[reportArgumentType]
    opened = context.new_page()
    opened.goto(server_url + path, wait_until="networkidle")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    channels = opened.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)"
    )
    assert (sum(channels[:3]) > 380) == (scheme == "light")
    context.close()


def test_a_bad_picture_is_explained(page: Page, walk: Walk) -> None:
    page.goto("/")
    whole = (walk.pictures / "0002.webp").read_bytes()
    broken = walk.root / "broken.webp"
    broken.write_bytes(whole[: len(whole) // 2])
    page.set_input_files("#file", broken)
    expect(page.locator(".problem h2")).to_be_visible()
    expect(page.locator(".problem .code")).to_contain_text("422")
    page.fill("#query", "cat")
    page.press("#query", "Enter")
    results(page)


def test_screenshot(browser: Browser, server_url: str, tmp_path: Path) -> None:
    address = os.environ.get("CLIPKIT_SCREENSHOT")
    target = Path(__file__).parents[2] / "docs/page.png" if address else tmp_path / "page.png"
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    opened = context.new_page()
    opened.goto(f"{address or server_url}/?q=woman+firefighter%3A+dark+skin+tone", wait_until="networkidle")
    results(opened)
    opened.screenshot(path=target)
    context.close()
    assert target.stat().st_size > 20_000
