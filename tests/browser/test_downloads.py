"""Discover and Activity in real browsers: from a search to a model, live for everybody, with requests and decisions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import sign_in
from tests.hub.server import Hub, Repo
from tests.micro_models import make_micro

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route

    from tests.live import Live

README = b"---\nlicense: apache-2.0\n---\n# About it\n\n<img src=x onerror=alert(1)>**Small** [link](javascript:alert(1))\n\n![pixel](https://evil.example/p.png)\n"


@pytest.fixture
def published(hub: Hub, live: Live, tmp_path: Path) -> Iterator[Hub]:
    """Publish two models of 3 MB, and remove afterwards what the tests made of them: the installation is shared."""
    micro = make_micro(tmp_path / "x.gguf", name="Shown").read_bytes()
    for name in ("Shown", "Other"):
        content = micro + name.encode() * 400_000
        files = {f"{name}-F32.gguf": content, f"{name}-Q8_0.gguf": content + b"8", "README.md": README}
        hub.add(Repo(f"page-hub/{name}-GGUF", files, gguf={"total": 260_000, "architecture": "qwen2", "context_length": 2048}))
    yield hub
    hub.bytes_per_second = 0
    live.python(
        "from models_app import downloads, services\nfrom models_app.models import Download, InstalledModel\n"
        "for row in Download.objects.filter(repo__startswith='page-hub/'):\n    downloads.forget_parts(row.pk)\n    row.delete()\n"
        "for model in InstalledModel.objects.filter(publisher='page-hub'):\n    services.delete_model(principal=None, model=model)"
    )


@pytest.fixture
def other(chromium: Browser) -> Iterator[BrowserContext]:
    """Return a second browser, of a phone's width."""
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    context.set_default_timeout(20_000)
    yield context
    context.close()


def choose(page: Page, live: Live, query: str, model: str) -> None:
    page.goto(f"{live.base_url}/discover/")
    page.get_by_label("Search models").fill(query)
    page.locator(f"a[data-model='{model}']").click()
    expect(page.locator(".model-title")).to_have_text(model.split("/")[1])


def download_other(page: Page, live: Live) -> Locator:
    """Begin the download of the second model; returns its card in Activity."""
    page.goto(f"{live.base_url}/discover/?q=https://huggingface.co/page-hub/Other-GGUF")
    page.get_by_role("button", name="Download F32").click()
    page.goto(f"{live.base_url}/activity/")
    return page.locator(".job", has_text="page-hub/Other-GGUF")


def test_search_choose_download_in_two_browsers(page: Page, live: Live, published: Hub, other: BrowserContext) -> None:
    live.create_user("downloads-mate")
    mate = sign_in(other, live, "downloads-mate")
    mate.goto(f"{live.base_url}/activity/")
    choose(page, live, "page-hub shown", "page-hub/Shown-GGUF")
    expect(page.locator("[data-variant='F32'] .fit")).to_have_text("Fits")
    expect(page.get_by_text("Licence: apache-2.0")).to_be_visible()
    expect(page.locator(".readme .md strong")).to_have_text("Small")
    expect(page.get_by_role("heading", name="About it")).to_have_attribute("aria-level", "4")
    assert page.locator(".readme img, .readme a[href^='javascript']").count() == 0
    published.bytes_per_second = 60_000
    page.locator("[data-variant='F32']").get_by_role("button", name="Download F32").click()
    expect(page.locator("[data-variant='F32'] .act")).to_contain_text("ing")
    expect(page.locator("#activity-badge")).to_have_text("1")

    page.goto(f"{live.base_url}/activity/")
    for tab in (page, mate):  # both see it move
        job = tab.locator(".job", has_text="page-hub/Shown-GGUF")
        expect(job).to_have_attribute("data-status", "downloading")
        expect(job).to_contain_text("For admin")
        expect(job).to_contain_text("kB/s")
        before = float(job.locator("progress").get_attribute("value") or 0)
        tab.wait_for_function("before => document.querySelector('.job progress')?.value > before", arg=before)
    assert mate.locator(".job button").count() == 0  # it is not theirs
    assert mate.evaluate("document.documentElement.scrollWidth") <= 390

    job = page.locator(".job", has_text="page-hub/Shown-GGUF")
    job.get_by_role("button", name="Pause").click()
    expect(job).to_have_attribute("data-status", "paused")
    expect(mate.locator(".job", has_text="page-hub/Shown-GGUF")).to_have_attribute("data-status", "paused")
    job.get_by_role("button", name="Resume").click()
    expect(job).to_have_attribute("data-status", "downloading")
    published.bytes_per_second = 0
    for tab in (page, mate):
        job = tab.locator(".job", has_text="page-hub/Shown-GGUF")
        expect(job).to_have_attribute("data-status", "completed")
        expect(job.get_by_role("link", name="page-hub/shown", exact=True)).to_be_visible()
    choose(page, live, "page-hub shown", "page-hub/Shown-GGUF")
    expect(page.locator("[data-variant='F32'] .act")).to_have_text("Downloaded")


def test_what_a_button_brings_is_shown_though_the_list_moves(page: Page, live: Live, published: Hub) -> None:
    """The list is fetched again every second while something moves; a button that is gone by then could not say what came of it."""
    published.bytes_per_second = 100_000
    job = download_other(page, live)
    expect(job).to_contain_text("kB/s")

    def refuse_late(route: Route) -> None:
        time.sleep(2.5)
        route.fulfill(status=409, headers={"HX-Retarget": "#model-alerts", "HX-Reswap": "innerHTML"}, body="Not now.")

    page.route("**/pause", refuse_late)
    job.get_by_role("button", name="Pause").click()
    expect(page.locator("#model-alerts")).to_have_text("Not now.")
    page.unroute("**/pause")
    job.get_by_role("button", name="Pause").click()
    expect(job).to_have_attribute("data-status", "paused")


def test_cancel(page: Page, live: Live, published: Hub) -> None:
    published.bytes_per_second = 200_000
    job = download_other(page, live)
    expect(job).to_have_attribute("data-status", "downloading")
    job.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the download").click()
    expect(job).to_have_attribute("data-status", "cancelled")
    assert not list((live.data_dir / "models").glob(".downloads/*/*"))
    assert not (live.data_dir / "models" / "page-hub").exists()


def test_request_decline_approve(page: Page, live: Live, published: Hub, other: BrowserContext) -> None:
    live.create_user("downloads-asks")
    mate = sign_in(other, live, "downloads-asks")
    mate.goto(f"{live.base_url}/discover/?model=page-hub/Other-GGUF")
    mate.get_by_role("button", name="Request F32").click()
    expect(mate.locator("[data-variant='F32'] .act")).to_have_text("Requested")
    mate.goto(f"{live.base_url}/activity/")
    expect(page.locator("#activity-badge")).to_have_text("1")
    page.goto(f"{live.base_url}/activity/")
    job = page.locator(".job[data-status='requested']", has_text="page-hub/Other-GGUF")
    job.get_by_role("button", name="Decline").click()
    page.get_by_label("Why").fill("We have something like it")
    page.get_by_role("button", name="Decline", exact=True).click()
    expect(mate.locator(".job[data-status='declined']")).to_contain_text("We have something like it")

    mate.goto(f"{live.base_url}/discover/?model=page-hub/Other-GGUF")
    mate.get_by_role("button", name="Request Q8_0").click()
    mate.goto(f"{live.base_url}/activity/")
    job = page.locator(".job[data-status='requested']", has_text="Q8_0")
    job.get_by_role("button", name="Approve").focus()
    page.keyboard.press("Enter")
    for tab in (page, mate):
        expect(tab.locator(".job[data-status='completed']", has_text="page-hub/Other-GGUF")).to_contain_text("Approved by admin")


def test_a_hub_that_is_away(page: Page, live: Live, published: Hub) -> None:
    published.down = True
    page.goto(f"{live.base_url}/discover/?q=while-it-is-away")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("alert")).to_contain_text("imported without the Hub")
    published.down = False
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("Nothing found")).to_be_visible()


def test_keyboard_alone(page: Page, live: Live, published: Hub) -> None:
    page.goto(f"{live.base_url}/discover/")
    page.get_by_label("Search models").focus()
    page.keyboard.type("page-hub other")
    expect(page.locator("a[data-model='page-hub/Other-GGUF']")).to_be_visible()
    page.locator("a[data-model='page-hub/Other-GGUF']").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".model-title")).to_have_text("Other-GGUF")
    assert page.evaluate("document.activeElement.id") == "discover-model"
    assert "model=page-hub%2FOther-GGUF" in page.url
    page.go_back()
    page.wait_for_function("() => !document.querySelector('[aria-current=true]')")
