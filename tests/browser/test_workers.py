"""The Workers page in a real browser, on a real worker: cordoned and drained with the mouse, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.live import Live


def confirm(page: Page, button: str, action: str) -> None:
    page.get_by_role("button", name=button).click()
    page.get_by_role("dialog").get_by_role("button", name=action).click()


def test_cordon_drain_and_back(page: Page, live: Live) -> None:
    live.manage("load", "lmweb/starter", "--identifier", "to-be-drained", check=False)  # on a second try it is there already
    page.goto(f"{live.base_url}/workers/")
    card = page.locator("[data-node='test-node']")
    expect(card.get_by_text("to-be-drained", exact=True)).to_be_visible()
    card.locator("details.log summary").click()
    try:
        confirm(page, "Cordon test-node", "Cordon")
        expect(card.get_by_text("loads nothing new")).to_be_visible()
        confirm(page, "Drain test-node", "Drain")
        expect(card.get_by_text("Nothing is left on it")).to_be_visible(timeout=60_000)
        expect(card.get_by_text("No model in memory")).to_be_visible()
        expect(card.locator("details.log pre")).to_contain_text("draining")  # still open, and current
        page.get_by_role("button", name="Uncordon test-node").click()
        expect(card.get_by_text("Active", exact=True)).to_be_visible()
    finally:
        live.manage("node", "uncordon", "test-node")
    page.reload()
    expect(card.get_by_text("Active", exact=True)).to_be_visible()


def test_a_token_by_keyboard(page: Page, live: Live) -> None:
    page.goto(f"{live.base_url}/workers/")
    page.get_by_role("button", name="Add a worker").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Name", exact=True)).to_be_focused()
    page.keyboard.type("rack 2")
    page.keyboard.press("Enter")
    expect(page.locator("#new-secret")).to_contain_text("LMWEB_NODE_TOKEN=lmweb-node-")
    expect(page.locator("#new-secret")).to_be_focused()
    page.goto(f"{live.base_url}/workers/runtimes")
    expect(page.get_by_role("heading", name="llama.cpp")).to_be_visible()
