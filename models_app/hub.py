"""The Hugging Face Hub as the rest of lmweb sees it: the only module that uses ``huggingface_hub``.

Everything that the Hub says is checked here: names, sizes and hashes of files become parts of paths and sums later. All requests go
through ``lmweb.egress``. Failures are the project's own errors, at once: waiting and trying again is the business of download jobs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import unquote, urlsplit

import httpx2
import msgspec
from django.conf import settings
from django.core.cache import cache

from lmweb import egress
from lmweb.errors import CorruptDownload, GatedModel, HubBusy, HubOffline, InvalidRequest, LmwebError, NotFound, OutboundFailed

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

CACHE_SECONDS: Final = 120
LOOKUP_SECONDS: Final = 10.0
MAX_FILES: Final = 5_000
MAX_FILE_BYTES: Final = 2**43  # 8 TB: a size above that is a lie
MAX_README_BYTES: Final = 512 * 1024
MAX_WAIT_SECONDS: Final = 3600
DEFAULT_WAIT_SECONDS: Final = 30

Format = Literal["gguf", "mlx"]
#: Orders of a search: name in addresses -> (label, the Hub's name).
SORTS: Final = {
    "trending": ("Trending", "trending_score"),
    "downloads": ("Most downloads", "downloads"),
    "likes": ("Most likes", "likes"),
    "recent": ("Recently changed", "last_modified"),
}

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9_\[(+][A-Za-z0-9._+()\[\],=@ -]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a repository at one commit: its size in bytes and its content's hash, of whichever kind the Hub knows.

    ``sha256`` is of the content (large files); ``git_sha1`` is git's hash of a small file (its size and content).
    """

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class FoundModel:
    """A repository in a list of results."""

    repo: str
    downloads: int
    likes: int
    changed_at: datetime | None
    is_gated: bool
    parameters: int | None
    tags: tuple[str, ...]

    @property
    def publisher(self) -> str:
        """Return whose it is."""
        return self.repo.split("/")[0]

    @property
    def name(self) -> str:
        """Return its name without the publisher."""
        return self.repo.split("/")[1]


@dataclass(frozen=True)
class Repository:
    """A repository with its files at one commit. ``hidden_files`` have names that are not safe to use and are left out."""

    found: FoundModel
    revision: str
    license: str
    base_model: str
    architecture: str
    context_length: int | None
    files: tuple[RemoteFile, ...]
    hidden_files: int


@dataclass(frozen=True)
class Reference:
    """What somebody typed, if it names one repository: perhaps with one of its files, or a quantization."""

    repo: str
    file: str = ""
    quantization: str = ""


# --- what people type -------------------------------------------------------------------------------------------------


def parse_reference(text: str) -> Reference | None:
    """Return the repository that a text names: ``user/repo``, ``user/repo@q4_k_m``, or an address on the Hub; None for keywords.

    Raises ``InvalidRequest`` for an address that is none of the Hub's.
    """
    text = text.strip()
    if "://" in text or text.startswith(("huggingface.co/", "hf.co/")):
        return _parse_address(text if "://" in text else f"https://{text}")
    name, _, quantization = text.partition("@")
    if not quantization:
        name, _, quantization = text.partition(":")
    return Reference(name, quantization=quantization) if is_repo(name) else None


def _parse_address(text: str) -> Reference:
    try:
        url = urlsplit(text)
        host = (url.hostname or "").lower()
    except ValueError:
        raise InvalidRequest("This address cannot be read.", param="model") from None
    own = urlsplit(settings.HF_ENDPOINT).hostname
    if host not in {"huggingface.co", "www.huggingface.co", "hf.co", own}:
        raise InvalidRequest(
            "Only addresses on the Hugging Face Hub are understood, such as https://huggingface.co/user/repo.", param="model"
        )
    parts = [unquote(part) for part in url.path.split("/") if part]
    repo = "/".join(parts[:2])
    if not is_repo(repo):
        raise InvalidRequest("This address does not name a model. It should look like https://huggingface.co/user/repo.", param="model")
    file = "/".join(parts[4:]) if len(parts) > 4 and parts[2] in {"blob", "resolve"} else ""
    return Reference(repo, file=file)


def is_repo(text: str) -> bool:
    """Return whether a text can be the name of a repository."""
    return bool(_REPO.fullmatch(text)) and ".." not in text and "--" not in text


def is_revision(text: str) -> bool:
    """Return whether a text can be a commit."""
    return bool(_SHA1.fullmatch(text))


def address() -> str:
    """Return where people look at the Hub in a browser."""
    return str(settings.HF_ENDPOINT)


def is_safe_path(path: str) -> bool:
    """Return whether a file's path in a repository is one that we would use: plain ASCII, relative, without tricks."""
    if len(path) > 400:
        return False
    return all(_SEGMENT.fullmatch(part) and ".." not in part and not part.endswith((" ", ".")) for part in path.split("/"))


# --- asking -----------------------------------------------------------------------------------------------------------


def search(query: str, *, model_format: Format = "gguf", sort: str = "trending", limit: int = 30) -> list[FoundModel]:
    """Return repositories that match keywords. Raises ``HubOffline``, ``HubBusy``, ``OutboundFailed``."""
    key = f"hub-search:{model_format}:{sort}:{limit}:{query.encode().hex()[:180]}"
    if (known := cache.get(key)) is not None:
        return list(known)
    with _errors():
        infos = _api().list_models(
            search=query or None,
            filter=model_format,
            sort=SORTS[sort][1],  # type: ignore[arg-type]
            limit=limit,
            expand=["downloads", "likes", "lastModified", "gated", "tags", model_format_property(model_format)],
        )
        found = [_found(info) for info in infos if is_repo(info.id)]
    cache.set(key, found, CACHE_SECONDS)
    return found


def model_format_property(model_format: Format) -> Any:
    """Return the property of the Hub's answers that has the number of parameters."""
    return "gguf" if model_format == "gguf" else "safetensors"


def repository(repo: str) -> Repository:
    """Return a repository with its files as of now.

    Raises ``NotFound``, ``GatedModel``, ``HubOffline``, ``HubBusy`` and ``OutboundFailed``.
    """
    if not is_repo(repo):
        raise InvalidRequest("A model on the Hub is named user/repo.", param="model")
    key = f"hub-repository:{repo}"
    if (known := cache.get(key)) is not None:
        return known  # type: ignore[no-any-return]
    with _errors(repo):
        info = _api().model_info(repo, timeout=LOOKUP_SECONDS)
        revision = info.sha or ""
        if not _SHA1.fullmatch(revision):
            raise CorruptDownload("The Hub does not say at which commit this model is.")
        files, hidden = _files(_api().list_repo_tree(repo, recursive=True, revision=revision))
    gguf = info.gguf if isinstance(info.gguf, dict) else {}
    context = gguf.get("context_length")
    result = Repository(
        found=_found(info),
        revision=revision,
        license=_license(info),
        base_model=_label(_card(info).get("base_model")),
        architecture=_label(gguf.get("architecture")),
        context_length=context if isinstance(context, int) and 0 < context < 2**31 else None,
        files=tuple(files),
        hidden_files=hidden,
    )
    cache.set(key, result, CACHE_SECONDS)
    return result


def readme(repo: str, revision: str) -> str:
    """Return the README as Markdown without its metadata; empty if there is none. Raises as ``repository`` does."""
    key = f"hub-readme:{repo}:{revision}"
    if (known := cache.get(key)) is not None:
        return str(known)
    content = b""
    try:
        with open_file(repo, revision, "README.md") as response:
            for chunk in response.iter_bytes(64 * 1024):
                content += chunk
                if len(content) >= MAX_README_BYTES:
                    break
    except NotFound:
        content = b""
    except httpx2.TransportError as error:
        raise OutboundFailed("The Hub's answer was cut off.") from error
    text = content[:MAX_README_BYTES].decode(errors="replace").replace("\x00", "")
    text = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n", "", text, count=1, flags=re.DOTALL).strip()
    cache.set(key, text, CACHE_SECONDS)
    return text


@contextlib.contextmanager
def open_file(repo: str, revision: str, path: str, *, first: int = 0, last: int | None = None) -> Iterator[httpx2.Response]:
    """Ask for a file's bytes from ``first`` to ``last`` (counted from 0, both included), through however many redirects.

    The answer's status is 200 or 206; its body is not read yet, and reading it raises ``httpx2.TransportError`` when it is cut off.
    Raises as ``repository`` does.
    """
    from huggingface_hub import get_session, hf_hub_url

    _api()  # makes the session
    headers = {"Accept-Encoding": "identity", "User-Agent": "lmweb"}
    if settings.HF_TOKEN:
        headers["Authorization"] = f"Bearer {settings.HF_TOKEN}"
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    url = hf_hub_url(repo, path, revision=revision, endpoint=settings.HF_ENDPOINT)
    if not url.startswith(settings.HF_ENDPOINT):  # the package knows an endpoint of its own, from when it was imported
        url = settings.HF_ENDPOINT + urlsplit(url).path
    with contextlib.ExitStack() as stack:
        with _errors(repo):
            response = stack.enter_context(get_session().stream("GET", url, headers=headers))
            _raise_for_status(response)
        yield response


# --- the client -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _api_for(endpoint: str, token: str) -> HfApi:
    from huggingface_hub import HfApi, set_client_factory

    trusted = {urlsplit(endpoint).hostname or "", *settings.OUTBOUND_HOSTS}
    set_client_factory(lambda: egress.client(trusted, on_response=_refuse_waiting))
    return HfApi(endpoint=endpoint, token=token or False, library_name="lmweb")


def _api() -> HfApi:
    _require_online()
    return _api_for(settings.HF_ENDPOINT, settings.HF_TOKEN)


def is_offline() -> bool:
    """Return whether an admin switched the Hub off."""
    return bool(settings.HF_HUB_OFFLINE)


def _require_online() -> None:
    if is_offline():
        raise HubOffline("This installation does not ask the Hugging Face Hub (HF_HUB_OFFLINE). Models can be imported from files.")


def _refuse_waiting(response: httpx2.Response) -> None:
    """End requests that the package would repeat after a sleep: whoever asked decides about waiting."""
    if response.status_code == 429:
        seconds = _wait_seconds(response)
        raise HubBusy(
            f"The Hub allows no more requests for now. Try again in {seconds} s; with a token of the Hub (HF_TOKEN) it allows more.",
            details={"retry_after_seconds": seconds},
        )
    if response.status_code in {408, 500, 502, 503, 504}:
        raise OutboundFailed(f"The Hub has a problem of its own (status {response.status_code}). Try again later.")


def _wait_seconds(response: httpx2.Response) -> int:
    """Return how long the Hub asks to wait: ``Retry-After``, or ``t`` of its ``RateLimit`` header."""
    text = response.headers.get("Retry-After", "")
    if not text.isdigit():
        found = re.search(r"\bt=(\d{1,6})\b", response.headers.get("RateLimit", ""))
        text = found[1] if found else ""
    return min(MAX_WAIT_SECONDS, max(1, int(text))) if text and len(text) < 7 else DEFAULT_WAIT_SECONDS


def _raise_for_status(response: httpx2.Response) -> None:
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented, but not marked as exported

    if response.status_code >= 400:
        with contextlib.suppress(httpx2.HTTPError):
            response.read()  # a streamed answer's message is not there yet
    hf_raise_for_status(response)


@contextlib.contextmanager
def _errors(repo: str = "") -> Iterator[None]:
    """Turn what the package raises into the project's errors. Broken answers count as a failure of the Hub."""
    from huggingface_hub import errors as hub_errors

    try:
        yield
    except LmwebError:
        raise
    except hub_errors.GatedRepoError:
        raise GatedModel(_gated_text(repo)) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
        text = f"The Hub has no model {repo}" if repo else "The Hub has no such model"
        raise NotFound(f"{text}, or it is private and the token (HF_TOKEN) may not see it.") from None
    except hub_errors.EntryNotFoundError:
        raise NotFound("The Hub has this file no more. Look at the model's page again.") from None
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise GatedModel(_gated_text(repo) if status == 403 else "The Hub does not accept the token (HF_TOKEN).") from None
        raise OutboundFailed(f"The Hub refused the request (status {status}).") from None
    except hub_errors.HFValidationError as error:
        raise InvalidRequest(str(error)[:200], param="model") from None
    except httpx2.TooManyRedirects:
        raise OutboundFailed("The Hub leads from one address to the next without end.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON that is none, or of another shape
        raise OutboundFailed(f"The Hub's answer cannot be understood ({type(error).__name__}).") from error


def _gated_text(repo: str) -> str:
    return (
        f"The owner of {repo} gives it to accounts that accepted its terms. Open {settings.HF_ENDPOINT}/{repo} in a browser, accept "
        "them, and let an admin set HF_TOKEN to a token of that account."
    )


# --- what it says -----------------------------------------------------------------------------------------------------


def _found(info: ModelInfo) -> FoundModel:
    gguf = info.gguf if isinstance(info.gguf, dict) else {}
    parameters = gguf.get("total") or getattr(info.safetensors, "total", None)
    return FoundModel(
        repo=info.id,
        downloads=_count(info.downloads),
        likes=_count(info.likes),
        changed_at=info.last_modified,
        is_gated=bool(info.gated),
        parameters=parameters if isinstance(parameters, int) and 0 < parameters < 2**50 else None,
        tags=tuple(map(str, info.tags or []))[:200],
    )


def _files(entries: Any) -> tuple[list[RemoteFile], int]:
    """Return the files that can be used, and how many cannot."""
    files: list[RemoteFile] = []
    hidden = 0
    for number, entry in enumerate(entries):
        if number >= MAX_FILES:
            break
        if not hasattr(entry, "blob_id"):  # a folder
            continue
        file = _file(entry)
        if file is None:
            hidden += 1
        else:
            files.append(file)
    return files, hidden


def _file(entry: Any) -> RemoteFile | None:
    lfs = entry.lfs
    size = lfs.size if lfs else entry.size
    sha256 = str(lfs.sha256) if lfs else ""
    git_sha1 = "" if lfs else str(entry.blob_id)
    if not isinstance(entry.path, str) or not is_safe_path(entry.path):
        return None
    if not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
        return None
    if not (_SHA256.fullmatch(sha256) or _SHA1.fullmatch(git_sha1)):
        return None
    return RemoteFile(path=entry.path, size=size, sha256=sha256, git_sha1=git_sha1)


def _count(number: Any) -> int:
    return number if isinstance(number, int) and number >= 0 else 0


def _card(info: ModelInfo) -> dict[str, Any]:
    return dict(info.card_data.to_dict()) if info.card_data else {}  # type: ignore[no-untyped-call]


def _license(info: ModelInfo) -> str:
    card = _card(info)
    name = _label(card.get("license_name")) or _label(card.get("license"))
    return name or next((tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), "")[:80]


def _label(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    return " ".join(value.split())[:160] if isinstance(value, str) else ""
