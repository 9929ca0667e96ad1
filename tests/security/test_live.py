"""Attacks on a whole running installation: foreign websockets, and secrets in logs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import time
import urllib.parse
import uuid
from typing import TYPE_CHECKING

from tests.live import PASSWORD

if TYPE_CHECKING:
    from tests.live import Live


def address(live: Live) -> tuple[str, int]:
    host, port = live.base_url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def handshake(live: Live, origin: str | None, cookie: str = "") -> int:
    """Try to open the chat's websocket; return the status."""
    host, port = address(live)
    lines = [
        "GET /ws/chat HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(uuid.uuid4().bytes).decode()}",
    ]  # fmt: skip
    if origin is not None:
        lines.append(f"Origin: {origin}")
    if cookie:
        lines.append(f"Cookie: {cookie}")
    with socket.create_connection((host, port), 10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(4096).split(b" ")[1])


def sign_in(live: Live, name: str, password: str) -> tuple[int, str]:
    """Sign in as a browser does; return the status and the cookies."""
    with contextlib.closing(http.client.HTTPConnection(*address(live), timeout=10)) as connection:
        connection.request("GET", "/sign-in")
        response = connection.getresponse()
        page = response.read().decode()
        csrf = (response.getheader("Set-Cookie") or "").split(";")[0]
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)
        assert token
        form = urllib.parse.urlencode({"csrfmiddlewaretoken": token[1], "username": name, "password": password})
        headers = {"Cookie": csrf, "Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/sign-in", form, headers)
        response = connection.getresponse()
        response.read()
        cookies = "; ".join(value.split(";")[0] for name, value in response.getheaders() if name.lower() == "set-cookie")
        return response.status, cookies


def test_only_own_pages_open_websockets(live: Live) -> None:
    live.create_admin()  # without one the sign-in page has no form
    live.create_user("socket-person")
    status, cookies = sign_in(live, "socket-person", PASSWORD)
    assert status == 302
    assert handshake(live, live.base_url, cookies) == 101
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null", None):
        assert handshake(live, origin, cookies) == 403, origin


def test_no_secret_reaches_a_log(live: Live) -> None:
    """Canaries in every place where a secret can be: none may be found in anything that the installation writes down as text."""
    live.create_admin()
    live.create_user("canary-person", password="canary-password-7f3a9")
    token = live.create_token("canary-person", "canary-token")
    host, port = address(live)
    canaries = {
        "password": "canary-password-7f3a9",
        "wrong password": "canary-wrong-51c0d",
        "token": token,
        "wrong token": "sk-lm-canary-e8b21",
        "prompt": "canary-prompt-60d4e",
        "broken body": "canary-body-9a77c",
        "cookie": "canary-cookie-2b9f1",
    }
    sign_in(live, "canary-person", canaries["password"])
    sign_in(live, "canary-person", canaries["wrong password"])
    other = f"canary-{uuid.uuid4().hex[:8]}"  # a second try of this test meets the person of the first one
    live.manage("user", "create", other, "--password-stdin", stdin=canaries["password"] + "\n")
    prompt = f'{{"model":"lmweb/starter","messages":[{{"role":"user","content":"{canaries["prompt"]}"}}],"max_tokens":3}}'
    requests = [
        (token, prompt),
        (token, prompt.replace("lmweb/starter", "no/model")),
        (token, f'{{"{canaries["broken body"]}'),
        (token, f'{{"model":"{canaries["broken body"]}","messages":"{canaries["broken body"]}"}}'),
        (canaries["wrong token"], prompt),
    ]
    for secret, body in requests:
        for header in ({"Authorization": f"Bearer {secret}"}, {"x-api-key": secret}):
            headers = header | {"Content-Type": "application/json", "Cookie": f"sessionid={canaries['cookie']}"}
            with contextlib.closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
                connection.request("POST", "/v1/chat/completions", body, headers)
                answer = connection.getresponse().read().decode()
            assert secret not in answer
    live.create_user("canary-last")  # whatever the requests logged is on disk by now
    time.sleep(0.5)
    files = [live.output, *(file for file in (live.data_dir / "logs").rglob("*") if file.is_file())]
    assert len(files) >= 4
    for file in files:
        content = file.read_text(errors="replace")
        for kind, canary in canaries.items():
            assert canary not in content, f"the {kind} is in {file.name}"


def test_secrets_are_stored_as_digests_only(live: Live) -> None:
    live.create_user("digest-person")
    token = live.create_token("digest-person", "digest")
    rows = live.rows("SELECT row_to_json(t)::text FROM lmweb_apitoken t")
    assert rows
    assert not [row for (row,) in rows if token in row]
    assert not [row for (row,) in live.rows("SELECT row_to_json(u)::text FROM lmweb_user u") if PASSWORD in row]
