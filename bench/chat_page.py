"""Measures what a chat page costs whoever opens it: the time until the composer takes text, and the bytes that travel.

    .venv/bin/python bench/chat_page.py [--loads 20] [--write]

Chromium over loopback, each load with an empty cache. Needs Chromium. Run it on an idle machine. ``--write`` replaces the section
"Chat page" of bench/RESULTS.md. Where others keep the machine busy, ``nice -n -15`` comes near to an idle one.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from bench.startup import write  # noqa: E402
from tests.browser.conftest import ARGUMENTS, CHROMIUM, sign_in  # noqa: E402
from tests.live import Live  # noqa: E402

HEADING = "## Chat page"
WARM_UP = 2

#: The composer focuses itself as the last step of its set-up: from then on typing, Enter and the buttons work.
WATCH = "addEventListener('focusin', event => { if (event.target.id === 'composer-text') window.usable ??= performance.now(); });"
FACTS = """() => ({
    usable: window.usable,
    document: performance.getEntriesByType('navigation')[0].encodedBodySize,
    files: performance.getEntriesByType('resource').map(r => [new URL(r.name).pathname, r.encodedBodySize]),
})"""

CHATS = """
from chat.models import Chat, Message
from lmweb.models import User
user = User.objects.get(username="admin")
Chat.objects.bulk_create(Chat(user=user, title=f"A chat about subject number {n}") for n in range(100))
chat, parent = Chat.objects.create(user=user, title="A long chat"), None
for n in range(50):
    role = "assistant" if n % 2 else "user"
    parent = Message.objects.create(chat=chat, parent=parent, role=role, content="A **sentence** of an answer, `code` too.\\n\\n" * (n % 2 * 11 + 1))
result = f"/chat/{chat.pk}"
"""


def load(browser: Browser, live: Live, cookies: Any, path: str) -> dict[str, Any]:
    """Open a page in a profile of its own and return what it cost."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_cookies(cookies)
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(f"{live.base_url}{path}")
    page.wait_for_function("() => window.usable")
    facts: dict[str, Any] = page.evaluate(FACTS)
    context.close()
    return facts


def measure(live: Live, loads: int) -> list[str]:
    """Load both pages again and again and return the lines of the section."""
    live.create_admin()
    long_chat = live.python(CHATS)
    lines = [
        (
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Chromium, {time.strftime('%Y-%m-%d')}, load average"
            f" {os.getloadavg()[0]:.1f} before, niceness {os.nice(0)}. {loads} loads each."
        ),
        "",
        "| Page, empty cache | Composer usable: median; slowest | HTML | Files, compressed |",
        "|---|---|---|---|",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context()
        sign_in(context, live, "admin")
        cookies = context.cookies()
        context.close()
        for name, path in (("new chat, 60 chats listed", "/"), ("chat of 50 messages", long_chat)):
            found = [load(browser, live, cookies, path) for _ in range(WARM_UP + loads)][WARM_UP:]
            times = [facts["usable"] for facts in found]
            files = found[-1]["files"]
            lines.append(
                f"| {name} | {statistics.median(times):.0f} ms; {max(times):.0f} ms | {found[-1]['document'] / 1000:.1f} kB"
                f" | {sum(size for _, size in files) / 1000:.1f} kB in {len(files)} |"
            )
        browser.close()
    return lines


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=20, help="loads of each page")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmweb-bench-") as folder:
        live = Live(Path(folder) / "data").start()
        try:
            lines = measure(live, arguments.loads)
        finally:
            live.stop()
    print("\n".join(lines))
    if arguments.write:
        write(lines, HEADING, "bench/chat_page.py")


if __name__ == "__main__":
    main()
