"""The writers of models on disk: pages, APIs and commands call these and nothing else. Of models in memory: ``loading``."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Count

from lmweb.access import Action, Principal, require
from lmweb.errors import Conflict, InvalidModelFile, InvalidRequest, TemplateError
from lmweb.models import User
from models_app import gguf, loading, mlx, naming, placement
from models_app.models import Generation, InstalledModel, ModelFile, ModelInstance
from models_app.placement import Mode
from workers.mlx_directory import CONFIG, MlxDirectory, is_part, is_weights, read_directory, read_files
from workers.template_preview import TemplatePreview, preview

logger = logging.getLogger(__name__)

UNLOAD_WAIT_SECONDS: Final = 15.0

STARTER_FILE: Final = Path(settings.BASE_DIR) / "models_app" / "starter" / "lmweb-starter.gguf"
STARTER_USER_REPO: Final = "lmweb/starter"
STARTER_DESCRIPTION: Final = "Starter: a few-MB demonstration model that knows lmweb's help and simple tasks; get a real model in Discover."


# --- on disk ----------------------------------------------------------------------------------------------------------


def import_file(
    *,
    principal: Principal | None,
    source: Path,
    user_repo: str | None = None,
    mode: Mode = Mode.MOVE,
    original_name: str | None = None,
    description: str | None = None,
    progress: placement.Progress | None = None,
) -> InstalledModel:
    """Check a model and take it into the models directory as ``publisher/name/file.gguf``; with the first part come the others.

    Args:
        principal: who imports; None for the administrator at the command line.
        source: the GGUF file, or a directory in the MLX format; a file's name counts unless ``original_name`` is given.
        user_repo: ``publisher/name``; None guesses it from the file.
        mode: what happens to ``source``.
        original_name: what the file was called where it came from.
        description: shown with the model instead of what the file says about itself.
        progress: called with bytes done and total while the file is copied.

    Raises:
        PermissionDenied, InvalidRequest, InvalidModelFile: with nothing stored and the file where it was.
        Conflict: the model is there already, or the disk is full.
    """
    if principal:
        require(principal, Action.IMPORT_MODELS)
    if placement.resolve(source).is_dir():
        return _import_directory(principal, source, user_repo, mode, progress)
    name = naming.file_name(original_name or source.name)  # of a link its own name: caches link from names to hashes
    source = placement.check_source(source, mode)
    _refuse_stored_file(source)
    model = gguf.read_model(source)
    publisher, repo = naming.parse_user_repo(user_repo) if user_repo else naming.guess_user_repo(name, model)
    row = _row(model, publisher, repo, name, principal.user if principal else None)
    if description is not None:
        row.description = description
    row.key = free_key(publisher, repo, row.path, model.quantization)
    files = [NewFile(part, naming.file_name(part.name) if number else name) for number, part in enumerate(gguf.part_paths(source))]
    with ExitStack() as stack:
        incoming = [stack.enter_context(placement.Incoming(file.source, mode, progress)) for file in files]
        if gguf.read_parts([arriving.path for arriving in incoming]) != model:
            raise InvalidModelFile("The file changed while it was imported. Nothing was stored.")
        _store(row, files, incoming)
    return row


def _import_directory(
    principal: Principal | None, source: Path, user_repo: str | None, mode: Mode, progress: placement.Progress | None
) -> InstalledModel:
    """Take a directory in the MLX format in: what belongs to the model, and nothing else of it."""
    source = mlx.check_source(source, mode)
    directory = read_directory(source)
    model = mlx.describe(directory)
    publisher, repo = naming.parse_user_repo(user_repo) if user_repo else naming.guess_directory(source)
    row = _row(model, publisher, repo, CONFIG, principal.user if principal else None)
    row.key = free_key(publisher, repo, row.path, model.quantization)
    files = _mlx_files(directory)
    with ExitStack() as stack:
        incoming = [stack.enter_context(placement.Incoming(file.source, mode, progress)) for file in files]
        if read_files({file.name: arriving.path for file, arriving in zip(files, incoming)}).tensors != directory.tensors:
            raise InvalidModelFile("The files changed while they were imported. Nothing was stored.")
        _store(row, files, incoming)
    if mode is Mode.MOVE:
        placement.remove_if_empty(source)
    return row


def _mlx_files(directory: MlxDirectory) -> list[NewFile]:
    roles = {True: ModelFile.Role.WEIGHTS, False: ModelFile.Role.OTHER}
    return [NewFile(path, name, roles[is_weights(name)]) for name, path in directory.files.items()]


def register_stored(*, principal: Principal | None, file: Path, publisher: str, repo: str) -> InstalledModel:
    """Add the model of a file that lies in the models directory already, where ``publisher/repo`` says; nothing is moved.

    Raises ``PermissionDenied``, ``InvalidRequest``, ``InvalidModelFile``, or ``Conflict`` if the model is there already.
    """
    if principal:
        require(principal, Action.IMPORT_MODELS)
    if file.name == CONFIG:
        directory = read_directory(mlx.check_source(file.parent, Mode.MOVE))
        row = _row(mlx.describe(directory), publisher, repo, CONFIG, principal.user if principal else None)
        row.key = free_key(publisher, repo, row.path, row.quantization)
        _store(row, _mlx_files(directory), [])
        return row
    source = placement.check_source(file, Mode.MOVE)
    if naming.file_name(file.name) != file.name:
        raise InvalidRequest(f"Rename {file.name}: letters, digits, '.', '_' and '-' only.", param="file")
    parts = gguf.part_paths(source)
    model = gguf.read_parts(parts)
    row = _row(model, publisher, repo, file.name, principal.user if principal else None)
    row.key = free_key(publisher, repo, row.path, model.quantization)
    _store(row, [NewFile(part, part.name) for part in parts], [])
    return row


@dataclass(frozen=True)
class NewFile:
    """A file that is to become part of a model, and what it is called there. ``sha256`` is known to be right, or empty."""

    source: Path
    name: str
    role: ModelFile.Role = ModelFile.Role.WEIGHTS
    sha256: str = ""


def register_download(*, user: User | None, repo: str, label: str, files: list[NewFile]) -> InstalledModel:
    """Take the complete files of one model into the models directory: a GGUF's parts in order, perhaps a projector, or an MLX directory.

    Args:
        user: who asked for it.
        repo: ``publisher/name`` on the Hub, which becomes the folder.
        label: how its publisher calls the quantization.
        files: the first one stands for the model, weights in their order; a projector that another quantization brought already is shared with it.

    Raises:
        InvalidModelFile: the files are no model.
        Conflict: the model is there already, or something else is in its place.
    """
    publisher, name = naming.parse_user_repo(repo)
    if files[0].name == CONFIG:
        return _register_mlx(user, publisher, name, files)
    files = [replace(file, name=naming.file_name(file.name)) for file in files]
    weights = [file.source for file in files if file.role == ModelFile.Role.WEIGHTS]
    model = gguf.read_parts(weights)
    for file in files:
        if file.role == ModelFile.Role.PROJECTOR:
            gguf.check_projector(file.source)
    row = _row(model, publisher, name, files[0].name, user)
    if naming.is_quantization(label):
        row.quantization = label[:32]
    row.size_bytes = sum(file.source.stat().st_size for file in files)
    row.capabilities = {**row.capabilities, "vision": len(files) > len(weights)}
    row.key = free_key(publisher, name, row.path, row.quantization)
    fresh = [file for file in files if not _is_shared(file, f"{publisher}/{name}/{file.name}")]
    with ExitStack() as stack:
        incoming = [stack.enter_context(placement.Incoming(file.source, Mode.MOVE)) for file in fresh]
        _store(row, files, incoming)
    return row


def _register_mlx(user: User | None, publisher: str, name: str, files: list[NewFile]) -> InstalledModel:
    by_name = {file.name: file for file in files if is_part(file.name)}
    directory = read_files({file.name: file.source for file in by_name.values()})
    row = _row(mlx.describe(directory), publisher, name, CONFIG, user)
    row.key = free_key(publisher, name, row.path, row.quantization)
    taken = [replace(file, sha256=by_name[file.name].sha256) for file in _mlx_files(directory)]
    with ExitStack() as stack:
        incoming = [stack.enter_context(placement.Incoming(file.source, Mode.MOVE)) for file in taken]
        _store(row, taken, incoming)
    return row


def _is_shared(file: NewFile, path: str) -> bool:
    """Return whether another model brought this very projector already."""
    shared = ModelFile.objects.filter(path=path, role=ModelFile.Role.PROJECTOR).exclude(sha256="").filter(sha256=file.sha256)
    return file.role == ModelFile.Role.PROJECTOR and any(other.file.is_file() for other in shared)


def _row(model: gguf.ModelFile, publisher: str, repo: str, name: str, user: User | None) -> InstalledModel:
    return InstalledModel(
        type=model.type,
        publisher=publisher,
        display_name=model.name or repo,
        description=model.description,
        architecture=model.architecture,
        quantization=model.quantization,
        bits_per_weight=model.bits_per_weight,
        params_string=model.params_string,
        size_bytes=model.size_bytes,
        max_context_length=model.context_length,
        capabilities=model.capabilities,
        path=f"{publisher}/{repo}/{name}",
        format=mlx.FORMAT if name == CONFIG else gguf.FORMAT,
        chat_template=model.chat_template,
        imported_by=user,
    )


def _refuse_stored_file(source: Path) -> None:
    """Raise ``Conflict`` for a file that a model lives in already: moving it would take it away from that model."""
    root = placement.models_dir()
    if source.is_relative_to(root):
        owner = InstalledModel.objects.filter(path=str(source.relative_to(root))).first()
        if owner is not None:
            raise Conflict(f"This file is installed already, as {owner.key}.", details={"key": owner.key})


def free_key(publisher: str, repo: str, path: str, quantization: str) -> str:
    """Return the key of a new model: ``publisher/name``, for a further quantization of the same name ``publisher/name@q4_k_m``.

    Raises ``Conflict`` if this very model is installed.
    """
    key = naming.make_key(publisher, repo)
    present = InstalledModel.objects.filter(path__iexact=path).first()
    other = InstalledModel.objects.filter(key=key).first()
    if other is not None and present is None:
        variant = f"{key}@{quantization.lower()}"
        if other.quantization != quantization and not InstalledModel.objects.filter(key=variant).exists():
            return variant
        present = other if other.quantization == quantization else InstalledModel.objects.get(key=variant)
    if present is not None:
        raise Conflict(
            f"This model is already installed as {present.key} ({present.path}). Delete that one first, or choose another name.",
            param="user_repo",
            details={"key": present.key},
        )
    return key


def _store(row: InstalledModel, files: list[NewFile], incoming: list[placement.Incoming]) -> None:
    """Write the rows and publish the files together: whichever fails takes the others back."""
    folder = row.path.rpartition("/")[0]
    names = {id(arriving): file.name for file in files for arriving in incoming if arriving.source == file.source}
    try:
        with transaction.atomic():
            row.save(force_insert=True)  # first: the unique path keeps a second import of the same name away
            for file in files:
                size = file.source.stat().st_size
                ModelFile.objects.create(model=row, path=f"{folder}/{file.name}", role=file.role, size_bytes=size, sha256=file.sha256)
            for arriving in incoming:
                arriving.publish(f"{folder}/{names[id(arriving)]}")
    except IntegrityError:
        raise Conflict(f"{row.key} is being imported by somebody else at this moment.", param="user_repo") from None
    for arriving in incoming:
        arriving.finish()


def delete_model(*, principal: Principal | None, model: InstalledModel) -> None:
    """Unload a model everywhere and delete its row and file.

    Raises ``PermissionDenied``, or ``Conflict`` while it is answering or if a worker does not let go of it in time.
    """
    if principal:
        require(principal, Action.DELETE_MODELS)
    _refuse_while_generating(model)
    if names := ", ".join(model.virtual_models.values_list("key", flat=True)[:5]):
        raise Conflict(f"{model.key} is what virtual models run on: {names}. Delete them first.")
    for instance in ModelInstance.objects.filter(model=model):
        loading.unload(instance)
    _wait_until_unloaded(model)
    with transaction.atomic():
        locked = InstalledModel.objects.select_for_update().filter(pk=model.pk).first()
        if locked is None:
            return
        _refuse_while_generating(locked)
        files = [file.file for file in locked.files.all() if not _is_used_elsewhere(file)]
        if locked.base_id:
            files = [placement.models_dir() / locked.path]
        locked.delete()
        try:  # before the commit: a file that cannot be deleted must not lose its row
            for file in files:
                placement.remove_file(file)
        except OSError as error:
            raise Conflict(f"The file of {locked.key} cannot be deleted: {error.strerror}.") from None
        if locked.key == STARTER_USER_REPO:
            _starter_marker().touch()


def _is_used_elsewhere(file: ModelFile) -> bool:
    return ModelFile.objects.filter(path=file.path).exclude(model=file.model_id).exists()


def _refuse_while_generating(model: InstalledModel) -> None:
    running = Generation.objects.unfinished().filter(model=model).values("source").annotate(count=Count("pk")).order_by("source")
    if what := ", ".join(f"{entry['count']} from {entry['source']}" for entry in running):
        raise Conflict(f"{model.key} is answering requests right now ({what}). Stop them first, or try again when they have ended.")


def _wait_until_unloaded(model: InstalledModel) -> None:
    deadline = time.monotonic() + UNLOAD_WAIT_SECONDS
    while ModelInstance.objects.filter(model=model).exists():
        if time.monotonic() > deadline:
            raise Conflict(f"{model.key} is still being unloaded. Try again in a moment.")
        time.sleep(0.05)


def ensure_starter(*, restore: bool = False) -> InstalledModel | None:
    """Install the starter model unless it is there. Returns None if somebody deleted it, which is respected without ``restore``."""
    present = InstalledModel.objects.filter(key=STARTER_USER_REPO).first()
    if present is not None and present.file.is_file():
        return present
    if _starter_marker().exists() and not restore:
        return None
    if present is not None:
        present.delete()
    # A file without a row is left from a database that is gone; it would be in the way.
    placement.remove_file(placement.models_dir() / STARTER_USER_REPO / STARTER_FILE.name)
    model = import_file(principal=None, source=STARTER_FILE, user_repo=STARTER_USER_REPO, mode=Mode.COPY, description=STARTER_DESCRIPTION)
    _starter_marker().unlink(missing_ok=True)
    return model


def _starter_marker() -> Path:
    return placement.models_dir() / ".starter-deleted"


# --- chat templates ---------------------------------------------------------------------------------------------------


def set_chat_template(*, principal: Principal | None, model: InstalledModel, text: str) -> TemplatePreview | None:
    """Use this chat template (Jinja) instead of the one in the model's file, from the next request on; nothing is loaded again.

    An empty text goes back to the file's and returns None; otherwise the preview of what was saved is returned. ``model`` is
    updated. ``principal`` None stands for the administrator at the command line.

    Raises ``PermissionDenied`` (only admins: the template shapes everybody's conversations), and ``TemplateError`` with ``param``
    ``chat_template`` for a text that is no valid template or cannot render a conversation; then nothing is changed.
    """
    if principal:
        require(principal, Action.CHANGE_TEMPLATES)
    text = _template_text(text)
    if text == _template_text(model.chat_template):
        text = ""  # what the file says is no override
    found = preview(text) if text else None
    InstalledModel.objects.filter(pk=model.pk).update(chat_template_override=text)
    model.chat_template_override = text
    return found


def preview_chat_template(*, principal: Principal, model: InstalledModel, text: str | None = None) -> TemplatePreview:
    """Return what a template makes of a sample conversation, without saving it.

    ``text`` None or empty previews the template in force (of a file without one: ChatML). Raises ``PermissionDenied`` for who may
    not see models, or try their own text out, and ``TemplateError`` as ``set_chat_template`` does.
    """
    text = _template_text(text or "")
    require(principal, Action.CHANGE_TEMPLATES if text else Action.READ_MODELS)
    return preview(text or model.chat_template_override or model.chat_template)


def _template_text(text: str) -> str:
    """Return a template with the line ends of the files it comes from: forms send others. Raises ``TemplateError`` for NUL."""
    if "\x00" in text:
        raise TemplateError("The chat template contains a NUL character.", param="chat_template")
    text = text.replace("\r\n", "\n")
    return text if text.strip() else ""
