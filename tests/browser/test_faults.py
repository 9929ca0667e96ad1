"""``kill -9`` in the middle of a streaming answer: the open page catches up by itself and shows what the database has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import ready, sign_in
from tests.live import Live
from tests.micro_models import make_micro

MODEL = "browser/faults"


@pytest.fixture(scope="module")
def slow_model(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Import a model that writes for many seconds, and remove it afterwards."""
    file = make_micro(tmp_path_factory.mktemp("faults") / "slow.gguf", layers=64, context=4096, name="browser faults", seed=8)
    live.create_admin()
    live.manage("import_model", str(file), "--copy", "--user-repo", MODEL)
    yield MODEL
    live.manage("unload", MODEL, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("service", ["web", "valkey", "postgres", "gpu-worker"])
def test_the_page_catches_up_without_reloading(page: Page, fault_live: Live, slow_model: str, service: str) -> None:
    live = fault_live
    page.goto(live.base_url)
    ready(page)
    page.locator(".bar [data-toggle-panel]").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("300")
    page.keyboard.press("Control+l")
    page.locator(f".picker-row[data-key='{slow_model}']").click()
    box = page.get_by_label("Message", exact=True)
    box.fill("time year people")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('article.assistant')?.source.length > 100")
    live.kill(service)
    answer = page.locator("article.assistant")
    expect(answer).to_have_attribute("data-status", "completed", timeout=90_000)
    stored = live.rows("SELECT content FROM models_app_generation WHERE model_key = %s ORDER BY created_at DESC LIMIT 1", slow_model)
    assert answer.evaluate("node => node.source") == stored[0][0]
    expect(page.locator("#offline")).to_be_hidden()


def test_signing_out_ends_the_other_tab(page: Page, live: Live) -> None:
    other = page.context.new_page()
    other.goto(live.base_url)
    ready(other)
    page.locator("[popovertarget=person-menu]").click()
    page.get_by_role("menuitem", name="Sign out").click()
    for tab in (page, other):
        expect(tab.get_by_role("button", name="Sign in")).to_be_visible()
    again = sign_in(page.context, live, "admin")
    expect(again.get_by_label("Message", exact=True)).to_be_visible()
