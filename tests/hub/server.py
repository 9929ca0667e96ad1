"""A server that speaks the Hub's API as far as models need it: search, model info, tree, resolve, and a second server for the bytes.

Large files are answered with a redirect to the second server, as the Hub does. What can go wrong in the world is a switch here:
``fail`` (a status for some paths, some times), ``cut_after``, ``stall_after``, ``bytes_per_second``, ``corrupt``, ``ignore_range``,
and per repository ``gated``, ``lies`` (sizes in the listing) and any file names. ``sent`` counts the bytes of each file that left.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_test_token"
PAGE = 50
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repo:
    """A repository; files larger than ``lfs_above`` bytes are "large files" with a SHA-256."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=lambda: ["gguf"])
    likes: int = 0
    downloads: int = 0
    trending: int = 0
    gated: str | bool = False
    license: str = "apache-2.0"
    gguf: dict[str, Any] = field(default_factory=dict)
    modified: str = "2026-01-02T03:04:05.000Z"
    lies: dict[str, int] = field(default_factory=dict)
    wrong_hash: set[str] = field(default_factory=set)
    lfs_above: int = 1024
    accepted: bool = True  # whether TOKEN's account accepted the terms

    def info(self) -> dict[str, Any]:
        """Return what the API says about it."""
        return {
            "id": self.name, "modelId": self.name, "author": self.name.split("/")[0], "sha": COMMIT, "likes": self.likes,
            "downloads": self.downloads, "trendingScore": self.trending, "gated": self.gated, "private": False, "disabled": False,
            "tags": [*self.tags, f"license:{self.license}"], "lastModified": self.modified, "createdAt": self.modified,
            "pipeline_tag": "text-generation", "gguf": self.gguf or None, "cardData": {"license": self.license},
            "siblings": [{"rfilename": path} for path in self.files],
        }  # fmt: skip

    def tree(self) -> list[dict[str, Any]]:
        """Return the listing of its files."""
        entries = []
        for path, content in self.files.items():
            size = self.lies.get(path, len(content))
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git_sha1(content)}
            if len(content) > self.lfs_above:
                sha = "0" * 64 if path in self.wrong_hash else sha256(content)
                entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 135}
            entries.append(entry)
        return [{"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0}, *entries]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()


class Hub:
    """Both servers, and all switches. Use ``close`` at the end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.api = _Server(self, _ApiHandler)
        self.bytes = _Server(self, _BytesHandler)
        self.reset()

    @property
    def url(self) -> str:
        return self.api.url

    def reset(self) -> None:
        """Forget all repositories and faults."""
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: Counter[str] = Counter()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.fail: list[tuple[str, int, dict[str, str]]] = []  # (pattern of "METHOD path", status, headers): each used once
        self.cut_after: list[int] = []  # bytes after which the next connections are cut
        self.stall_after: list[int] = []  # bytes after which the next answers say nothing more
        self.bytes_per_second = 0
        self.corrupt = False
        self.ignore_range = False
        self.redirect_to = ""
        self.down = False

    def add(self, repo: Repo) -> Repo:
        """Publish a repository."""
        self.repos[repo.name] = repo
        for content in repo.files.values():
            self.blobs[sha256(content)] = content
        return repo

    def close(self) -> None:
        self.down = True
        for server in (self.api, self.bytes):
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, hub: Hub, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, dict(self.headers)))
            fault = next((f for f in self.hub.fail if re.search(f[0], f"{self.command} {self.path}")), None)
            if fault:
                self.hub.fail.remove(fault)
        if self.hub.down:
            self.close_connection = True
            return
        if fault:
            self.answer(fault[1], b'{"error":"scripted"}', fault[2])
        else:
            self.route(unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query))

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, data: Any, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(data).encode(), headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def stream(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        """Send content, or the range of it that was asked for, with all the faults that are switched on."""
        hub, total = self.hub, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or total - 1)) if asked and not hub.ignore_range else (0, total - 1)
        if asked and not hub.ignore_range and first >= total:
            self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        last = min(last, total - 1)
        body = content[first : last + 1]
        self.send_response(206 if asked and not hub.ignore_range else 200)
        if asked and not hub.ignore_range:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        for key, value in {"Content-Length": str(len(body)), "ETag": f'"{sha256(content)}"', "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with hub.lock:
            cut = hub.cut_after.pop(0) if hub.cut_after else None
            stall = hub.stall_after.pop(0) if hub.stall_after else None
        if hub.corrupt and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._write(name, body, cut, stall)

    def _write(self, name: str, body: bytes, cut: int | None, stall: int | None) -> None:
        hub, at = self.hub, 0
        step = 64 * 1024
        while at < len(body):
            if hub.down or (cut is not None and at >= cut):
                self.close_connection = True
                self.connection.close()
                return
            if stall is not None and at >= stall:
                deadline = time.monotonic() + 120
                while time.monotonic() < deadline and not hub.down:
                    time.sleep(0.05)
                return
            if hub.bytes_per_second:
                step = max(1024, min(64 * 1024, hub.bytes_per_second // 20))
                time.sleep(step / hub.bytes_per_second)
            end = min(at + step, len(body))
            if cut is not None:
                end = min(end, max(cut, at + 1))
            self.wfile.write(body[at:end])
            with hub.lock:
                hub.sent[name] += end - at
            at = end


class _ApiHandler(_Handler):
    def route(self, path: str, query: dict[str, list[str]]) -> None:
        if path == "/api/models":
            self.search(query)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.tree(found[1], query)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if self.allowed(found[1], listing=True):
                self.json(self.hub.repos[found[1]].info())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[3])
        else:
            self.refuse(404, "EntryNotFound", "no such route")

    def search(self, query: dict[str, list[str]]) -> None:
        words = query.get("search", [""])[0].lower().split()
        filters = set(query.get("filter", []))
        found = [
            repo for repo in self.hub.repos.values()
            if all(word in repo.name.lower() for word in words) and filters <= set(repo.tags)
        ]  # fmt: skip
        keys = {"likes": "likes", "downloads": "downloads", "trendingScore": "trending", "lastModified": "modified"}
        key = keys[query.get("sort", ["trendingScore"])[0]]
        found.sort(key=lambda repo: getattr(repo, key), reverse=True)
        self.json([repo.info() for repo in found[: int(query.get("limit", ["1000"])[0])]])

    def tree(self, name: str, query: dict[str, list[str]]) -> None:
        if not self.allowed(name, listing=True):
            return
        entries, start = self.hub.repos[name].tree(), int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.json(entries[start : start + PAGE], headers)

    def resolve(self, name: str, path: str) -> None:
        if not self.allowed(name, listing=False):
            return
        repo = self.hub.repos[name]
        if path not in repo.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        content = repo.files[path]
        facts = {"X-Repo-Commit": COMMIT}
        if len(content) <= repo.lfs_above:
            self.stream(path, content, facts | {"ETag": f'"{git_sha1(content)}"'})
            return
        facts |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        target = self.hub.redirect_to or f"{self.hub.bytes.url}/blob/{sha256(content)}/{quote(path)}?signature=x"
        self.answer(302, b"", facts | {"Location": target})

    def allowed(self, name: str, *, listing: bool) -> bool:
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None:
            self.refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
        elif token and token != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo.gated and not listing and not token:
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
        elif repo.gated and not listing and not repo.accepted:
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted and you are not in the authorized list.")
        else:
            return True
        return False


class _BytesHandler(_Handler):
    def route(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(r"/blob/([0-9a-f]{64})/(.+)", path)
        if found is None or found[1] not in self.hub.blobs:
            self.refuse(404, "EntryNotFound", "no such bytes")
        elif "Authorization" in self.headers:
            self.refuse(400, "", "Only one auth mechanism allowed")
        else:
            self.stream(found[2], self.hub.blobs[found[1]], {})
