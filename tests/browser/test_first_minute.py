"""From the set-up link to two tabs that agree with the database to the character."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import ready
from tests.live import Live
from tests.micro_models import make_micro

ANSWER = "article.assistant"


def source(page: Page) -> str:
    """Return the raw text of the last answer as the page holds it."""
    text: str = page.locator(ANSWER).last.evaluate("node => node.source")
    return text


def shown(page: Page) -> str:
    """Return the last answer as a reader sees it."""
    return page.locator(f"{ANSWER} > .md").last.inner_text()


def wait_for_growth(page: Page, beyond: int) -> None:
    """Wait until the last answer is longer than so many characters and still being written."""
    page.wait_for_function(
        "least => { const last = [...document.querySelectorAll('article.assistant')].at(-1);"
        " return last && last.source.length > least && last.dataset.status !== 'completed'; }",
        arg=beyond,
    )


@pytest.mark.slow
def test_set_up_chat_import_stream_reload_second_tab_stop(context: BrowserContext, fresh_live: Live, tmp_path: Path) -> None:
    live = fresh_live
    file = make_micro(tmp_path / "slow-micro.gguf", layers=96, context=4096, name="slow micro")

    # The set-up link makes the admin and leads to the chat.
    page = context.new_page()
    page.goto(live.base_url)
    expect(page.get_by_text("This server has no admin yet")).to_be_visible()
    assert live.setup_url
    page.goto(live.setup_url)
    page.get_by_label("Username").fill("ada")
    page.get_by_label("Password", exact=True).fill("a-long-test-password")
    page.get_by_role("button", name="Create admin").click()
    page.wait_for_url(f"{live.base_url}/")

    # The starter answers in the first minute.
    page.get_by_role("button", name="What is lmweb?").click()
    expect(page.locator(f"{ANSWER}[data-status=completed]")).to_have_count(1)
    expect(page.locator(f"{ANSWER} > .md")).to_contain_text("self-hosted web app for running language models")
    expect(page).to_have_url(re.compile(r"/chat/[0-9a-f-]{36}$"))
    expect(page.locator("#chats a[aria-current=page]")).to_have_text("What is lmweb?")

    # Another model comes in through the browser.
    page.get_by_role("link", name="My Models").click()
    page.get_by_role("button", name="Import a model").click()
    page.locator("#import-file").set_input_files(file)
    page.locator("#import-publisher").fill("test")
    page.locator("#import-repo").fill("slow")
    page.locator("#import-start").click()
    expect(page.locator("#model-list")).to_contain_text("slow")

    # It is chosen in the picker, and its tokens stream.
    page.get_by_role("link", name="Chat", exact=True).click()
    ready(page)
    page.keyboard.press("Control+l")
    page.locator(".picker-row[data-key='test/slow']").click()
    page.locator(".bar [data-toggle-panel]").click()
    page.get_by_label("Temperature").fill("0")  # greedily, this model never ends by itself
    composer = page.get_by_label("Message", exact=True)
    composer.fill("time year people")
    composer.press("Enter")
    wait_for_growth(page, 50)
    wait_for_growth(page, len(source(page)))

    # A reload and a second tab in mid-answer go on where the answer is.
    page.reload()
    wait_for_growth(page, 100)
    second = context.new_page()
    second.goto(page.url)
    wait_for_growth(second, len(source(page)))
    wait_for_growth(page, len(source(second)))

    # Stop from the second tab ends it in both.
    second.get_by_label("Stop", exact=True).click()
    for tab in (page, second):
        expect(tab.locator(ANSWER).last).to_have_attribute("data-status", "cancelled")
    (stored,) = live.rows("SELECT content, status FROM models_app_generation WHERE model_key = 'test/slow'")
    assert stored[1] == "cancelled"
    assert len(stored[0]) > 100
    assert source(page) == source(second) == stored[0]
    assert shown(page) == shown(second)

    # Whoever comes later reads the same.
    page.reload()
    expect(page.locator(ANSWER).last).to_have_attribute("data-status", "cancelled")
    assert source(page) == stored[0]
    assert shown(page) == shown(second)
