"""Take a picture of the Workers and Runtimes pages: ``python -m tests.browser.worker_pictures FOLDER`` (1280 and 390 pixels, light and dark).

Starts an installation of its own; beside its worker there are nodes on paper, in every state.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM, PASSWORD, sign_in
from tests.browser.screenshots import THEMES, Camera, context_for, index
from tests.live import Live

WIDTHS = (1280, 390)


def open_log(page: Page) -> None:
    page.locator("details.log summary").first.click()


def make_token(page: Page) -> None:
    page.get_by_role("button", name="Add a worker").click()
    page.get_by_label("Name", exact=True).fill("rack 2")
    page.get_by_role("button", name="Make token").click()
    page.locator("#new-secret").wait_for()


def confirm_drain(page: Page) -> None:
    page.get_by_role("button", name="Drain rack-2-a").click()


def whole(camera: Camera, page: Page, name: str) -> None:
    page.screenshot(path=camera.folder / f"{name}-{camera.suffix}.png", full_page=True)


def pictures(camera: Camera, page: Page) -> None:
    """Take every state of both pages."""
    camera.take(page, "workers", "/workers/")
    whole(camera, page, "workers-whole")
    camera.take(page, "workers-drain", "/workers/", confirm_drain)
    camera.take(page, "workers-log", "/workers/", open_log)
    camera.take(page, "workers-add", "/workers/", lambda p: p.get_by_role("button", name="Add a worker").click())
    page.goto(f"{camera.live.base_url}/workers/")
    make_token(page)
    page.locator("#join-tokens").scroll_into_view_if_needed()
    camera.take(page, "workers-token")
    camera.take(page, "runtimes", "/workers/runtimes")
    whole(camera, page, "runtimes-whole")


def main(folder: Path) -> None:
    """Take all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix="lmweb-pictures-")) / "data"
    live = Live(data_dir).start()
    try:
        live.create_admin("ada", PASSWORD)
        live.manage("load", "lmweb/starter")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            for width in WIDTHS:
                for theme in THEMES:
                    live.python(
                        "from models_app.models import Generation\nfrom workers.models import *\n"
                        "Generation.objects.all().delete()\nWorkerNode.objects.exclude(key_digest='').delete()\n"
                        "NodeToken.objects.all().delete()\nJoinRefusal.objects.all().delete()"
                    )
                    camera = Camera(live, folder, context_for(browser, width, theme), f"{width}-{theme}")
                    page = sign_in(camera.context, live, "ada")
                    camera.take(page, "workers-one", "/workers/")
                    live.python("from tests.browser import scenes\nscenes.nodes('ada')")
                    pictures(camera, page)
                    camera.context.close()
            browser.close()
    finally:
        live.stop()
        shutil.rmtree(data_dir.parent, ignore_errors=True)
    index(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
