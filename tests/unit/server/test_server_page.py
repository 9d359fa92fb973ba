"""The page: its files, and what people do on it, in a real Chromium where there is one (`make browser`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

import pytest
from server_fakes import LiveServer, serving, small_engine

from openmimo.server.static import FILES
from openmimo.text import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# As root, and without calls to its maker's servers.
ARGUMENTS = [
    f"--{name}"
    for name in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
ANSWER = "#messages li.assistant .token[tabindex]"
DONE = "#messages li.assistant:last-child .note"


def test_every_file_of_the_page_is_served_and_nothing_else(live: LiveServer) -> None:
    """Catches a file that the page names and the server does not know, and paths that lead out of the folder."""
    folder = {file.name for file in resources.files("openmimo.server").joinpath("page").iterdir()}
    assert folder == set(FILES)
    page = live.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "://" not in page.text.replace("http://www.w3.org", "")
    for name, kind in FILES.items():
        found = live.get(f"/page/{name}")
        assert (found.status_code, found.headers["content-type"]) == (200, kind)
    for name in ("..%2fapp.py", "%2e%2e/app.py", "app.py", "index.html%00"):
        assert live.get(f"/page/{name}").status_code == 404


@pytest.fixture(scope="module")
def page(live: LiveServer) -> Iterator[Page]:
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Chromium and the package playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(live.url)
        page.wait_for_selector("#model-name:not(:empty)")
        page.click("#tab-settings")
        page.fill("#max_tokens", "60")
        page.fill("#temperature", "0")
        page.press("#temperature", "Tab")
        page.click("#tab-drafts")
        yield page
        browser.close()
        assert errors == []


def test_a_message_is_sent_with_the_keyboard_and_answered(page: Page) -> None:
    """Catches a page that does not send, stream or count."""
    page.fill("#text", "the weather in Paris")
    page.press("#text", "Enter")
    page.wait_for_selector(DONE)
    assert "tokens/s" in page.inner_text(DONE)
    assert page.inner_text("#messages li.user") == "the weather in Paris"
    assert page.locator(ANSWER).count() > 3


def test_tokens_are_inspected_with_the_keyboard(page: Page) -> None:
    """Catches tokens that only a mouse reaches, and alternatives of another token."""
    page.locator(ANSWER).first.focus()
    first = page.inner_text("#inspector")
    page.keyboard.press("ArrowRight")
    second = page.inner_text("#inspector")
    assert "Most probable here" in first
    assert page.locator(".token.chosen").count() == 1
    assert page.locator("#inspector tbody tr").count() == 5
    assert "Most probable here" in second


def test_the_switch_turns_drafting_off(page: Page) -> None:
    """Catches a switch that only looks: without drafts no token has a head, and a step has one token."""
    page.uncheck("#drafting")
    page.click("#retry")
    page.wait_for_selector(DONE)
    assert page.locator("#messages .token.h1, #messages .token.h2, #messages .token.h3").count() == 0
    assert page.inner_text("#length") == "1.00"
    page.check("#drafting")


def test_experts_and_cache_are_drawn(page: Page) -> None:
    """Catches an empty canvas, and experts of no layer."""
    page.click("#tab-experts")
    page.locator(ANSWER).nth(2).click()
    layers = page.inner_text("#experts-text").split("; ")
    assert len(layers) == 5
    assert all(len(layer.partition(":")[2].split()) == 2 for layer in layers)
    assert page.evaluate("() => document.getElementById('experts').width") > 0
    assert page.locator("#cache .meter").count() == 3


def test_an_answer_can_be_stopped(page: Page, live: LiveServer) -> None:
    """Catches a button that hides the answer and lets the server go on."""
    page.click("#tab-settings")
    page.fill("#max_tokens", "600")
    page.press("#max_tokens", "Tab")
    page.fill("#text", "the weather")
    page.press("#text", "Enter")
    page.wait_for_selector("#messages li.assistant:last-child .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([hidden])")
    live.wait_until_idle()


def test_a_page_can_be_left_out(tokenizer: Tokenizer) -> None:
    """Catches a page that is served although it was switched off."""
    with serving(small_engine(tokenizer), page=False) as server:
        assert server.get("/").status_code == 404
