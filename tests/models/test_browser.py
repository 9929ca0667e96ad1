"""The My Models page in a real browser against a whole installation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.live import PASSWORD, Live
from tests.micro_models import make_micro

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(live: Live) -> Iterator[Browser]:
    """Start a browser; the models that the tests made with it are gone afterwards, for the installation is shared."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
    live.python(
        "from models_app import services\nfrom models_app.models import InstalledModel\n"
        "for model in InstalledModel.objects.filter(publisher='page-test'):\n    services.delete_model(principal=None, model=model)"
    )


@pytest.fixture
def page(live: Live, browser: Browser) -> Iterator[Page]:
    live.create_admin()
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if "Content Security Policy" in message.text else None)
    page.goto(f"{live.base_url}/sign-in?next=/models/")
    page.fill("[name=username]", "admin")
    page.fill("[name=password]", PASSWORD)
    page.click("button.primary")
    page.wait_for_selector("#model-list")
    yield page
    page.context.close()
    assert not refused, refused


def row(page: Page, key: str) -> str:
    return f"#model-list tr:has(.mono:text-is('{key}'))"


def test_import_load_unload_delete(page: Page, live: Live, tmp_path: Path) -> None:
    file = make_micro(tmp_path / "Demo-F32.gguf", name="Demo")
    page.click("#import-open")
    page.set_input_files("#import-file", file)
    assert page.input_value("#import-publisher") == "local"
    assert page.input_value("#import-repo") == "Demo"
    page.fill("#import-publisher", "page-test")
    page.click("#import-start")
    page.wait_for_selector(row(page, "page-test/demo"))
    assert live.rows("SELECT path FROM models_app_installedmodel WHERE key = 'page-test/demo'") == [("page-test/Demo/Demo-F32.gguf",)]

    page.click("button[aria-label='Load Demo']")
    page.wait_for_selector(f"{row(page, 'page-test/demo')} .badge.good")
    page.click("button[aria-label='Unload page-test/demo']")
    page.wait_for_selector("button[aria-label='Load Demo']")

    page.click("button[aria-label='Load Demo with options']")
    page.fill("#id_context_length", "256")
    page.fill("#id_identifier", "small-demo")
    page.click("#load-dialog button.primary")
    page.wait_for_selector(f"{row(page, 'page-test/demo')} .badge.good")
    assert live.rows("SELECT status FROM models_app_modelinstance WHERE identifier = 'small-demo'") == [("ready",)]

    page.click("button[aria-label='Delete Demo']")
    page.click("dialog[open] .danger")
    page.wait_for_selector(row(page, "page-test/demo"), state="detached")
    assert not (live.data_dir / "models" / "page-test").exists()


def test_options_defaults_and_template(page: Page, live: Live, tmp_path: Path) -> None:
    """A load with every kind of option and the live estimate, then what holds for everybody on the model's own page."""
    file = make_micro(tmp_path / "Tuned.gguf", name="Tuned")
    live.manage("import_model", str(file), "--user-repo", "page-test/tuned")
    page.wait_for_selector(row(page, "page-test/tuned"), timeout=15_000)
    page.click("button[aria-label='Load Tuned with options']")
    page.wait_for_selector("#load-estimate .memory-bar")
    assert page.eval_on_selector("#load-estimate .needed", "bar => bar.getBoundingClientRect().width") > 0
    before = page.inner_text("#load-estimate strong")
    page.fill("#id_context_length", "256")
    page.wait_for_function("text => document.querySelector('#load-estimate strong')?.innerText !== text", arg=before)
    page.click("#load-dialog .more-options summary")
    page.select_option("#id_flash_attention", "on")
    page.fill("#id_parallel", "2")
    page.fill("#id_ttl_minutes", "7")
    page.check("#id_remember")
    page.click("#load-dialog button.primary")
    page.wait_for_selector(f"{row(page, 'page-test/tuned')} .badge.good")
    stored = "SELECT i.config->>'parallel', i.ttl_seconds, m.load_defaults FROM models_app_modelinstance i JOIN models_app_installedmodel m"
    found = live.rows(f"{stored} ON m.id = i.model_id WHERE i.identifier = 'page-test/tuned'")
    assert found[0][:2] == ("2", 420)
    assert found[0][2].items() >= {"context_length": 256, "flash_attention": True, "parallel": 2}.items()
    page.click("button[aria-label='Pin page-test/tuned']")
    page.wait_for_selector("button[aria-label='Pin page-test/tuned'][aria-pressed=true]")

    page.click("a.name:text-is('Tuned')")
    page.wait_for_selector(".facts")
    assert page.input_value("#id_parallel") == "2"
    page.click("#loads button[name=reset]")
    page.wait_for_selector("text=Loads from now on use it.")
    page.fill("#id_temperature", "0.3")
    page.fill("#id_system_prompt", "Be brief.")
    page.click("#answers button.primary")
    page.wait_for_selector("text=Requests from now on use it.")
    page.fill("#chat-template", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    page.click("#template button[name=preview]")
    page.wait_for_selector(".preview:has-text('<user>Hello!')")
    page.click("#template button.primary")
    page.wait_for_selector("text=An admin has replaced the template of the file.")
    defaults = live.rows("SELECT load_defaults, inference_defaults FROM models_app_installedmodel WHERE key = 'page-test/tuned'")
    assert defaults == [({}, {"sampling": {"temperature": 0.3}, "system_prompt": "Be brief."})]
    page.click("text=Verify the files")
    page.wait_for_selector("#verification .badge")


def test_paths_on_the_server_and_errors_of_buttons(page: Page, live: Live, tmp_path: Path) -> None:
    """What a button cannot do is said above the list; a folder that is named is linked."""
    folder = tmp_path / "page-test" / "Linked-GGUF"
    folder.mkdir(parents=True)
    make_micro(folder / "linked.gguf", name="Linked")
    page.click("#import-open")
    page.click("text=From the server's own disk")
    page.fill("#import-path", "/nowhere/at/all")
    page.press("#import-path", "Enter")
    page.wait_for_selector("#model-alerts [role=alert]:has-text('/nowhere/at/all cannot be read')")
    page.fill("#import-path", str(tmp_path))
    page.press("#import-path", "Enter")
    page.wait_for_selector(row(page, "page-test/linked"))
    assert page.inner_text("#model-alerts") == ""


def test_lost_connection_and_taken_name_lose_nothing(page: Page, live: Live, tmp_path: Path) -> None:
    file = make_micro(tmp_path / "Large-F32.gguf", name="Large")
    with file.open("r+b") as handle:
        handle.truncate(30_000_000)  # four pieces; bytes after the weights are allowed
    failures = [1, 1]

    def flaky(route: Route) -> None:
        if "offset=16777216" in route.request.url and failures:
            failures.pop()
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/models/uploads/**", flaky)
    page.click("#import-open")
    page.set_input_files("#import-file", file)
    page.fill("#import-publisher", "page-test")
    page.fill("#import-repo", "..")
    page.click("#import-start")
    page.wait_for_selector("#import-error:not([hidden])", timeout=90_000)
    assert not failures  # both losses were survived before the name was refused
    page.fill("#import-repo", "Large")
    page.click("#import-start")
    page.wait_for_selector(row(page, "page-test/large"))
    stored = live.data_dir / "models" / "page-test" / "Large" / "Large-F32.gguf"
    assert stored.read_bytes() == file.read_bytes()
    assert not list((live.data_dir / "models" / ".uploads").iterdir())


def test_what_is_no_model_is_refused_in_words(page: Page, live: Live, tmp_path: Path) -> None:
    evil = tmp_path / "evil.gguf"
    evil.write_bytes(b"GGUF" + bytes(2000))
    page.click("#import-open")
    page.set_input_files("#import-file", evil)
    page.click("#import-start")
    page.wait_for_selector("#import-error:not([hidden])")
    assert "not supported" in page.inner_text("#import-error-text")
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    page.set_input_files("#import-file", other)
    assert "Only model files in the GGUF format" in page.inner_text("#import-error-text")
    assert page.is_disabled("#import-start")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_page_fits_its_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.click("#import-open")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_other_tabs_see_changes_by_themselves(page: Page, live: Live, tmp_path: Path) -> None:
    file = make_micro(tmp_path / "Elsewhere.gguf", name="Elsewhere")
    live.manage("import_model", str(file), "--user-repo", "page-test/elsewhere")
    page.wait_for_selector(row(page, "page-test/elsewhere"), timeout=15_000)


def test_keyboard_alone(page: Page) -> None:
    page.focus("#import-open")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "import-file"
    page.focus("#import-close")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "import-open"
    page.focus("#model-filter input[type=search]")
    page.keyboard.type("no such model")
    page.wait_for_selector("text=Nothing found")
    page.focus("[data-clear-search]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model-list tbody tr")
