"""Helpers for tests in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

SCREENSHOTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

_SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium; skip the test if it or Playwright is not installed."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=list(_SWITCHES))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Browser, url: str, *, size: str = "desktop", is_dark: bool = False) -> Iterator[Page]:
    """Open a page; afterwards, check that it had no error and sent no request to another host."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if is_dark else "light")
    problems: list[str] = []
    page.on("console", lambda message: problems.extend(_problem_of(message)))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.extend([] if _is_own(request.url, url) else [request.url]))
    page.goto(url)
    yield page
    page.close()
    assert problems == []


def _is_own(requested: str, url: str) -> bool:
    """Return whether a request goes to the page's host, or reads what the page has made itself."""
    return requested.removeprefix("blob:").startswith(url)


def _problem_of(message: ConsoleMessage) -> list[str]:
    # Chromium logs each 4xx reply as an error. The page handles those of the API.
    is_handled = "status of 4" in message.text and "/v1/" in message.location["url"]
    is_problem = message.type in ("error", "warning") and not is_handled
    return [message.text] if is_problem else []


def check_accessibility(page: Page) -> None:
    """Check that axe-core finds nothing serious on the page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    violations = axe.run(page).response["violations"]
    serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []


def screenshot(page: Page, name: str, *, is_whole: bool = True) -> None:
    """Write a picture of the whole page, or of its visible part, to `build/screenshots`."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=is_whole)
