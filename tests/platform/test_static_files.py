"""Static files, which never reach Django: what is answered, with which headers, and what is not."""

from __future__ import annotations

import http.client
import re
import urllib.parse
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from django.test import override_settings

from lmweb.static_files import StaticFiles

if TYPE_CHECKING:
    from tests.live import Live

#: On every answer of the server, whoever gave it.
SHARED = {
    "Content-Security-Policy",
    "Permissions-Policy",
    "X-Content-Type-Options",
    "Referrer-Policy",
    "Cross-Origin-Opener-Policy",
}


def ask(live: Live, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Send a request with its path as it is and return the status, the headers and the body."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(live.base_url).netloc, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


@pytest.fixture
def script(live: Live) -> str:
    """Return the address of a script of the sign-in page."""
    found = re.search(r"/static/js/base\.[0-9a-f]{12}\.js", ask(live, "/sign-in")[2].decode())
    assert found
    return found[0]


def test_hashed_names_are_kept_for_ever_and_travel_compressed(live: Live, script: str) -> None:
    status, headers, plain = ask(live, script)
    assert (status, headers["Content-Type"]) == (200, 'text/javascript; charset="utf-8"')
    assert headers["Cache-Control"] == "max-age=315360000, public, immutable"
    assert "Access-Control-Allow-Origin" not in headers
    assert int(headers["Content-Length"]) == len(plain)
    status, headers, packed = ask(live, script, Accept_Encoding="gzip")
    assert (status, headers["Content-Encoding"], headers["Vary"]) == (200, "gzip", "Accept-Encoding")
    assert int(headers["Content-Length"]) == len(packed) < len(plain)
    assert zlib.decompress(packed, wbits=31) == plain
    assert "immutable" not in ask(live, "/static/js/base.js")[1]["Cache-Control"]


def test_static_files_carry_the_same_protection_as_pages(live: Live, script: str) -> None:
    page, file = ask(live, "/sign-in")[1], ask(live, script)[1]
    assert {name: page[name] for name in SHARED} == {name: file[name] for name in SHARED}
    assert "Set-Cookie" not in file


def test_conditional_head_range_and_wrong_requests(live: Live, script: str) -> None:
    _, headers, body = ask(live, script)
    assert ask(live, script, If_None_Match=headers["ETag"])[::2] == (304, b"")
    assert ask(live, script, If_Modified_Since=headers["Last-Modified"])[::2] == (304, b"")
    assert ask(live, script, If_None_Match='"other"')[::2] == (200, body)
    status, head, nothing = ask(live, script, "HEAD")
    assert (status, head["Content-Length"], nothing) == (200, headers["Content-Length"], b"")
    assert ask(live, script, Range="bytes=2-5")[::2] == (206, body[2:6])
    assert ask(live, script, Range=f"bytes={len(body) + 5}-")[0] == 416
    assert ask(live, script, "POST")[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/none.js",
        "/static/",
        "/static/../manage.py",
        "/static/../secret-key",
        "/static/..%2fsecret-key",
        "/static/%2e%2e/secret-key",
        "/static/js/../../secret-key",
        "/static//etc/passwd",
        "/static/..%5csecret-key",
    ],
)
def test_what_is_no_static_file_is_the_products_own_404(live: Live, path: str) -> None:
    status, headers, body = ask(live, path)
    assert (status, headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert b"lmweb" in body
    assert (live.data_dir / "secret-key").read_bytes().strip() not in body


def test_nul_in_a_path_is_refused_before_a_file_is_looked_for(live: Live) -> None:
    assert ask(live, "/static/js/base.js%00")[0] == 400


def test_a_server_whose_files_are_not_collected_yet_starts(tmp_path: Path) -> None:
    with override_settings(STATIC_ROOT=tmp_path / "none", WHITENOISE_AUTOREFRESH=False, WHITENOISE_USE_FINDERS=False):
        with pytest.warns(UserWarning, match="No directory"):
            files = StaticFiles(None)  # type: ignore[arg-type]  # nothing is asked
        assert files._find("/static/js/base.js") is None
