"""Staff picks: a YAML file of ``model.yaml`` documents. lmweb brings one; an admin's own, in the data directory, replaces it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from django.conf import settings

from lmweb.access import Action, Principal, require
from lmweb.errors import InvalidRequest
from models_app import hub

SHIPPED: Final = Path(__file__).with_name("catalog.yaml")
MAX_BYTES: Final = 256 * 1024
MAX_PICKS: Final = 200


@dataclass(frozen=True)
class Pick:
    """A recommended model: its name (``publisher/model``), where its files are (best source first), and what it can."""

    model: str
    repos: tuple[str, ...]
    description: str
    params: str
    vision: bool
    reasoning: bool
    tools: bool
    is_embedding: bool

    @property
    def name(self) -> str:
        """Return its name without the publisher."""
        return self.model.split("/")[1]


def picks() -> list[Pick]:
    """Return the staff picks. A file of an admin that cannot be read any more counts as empty."""
    try:
        return parse(text())
    except InvalidRequest:
        return []


def find(name: str) -> Pick | None:
    """Return the pick of this name, whatever the case, or None."""
    return next((pick for pick in picks() if pick.model.lower() == name.lower()), None)


def text() -> str:
    """Return the file in force."""
    own = _own_file()
    try:
        return (own if own.is_file() else SHIPPED).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The file of staff picks cannot be read: {error}.") from None


def is_own() -> bool:
    """Return whether an admin's file is in force."""
    return _own_file().is_file()


def save(content: str, *, principal: Principal) -> None:
    """Put another file of staff picks in force. Raises ``PermissionDenied``, or ``InvalidRequest`` that says what is wrong with it."""
    require(principal, Action.DECIDE_REQUESTS)
    parse(content)
    fresh = _own_file().with_suffix(".new")
    fresh.write_text(content.replace("\r\n", "\n"), encoding="utf-8")
    fresh.replace(_own_file())


def reset(*, principal: Principal) -> None:
    """Go back to the staff picks that lmweb brings. Raises ``PermissionDenied``."""
    require(principal, Action.DECIDE_REQUESTS)
    _own_file().unlink(missing_ok=True)


def parse(content: str) -> list[Pick]:
    """Return the picks of a file. Raises ``InvalidRequest`` that names the line or the document at fault."""
    if len(content.encode(errors="replace")) > MAX_BYTES:
        raise InvalidRequest(f"The file is larger than {MAX_BYTES // 1024} KiB.", param="catalog")
    try:
        documents = [document for document in yaml.load_all(content, Loader=SafeLoader) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise InvalidRequest(f"This is not valid YAML{where}.", param="catalog") from None
    if len(documents) > MAX_PICKS:
        raise InvalidRequest(f"There are {len(documents)} models; at most {MAX_PICKS} are possible.", param="catalog")
    return [_pick(number, document) for number, document in enumerate(documents, 1)]


class SafeLoader(yaml.SafeLoader):
    """YAML without aliases, which could make a small file a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read a node. Raises ``YAMLError`` for an alias."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _pick(number: int, document: Any) -> Pick:
    def wrong(what: str) -> InvalidRequest:
        return InvalidRequest(f"Model {number} of the file: {what}", param="catalog")

    if not isinstance(document, dict):
        raise wrong("it is no model.yaml document; separate the documents by a line with ---.")
    model = document.get("model")
    if not isinstance(model, str) or not hub.is_repo(model):
        raise wrong("'model' must be publisher/name.")
    facts = document.get("metadataOverrides") or {}
    if not isinstance(facts, dict):
        raise wrong("'metadataOverrides' must be a mapping.")
    repos = tuple(_repos(document.get("base")))
    if not repos:
        raise wrong("'base' names no source of type huggingface with user and repo.")
    params = facts.get("paramsStrings")
    description = document.get("description")
    return Pick(
        model=model,
        repos=repos,
        description=" ".join(description.split())[:300] if isinstance(description, str) else "",
        params=str(params[0])[:16] if isinstance(params, list) and params else "",
        vision=facts.get("vision") is True,
        reasoning=facts.get("reasoning") is True,
        tools=facts.get("trainedForToolUse") is True,
        is_embedding=facts.get("domain") == "embedding",
    )


def _repos(base: Any) -> list[str]:
    found = []
    for entry in base if isinstance(base, list) else []:
        sources = entry.get("sources") if isinstance(entry, dict) else None
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and source.get("type") == "huggingface":
                repo = f"{source.get('user')}/{source.get('repo')}"
                if hub.is_repo(repo):
                    found.append(repo)
    return found


def _own_file() -> Path:
    return Path(settings.DATA_DIR) / "catalog.yaml"
