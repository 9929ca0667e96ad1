"""Chromium, and pages of a running installation in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

if TYPE_CHECKING:
    from tests.live import Live

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PASSWORD = "a-long-test-password"

expect.set_options(timeout=20_000)  # a loaded machine of two cores is slow, not wrong


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Run the system's Chromium."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """Return a fresh browser profile whose pages fail the test on any script error or refused resource."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield context
    context.close()
    unexpected = [problem for problem in problems if not is_lost_connection(problem)]
    assert not unexpected, unexpected


#: What a browser and htmx say of a connection that the test itself took away (leaving a page counts), or of an answer with an error status.
LOST_CONNECTION = (
    "ERR_",
    "Failed to load resource",
    "WebSocket connection",
    "htmx:sendAbort",
    "htmx:afterRequest",
    "Response Status Error Code",
)


def is_lost_connection(problem: str) -> bool:
    """Return whether the browser only reports a connection that the test itself took away, or an answer with an error status."""
    return any(words in problem for words in LOST_CONNECTION)


def sign_in(context: BrowserContext, live: Live, name: str, password: str = PASSWORD) -> Page:
    """Return a page of somebody who has signed in through the form."""
    page = context.new_page()
    page.goto(f"{live.base_url}/sign-in")
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{live.base_url}/")
    return page


def ready(page: Page) -> None:
    """Wait until the chat page's scripts listen; the last thing that they do is to focus the composer."""
    page.wait_for_function("() => document.activeElement?.id === 'composer-text'")


@pytest.fixture
def page(context: BrowserContext, live: Live) -> Page:
    """Return the chat page of an admin."""
    return sign_in(context, live, live.create_admin())
