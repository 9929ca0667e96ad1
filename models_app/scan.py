"""Finds model files that lie where they belong but are in no list: in the models directory, or in LM Studio's own folder.

Both have the same layout: ``publisher/model/file.gguf``, or ``publisher/model/`` with the files of the MLX format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, InvalidRequest, LmwebError
from models_app import mlx, naming, placement, services
from models_app.models import ModelFile
from models_app.placement import Mode
from workers.mlx_directory import CONFIG

MAX_FILES: Final = 2000
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A file, and what became of it: the key of the new model, or why there is none."""

    path: str
    key: str = ""
    problem: str = ""


def scan(*, principal: Principal | None, folder: Path | None = None, mode: Mode = Mode.SYMBOLIC_LINK) -> list[Found]:
    """Take in the model files of a folder that are in no list yet; files of the models directory (None) stay where they are.

    ``mode`` says how files of another folder come in; those that lie in it directly are named after what they say of themselves.
    ``principal`` None stands for the administrator at the command line. Raises ``PermissionDenied`` (only admins name a folder), or
    ``InvalidRequest`` for a folder that is none.
    """
    if principal:
        require(principal, Action.IMPORT_MODELS if folder is None else Action.IMPORT_FROM_SERVER)
    root = placement.models_dir()
    chosen = root if folder is None else placement.resolve(folder)
    if not chosen.is_dir():
        raise InvalidRequest(f"{chosen} is not a folder.", param="folder")
    found = []
    known = set(ModelFile.objects.values_list("path", flat=True))
    for file in _files(chosen, flat=chosen != root):
        relative = "/".join(file.parts[-3:])
        if relative in known:
            continue
        try:
            user_repo = "/".join(file.parts[-3:-1]) if file.parent != chosen else None
            if user_repo and chosen == root:
                publisher, repo = naming.parse_user_repo(user_repo)
                model = services.register_stored(principal=principal, file=file, publisher=publisher, repo=repo)
            else:
                source = file.parent if file.name == CONFIG else file
                model = services.import_file(principal=principal, source=source, user_repo=user_repo, mode=mode)
        except Conflict as error:
            if "key" not in error.details:  # what is installed already is no problem
                found.append(Found(relative, problem=error.message))
        except LmwebError as error:
            found.append(Found(relative, problem=error.message))
        else:
            found.append(Found(relative, key=model.key))
    return found


def take_in(*, principal: Principal, path: Path, mode: Mode) -> list[Found]:
    """Take in a file, a directory in the MLX format, or the models of a folder, that lies on the server's own disk.

    Raises ``PermissionDenied`` (only admins name paths), ``InvalidRequest``, ``InvalidModelFile`` and ``Conflict``.
    """
    require(principal, Action.IMPORT_FROM_SERVER)
    resolved = placement.resolve(path)
    if resolved.is_dir() and not mlx.is_directory(resolved):
        return scan(principal=principal, folder=path, mode=mode)
    return [Found(str(path), key=services.import_file(principal=principal, source=path, mode=mode).key)]


def _files(root: Path, *, flat: bool) -> Iterator[Path]:
    """Yield the file that stands for each model below a folder, in their order: no further parts, no projectors, no linked folders.

    ``flat`` says that GGUF files may also lie in the folder itself.
    """
    count = 0
    patterns = [f"*/*/*{naming.SUFFIX}", f"*/*/{CONFIG}", *([f"*{naming.SUFFIX}"] if flat else [])]
    for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
        if any(part.startswith(".") for part in file.parts[-3:]) or file.parent.resolve() != file.parent:
            continue
        if _LATER_PART.search(file.name) or _PROJECTOR.search(file.name):
            continue
        if file.name == CONFIG and not mlx.is_directory(file.parent):
            continue
        count += 1
        if count > MAX_FILES:
            raise InvalidRequest(f"There are more than {MAX_FILES} model files in {root}.", param="folder")
        yield file
