"""What only a real Daphne shows: bodies that are refused while they arrive, and connections that close."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from models_app.models import Generation, InstalledModel

pytestmark = pytest.mark.usefixtures("model")


@pytest.fixture
def port(transactional_db: None, services_dir: Path, tmp_path: Path) -> Iterator[int]:
    """Start Daphne on the test database and return its port."""
    from django.db import connection

    settings = connection.settings_dict
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    url = f"postgresql://{settings['USER']}@/{settings['NAME']}?host={settings['HOST']}&port={settings['PORT']}"
    environment = os.environ | {"DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "daphne.log").open("wb") as log:
        command = [sys.executable, "-m", "daphne", "-v", "0", "-e", f"tcp:{number}:interface=127.0.0.1", "lmweb.asgi:application"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", number), 1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "daphne.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield number
    finally:
        process.terminate()
        process.wait(10)
    log_text = (tmp_path / "daphne.log").read_text()
    assert "Traceback" not in log_text, log_text


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def head(token: str, *lines: str, path: str = "/v1/chat/completions") -> bytes:
    fixed = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def test_a_declared_giant_is_refused_before_it_is_sent(port: int, token: str) -> None:
    with connect(port) as connection:
        connection.sendall(head(token, f"Content-Length: {10**12}"))
        started = time.monotonic()
        answer = connection.recv(65536)
        assert time.monotonic() - started < 2
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "payload_too_large"


def test_an_endless_body_is_refused_while_it_arrives(port: int, token: str) -> None:
    piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with connect(port) as connection:
        connection.sendall(head(token, "Transfer-Encoding: chunked"))
        for _ in range(34):
            connection.sendall(piece)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_over_the_path_s_limit_is_refused_in_its_format(port: int, token: str) -> None:
    body = b"x" * (21 * 1024 * 1024)
    with connect(port) as connection:
        connection.sendall(head(token, f"Content-Length: {len(body)}", "Connection: close") + body)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer


def test_a_form_is_refused_in_the_path_s_format(port: int, token: str) -> None:
    lines = [f"Authorization: Bearer {token}", "Content-Type: multipart/form-data; boundary=x", "Content-Length: 5", "Connection: close"]
    with connect(port) as connection:
        connection.sendall("\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: x", *lines, "", "hello"]).encode())
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "application/json, not multipart/form-data" in json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_cancels(port: int, token: str, model: InstalledModel, stream: bool) -> None:
    from models_app.models import Generation

    body = json.dumps({"model": model.key, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}).encode()
    with connect(port) as connection:
        connection.sendall(head(token, f"Content-Length: {len(body)}") + body)
        generation = _wait_for(Generation.objects.first)
        time.sleep(0.3)
        generation.refresh_from_db()
        assert not generation.cancel_requested
    _wait_for(lambda: Generation.objects.filter(pk=generation.pk, cancel_requested=True).first())


def test_a_root_path_header_opens_no_other_door(port: int, token: str) -> None:
    for path in ("/v1/sign-in", "/v1/", "/v1/v1/models"):
        with connect(port) as connection:
            lines = f"GET {path} HTTP/1.1\r\nHost: x\r\nDaphne-Root-Path: /v1\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
            connection.sendall(lines.encode())
            assert read_to_end(connection).startswith(b"HTTP/1.1 404 ")


def _wait_for(find: object) -> Generation:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = find()  # type: ignore[operator]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen")


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_an_ordinary_answer_ends_in_order(port: int, connection: str) -> None:
    """The end of an answer may be the end of its connection; the fixture looks for tracebacks."""
    with connect(port) as client:
        client.settimeout(10)
        for _ in range(2 if connection == "keep-alive" else 1):
            client.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n".encode())
            answer = b""
            while b"invalid_api_key" not in answer:
                received = client.recv(4000)
                assert received
                answer += received
        if connection == "close":
            while client.recv(4000):
                pass


BUSY = """
import time
from lmweb import daphne_limits

daphne_limits.install()

async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    time.sleep(3)
    await send({"type": "http.response.body", "body": b"last"})
"""


def test_what_is_sent_goes_out_before_the_loop_does_anything_else(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    command = [sys.executable, "-m", "daphne", "-v", "0", "-e", f"tcp:{number}:interface=127.0.0.1", "busy:application"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    try:
        while True:
            try:
                client = connect(number)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.05)
        with client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while b"first" not in received:
                received += client.recv(1000)
            assert b"last" not in received
    finally:
        process.kill()
        process.wait(10)
