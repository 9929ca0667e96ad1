"""How a long conversation comes onto the page: newest messages first, the others above them, older ones in pages."""

from __future__ import annotations

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import ready
from tests.browser.test_chat_page import ANSWER, choose
from tests.live import Live


def test_long_histories_and_lists_come_in_pages(page: Page, live: Live) -> None:
    chat_id = live.python(
        "from chat.models import Chat, Message\nfrom lmweb.models import User\nuser = User.objects.get(username='admin')\n"
        "Chat.objects.bulk_create(Chat(user=user, title=f'Chat {n}') for n in range(150))\n"
        "chat = Chat.objects.create(user=user, title='Long')\nparent = None\n"
        "for n in range(120):\n"
        "    role = 'assistant' if n % 2 else 'user'\n"
        "    parent = Message.objects.create(chat=chat, parent=parent, role=role, content=f'Message {n}')\n"
        "result = str(chat.pk)"
    )
    page.goto(f"{live.base_url}/chat/{chat_id}")
    expect(page.get_by_text("Message 119", exact=True)).to_be_in_viewport()
    expect(page.locator("article")).to_have_count(50)
    page.locator("#scroller").evaluate("node => { node.scrollTop = 0; }")
    expect(page.locator("article")).to_have_count(100)
    expect(page.locator("#jump")).to_be_visible()
    page.locator("#scroller").evaluate("node => { node.scrollTop = 0; }")
    expect(page.locator("article")).to_have_count(120)
    texts = page.locator("article .bubble").all_inner_texts()
    assert texts == [f"Message {n}" for n in range(0, 120, 2)]
    page.locator("#jump").click()
    expect(page.get_by_text("Message 119", exact=True)).to_be_in_viewport()

    expect(page.locator(".chat-item")).to_have_count(60)
    page.locator(".chat-more").scroll_into_view_if_needed()
    expect(page.locator(".chat-item")).to_have_count(120)

    # A refresh keeps what was scrolled to where it is, and so does the next page.
    place = "node => node.querySelectorAll('.chat-item')[100].getBoundingClientRect().top"
    chats = page.locator("#chats")
    chats.evaluate("node => { node.scrollTop = node.querySelectorAll('.chat-item')[100].offsetTop - 300; }")
    name, before = page.locator(".chat-item").nth(100).inner_text(), chats.evaluate(place)
    live.python(
        "from chat import services\nfrom chat.models import Chat\nfrom lmweb.access import Principal\nfrom lmweb.models import User\n"
        "user = User.objects.get(username='admin')\nchat = Chat.objects.create(user=user, title='Old')\n"
        "services.rename_chat(principal=Principal(user), chat_id=chat.pk, title='Brand new')"
    )
    expect(page.locator(".chat-item").first).to_have_text("Brand new")
    expect(page.locator(".chat-item").nth(101)).to_have_text(name)
    assert abs(chats.evaluate(place.replace("100", "101")) - before) < 2
    page.reload()
    expect(page.locator(".chat-item").nth(101)).to_be_in_viewport()


HOLD = "window.held = []; const later = window.setTimeout; window.setTimeout = (f, ms, ...a) => (ms === 16 ? held.push(f) : later(f, ms, ...a));"


def make_long_chat(live: Live, messages: int) -> str:
    """Make a chat of questions and answers and return its path."""
    path: str = live.python(
        "from chat.models import Chat, Message\nfrom lmweb.models import User\n"
        "chat = Chat.objects.create(user=User.objects.get(username='admin'), title='Long', model_key='lmweb/starter')\nparent = None\n"
        f"for n in range({messages}):\n"
        "    role, content = ('assistant', f'Answer **{n}**.\\n\\n' + 'Line.\\n\\n' * 6) if n % 2 else ('user', f'Question {n}')\n"
        "    parent = Message.objects.create(chat=chat, parent=parent, role=role, content=content)\n"
        "result = f'/chat/{chat.pk}'"
    )
    return live.base_url + path


def test_the_newest_messages_come_first_and_the_others_without_a_jump(page: Page, live: Live) -> None:
    path = make_long_chat(live, 60)
    page.add_init_script(HOLD)
    page.goto(path)
    ready(page)
    articles, top = page.locator("article"), "node => node.getBoundingClientRect().top"
    first = articles.count()
    assert 2 <= first < 20, "the composer waited for messages that nobody sees"
    expect(page.get_by_text("Answer 59.", exact=True)).to_be_in_viewport()
    assert page.evaluate("() => scroller.scrollHeight > scroller.clientHeight"), "the window is not full"
    place = articles.last.evaluate(top)
    page.evaluate("() => held.shift()()")
    assert articles.count() > first
    assert abs(articles.last.evaluate(top) - place) < 1

    # Somebody who reads further up meanwhile is not moved either, and older pages wait for their turn.
    page.locator("#scroller").evaluate("node => { node.scrollTop = 20; }")
    expect(page.locator("#jump")).to_be_visible()
    read, count = articles.first.element_handle(), articles.count()
    place = read.evaluate(top)
    page.evaluate("() => held.shift()()")
    assert articles.count() > count
    assert abs(read.evaluate(top) - place) < 1
    assert page.locator(".older").count() == 0

    page.evaluate("() => { while (held.length) held.shift()(); }")
    texts = articles.evaluate_all("nodes => nodes.map(node => node.source.split('\\n')[0])")
    assert len(texts) >= 50
    assert texts == [f"Answer **{n}**." if n % 2 else f"Question {n}" for n in range(60 - len(texts), 60)]
    assert abs(read.evaluate(top) - place) < 1
    page.locator("#scroller").evaluate("node => { node.scrollTop = 0; }")
    expect(articles).to_have_count(60)


def test_a_message_whose_place_is_not_rendered_yet_finds_it(context: BrowserContext, page: Page, live: Live) -> None:
    path = make_long_chat(live, 40)
    page.add_init_script(HOLD)
    page.goto(path)
    ready(page)
    assert page.get_by_text("Question 0", exact=True).count() == 0
    other = context.new_page()
    other.goto(path)
    expect(other.locator("article")).to_have_count(40)
    other.get_by_label("Regenerate").first.click()
    expect(page.locator(".versions")).to_contain_text("2 / 2")
    assert page.locator("article").count() == 2
    page.evaluate("() => { while (held.length) held.shift()(); }")
    assert page.locator("article").evaluate_all("nodes => nodes.map(node => node.dataset.role)") == ["user", "assistant"]
    expect(page.locator(ANSWER)).to_have_attribute("data-status", "completed")


def test_an_answer_waits_for_what_shows_it(page: Page, live: Live) -> None:
    """A new chat can be used before the Markdown libraries are there."""
    page.wait_for_load_state("networkidle")  # what the page before it asked for
    page.route("**/vendor/marked*", lambda route: (page.wait_for_timeout(1000), route.continue_()))
    page.goto(live.base_url)
    ready(page)
    assert page.evaluate("() => window.marked === undefined")
    choose(page, "lmweb/starter")
    page.keyboard.type("What is lmweb?")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("What is lmweb?")
    expect(page.locator(ANSWER)).to_have_attribute("data-status", "completed")
    assert page.locator(f"{ANSWER} > .md > p").count() > 0
