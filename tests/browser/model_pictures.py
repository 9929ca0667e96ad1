"""Takes a picture of every page about models, with 0, 1 and 300 of them, wide and narrow, light and dark.

    python -m tests.browser.model_pictures FOLDER

``index.html`` in the folder shows them side by side. What they show is compared with the eyes; this is no test.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import ARGUMENTS, CHROMIUM, PASSWORD, sign_in
from tests.browser.screenshots import THEMES, Camera, context_for, index
from tests.hub.server import Hub, Repo
from tests.live import Live
from tests.micro_models import STARTER_GGUF, make_micro

WIDTHS = (1280, 390)
REPO = "acme/Tiny-GGUF"
README = """---
license: apache-2.0
---
# Acme Tiny

A **small** model, made to be looked at.

| Benchmark | Score |
|---|---:|
| Short answers | 71.2 |

```python
print("hello")
```
"""


def publish(hub: Hub, folder: Path) -> None:
    """Fill the hub with a model that fits, one that does not, one with terms, one for MLX, and many others."""
    micro = make_micro(folder / "m.gguf", name="Acme Tiny").read_bytes()
    small = make_micro(folder / "q8.gguf", quantization="q8_0", name="Acme Tiny").read_bytes()
    files = {"Tiny-F32.gguf": micro, "Tiny-Q8_0.gguf": small, "mmproj-Tiny-f16.gguf": b"x" * 3000, "README.md": README.encode()}
    facts = {"total": 260_000, "architecture": "qwen2", "context_length": 2048}
    hub.add(Repo(REPO, files, likes=120, downloads=34_567, trending=9, gguf=facts))
    large = {f"Large-70B-Instruct-{label}.gguf": b"x" * 2000 for label in ("Q2_K", "Q4_K_M", "Q8_0", "F16")}
    facts = {"total": 70_000_000_000, "architecture": "llama", "context_length": 131_072}
    repo = hub.add(
        Repo("a-publisher-with-a-long-name/Large-Model-With-A-Rather-Long-Name-70B-Instruct-GGUF", large, downloads=2_345_678, gguf=facts)
    )
    repo.lies = dict(zip(large, (26_000_000_000, 42_000_000_000, 75_000_000_000, 141_000_000_000), strict=True))
    hub.add(Repo("acme/Gated-GGUF", {"Gated-Q8_0.gguf": small, "README.md": b"# Gated"}, gated="auto", likes=7, license="llama3"))
    mlx = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "tokenizer.json": b"{}", "README.md": b"# MLX"}
    hub.add(Repo("mlx-community/Tiny-4bit", mlx, tags=["mlx", "safetensors"], likes=2))
    for number in range(50):
        hub.add(Repo(f"someone/Model-{number}-GGUF", {"Model-Q4_K_M.gguf": STARTER_GGUF.read_bytes()[:2000]}, likes=number))


def no_models(camera: Camera, page: Page) -> None:
    """Pages of an installation without models and downloads."""
    camera.take(page, "models-0", "/models/")
    camera.take(page, "activity-0", "/activity/")
    camera.take(page, "discover", "/discover/", _settled)


def discover(camera: Camera, page: Page, hub: Hub) -> None:
    """What Discover shows."""
    camera.take(page, "discover-search", "/discover/?q=model", _settled)
    camera.take(page, "discover-nothing", "/discover/?q=nosuchmodelanywhere", _settled)
    camera.take(page, "discover-model", f"/discover/?model={REPO}", _settled)
    large = "a-publisher-with-a-long-name/Large-Model-With-A-Rather-Long-Name-70B-Instruct-GGUF"
    camera.take(page, "discover-large", f"/discover/?model={large}", _settled)
    camera.take(page, "discover-gated", "/discover/?model=acme/Gated-GGUF", _settled)
    camera.take(page, "discover-mlx", "/discover/?model=mlx-community/Tiny-4bit&format=mlx", _settled)
    camera.take(page, "discover-unknown", "/discover/?model=acme/no-such-model", _settled)
    camera.take(page, "staff-picks", "/discover/", lambda p: p.get_by_role("button", name="Staff picks").click())
    hub.down = True
    camera.take(page, "discover-offline", "/discover/?q=offline-now", _settled)
    hub.down = False


def one_model(camera: Camera, page: Page, model_id: int) -> None:
    """The list, the dialogs and the page of one model."""
    camera.take(page, "models-1", "/models/")
    camera.take(page, "import", "/models/", lambda p: p.locator("#import-open").click())

    def options(page: Page) -> None:
        page.locator(f"#options-{model_id}").click()
        page.locator("#load-estimate .memory-bar").wait_for()

    camera.take(page, "load-dialog", "/models/", options)

    def more(page: Page) -> None:
        options(page)
        page.locator("#load-dialog details summary").first.click()
        page.locator("#load-estimate").scroll_into_view_if_needed()

    camera.take(page, "load-dialog-more", "/models/", more)
    camera.take(page, "model", f"/models/{model_id}/")
    for part in ("loads", "answers", "template"):
        camera.take(page, f"model-{part}", f"/models/{model_id}/", lambda p, part=part: p.locator(f"#{part}").scroll_into_view_if_needed())  # type: ignore[misc]
    camera.take(page, "model-preview", f"/models/{model_id}/", _preview)
    camera.take(page, "model-delete", "/models/", lambda p: p.locator(f"#delete-{model_id}").click())


def many(camera: Camera, page: Page) -> None:
    """Hundreds of models, and all states of models in memory and of downloads."""
    camera.take(page, "models-300", "/models/?sort=loaded")
    camera.take(page, "models-300-failed", "/models/?sort=loaded", lambda p: p.locator("tr.failure").scroll_into_view_if_needed())
    camera.take(page, "models-300-end", "/models/", lambda p: p.locator("#more").scroll_into_view_if_needed())
    camera.take(page, "models-nothing-found", "/models/?q=nothing-like-this")
    camera.take(page, "activity", "/activity/")
    camera.take(page, "activity-record", "/activity/", lambda p: p.locator("#record-title").scroll_into_view_if_needed())
    camera.take(page, "activity-decline", "/activity/", lambda p: p.get_by_role("button", name="Decline…").first.click())


def as_member(camera: Camera, page: Page) -> None:
    """What somebody sees who may ask but not download."""
    camera.take(page, "member-discover-model", f"/discover/?model={REPO}", _settled)
    camera.take(page, "member-activity", "/activity/")
    camera.take(page, "member-models", "/models/?sort=loaded")


def _settled(page: Page) -> None:
    page.wait_for_function("() => !document.querySelector('.skeleton')", timeout=15_000)


def _preview(page: Page) -> None:
    page.locator("#template").get_by_role("button", name="Preview").click()
    page.locator("pre.preview").first.scroll_into_view_if_needed()


def main(folder: Path) -> None:
    """Take all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp(prefix="lmweb-pictures-")) / "data"
    hub = Hub()
    publish(hub, data_dir.parent)
    live = Live(data_dir, environment={"HF_ENDPOINT": hub.url}).start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            _all(browser, live, hub, folder)
            browser.close()
    finally:
        live.stop()
        hub.close()
        shutil.rmtree(data_dir.parent, ignore_errors=True)
    index(folder)


def _all(browser: Browser, live: Live, hub: Hub, folder: Path) -> None:
    live.create_admin("ada", PASSWORD)
    live.create_user("ben", PASSWORD)
    views = [
        (camera, sign_in(camera.context, live, "ada"), sign_in(context_for(browser, width, theme), live, "ben"))
        for width in WIDTHS
        for theme in THEMES
        for camera in [Camera(live, folder, context_for(browser, width, theme), f"{width}-{theme}")]
    ]
    scenes = "from tests.browser import model_scenes as scenes\n"
    model_id = live.python("from models_app.models import InstalledModel\nresult = InstalledModel.objects.get().pk")
    for camera, page, _ in views:
        one_model(camera, page, model_id)
        discover(camera, page, hub)
    live.python(f"{scenes}scenes.many_models(299)\nscenes.in_memory()\nscenes.downloads('ben', 'ada')")
    for camera, page, member in views:
        many(camera, page)
        as_member(camera, member)
    live.python(f"{scenes}scenes.clear()")
    for camera, page, _ in views:
        no_models(camera, page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
