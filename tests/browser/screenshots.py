"""Take a picture of every page and state: ``python -m tests.browser.screenshots FOLDER`` (1920, 1280, 768 and 390 pixels, light and dark).

Starts an installation of its own, fills it with scenes, and writes ``<scene>-<width>-<theme>.png`` and ``index.html``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM, PASSWORD, sign_in
from tests.live import Live

SIZES = {1280: 800, 1920: 1080, 768: 1024, 390: 844}
THEMES = ("light", "dark")


class Camera:
    """Takes pictures of one context."""

    def __init__(self, live: Live, folder: Path, context: BrowserContext, suffix: str) -> None:
        self.live, self.folder, self.context, self.suffix = live, folder, context, suffix

    def take(self, page: Page, name: str, path: str | None = None, act: Callable[[Page], object] | None = None) -> None:
        """Go to a path, do something there, and take a picture once it has settled."""
        if path is not None:
            page.goto(f"{self.live.base_url}{path}")
        page.wait_for_timeout(350)
        if act:
            act(page)
            page.wait_for_timeout(500)
        page.screenshot(path=self.folder / f"{name}-{self.suffix}.png")

    @property
    def has_drawers(self) -> bool:
        """Whether the window is so narrow that the side columns are drawers."""
        return int(self.suffix.partition("-")[0]) <= 900


def before_setup(camera: Camera) -> None:
    """Pages of an installation without an admin."""
    page = camera.context.new_page()
    camera.take(page, "no-admin", "/")
    setup_url = camera.live.setup_url or ""
    camera.take(page, "set-up", setup_url.removeprefix(camera.live.base_url))


def signed_out(camera: Camera) -> None:
    """Sign-in and its error."""
    page = camera.context.new_page()
    camera.take(page, "sign-in", "/sign-in")

    def fail(page: Page) -> None:
        page.get_by_label("Username").fill("ada")
        page.get_by_label("Password", exact=True).fill("wrong")
        page.get_by_role("button", name="Sign in").click()

    camera.take(page, "sign-in-wrong", "/sign-in", fail)


def signed_in(camera: Camera, scenes: dict[str, str]) -> None:
    """Every page of a person, and every state of the chat."""
    page = sign_in(camera.context, camera.live, "ada")
    camera.take(page, "chat-new", "/")
    for scene, chat_id in scenes.items():
        camera.take(page, f"chat-{scene}", f"/chat/{chat_id}")
    answer = f"/chat/{scenes['answer']}"
    camera.take(page, "chat-answer-top", answer, lambda p: p.evaluate("document.getElementById('scroller').scrollTop = 0"))
    camera.take(page, "chat-thought", answer, lambda p: p.locator(".reasoning summary").click())
    camera.take(page, "chat-picker", answer, lambda p: p.keyboard.press("Control+l"))
    camera.take(page, "chat-panel", answer, lambda p: p.locator(".bar [data-toggle-panel]").click())
    if not camera.has_drawers:
        page.locator(".bar [data-toggle-panel]").click()
    if camera.has_drawers:
        camera.take(page, "chat-drawer", answer, lambda p: p.locator(".bar [data-toggle-sidebar]").click())
    camera.take(page, "person-menu", "/", lambda p: p.locator("[popovertarget=person-menu]").click())
    camera.take(page, "my-models", "/models/")
    camera.take(page, "developer", "/developer/")
    camera.take(page, "password", "/password")
    camera.take(page, "not-found", "/nowhere")

    page.route_web_socket("**/ws/chat", lambda socket: socket.close())
    camera.take(page, "chat-offline", answer, lambda p: p.wait_for_timeout(2500))


def context_for(browser: Browser, width: int, theme: str) -> BrowserContext:
    """Return a browser profile of this size and theme."""
    size: ViewportSize = {"width": width, "height": SIZES[width]}
    return browser.new_context(viewport=size, color_scheme="dark" if theme == "dark" else "light", has_touch=width < 600)


def index(folder: Path) -> None:
    """Write a page that shows all pictures side by side."""
    names = sorted({picture.name.rsplit("-", 2)[0] for picture in folder.glob("*.png")})
    rows = "".join(
        f"<h2>{name}</h2>" + "".join(f'<img src="{picture.name}" height="420"> ' for picture in sorted(folder.glob(f"{name}-[0-9]*.png")))
        for name in names
    )
    (folder / "index.html").write_text(f"<!doctype html><title>lmweb</title>{rows}")


def main(folder: Path) -> None:
    """Take all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix="lmweb-pictures-")) / "data"
    live = Live(data_dir).start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            combinations = [(width, theme) for width in SIZES for theme in THEMES]
            for width, theme in combinations:
                before_setup(Camera(live, folder, context_for(browser, width, theme), f"{width}-{theme}"))
            live.create_admin("ada", PASSWORD)
            scenes = live.python("from tests.browser import scenes\nresult = scenes.build('ada')")
            live.manage("load", "lmweb/starter")
            for width, theme in combinations:
                camera = Camera(live, folder, context_for(browser, width, theme), f"{width}-{theme}")
                signed_out(camera)
                signed_in(camera, scenes)
                camera.context.close()
            live.python("from models_app.models import InstalledModel\nInstalledModel.objects.all().delete()")
            for width, theme in combinations:
                camera = Camera(live, folder, context_for(browser, width, theme), f"{width}-{theme}")
                camera.take(sign_in(camera.context, live, "ada"), "chat-no-model", "/")
            browser.close()
    finally:
        live.stop()
        shutil.rmtree(data_dir.parent, ignore_errors=True)
    index(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
