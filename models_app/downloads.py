"""Downloads as people and programs see them: asking, pausing, going on, cancelling, deciding about requests.

Every step is a conditional update of the row, and only that decides: a task message to the io worker is a hint that may be lost or
come twice. What moves the bytes is ``models_app.transfer``.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from django.db import IntegrityError, transaction
from django.db.models import Q
from django.utils import timezone
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from lmweb.access import Action, Principal, require
from lmweb.decoding import convert
from lmweb.errors import Conflict, InvalidRequest, JobNotFound, PermissionDenied
from lmweb.models import User
from models_app import catalog, hub, mlx, naming, placement
from models_app.hub import RemoteFile, Repository
from models_app.models import Download, InstalledModel, ModelFile
from models_app.variants import Variant, find_variant, recommended, variant_of_file, variants
from models_app.verdicts import Hardware, verdict_of
from workers.engines import registry

logger = logging.getLogger(__name__)

RUN_TASK: Final = "models_app.tasks.run_download"
MAX_UNFINISHED_PER_PERSON: Final = 50

Status = Download.Status


@dataclass(frozen=True)
class Found:
    """What somebody asked for: the repository, all its variants, and the one that was meant."""

    repository: Repository
    offered: list[Variant]
    chosen: Variant


@dataclass(frozen=True)
class Asked:
    """What asking led to: a download (a new one, or one that was under way), or a model that is here already."""

    download: Download | None
    installed: InstalledModel | None
    is_new: bool = False


# --- finding ----------------------------------------------------------------------------------------------------------


def find(text: str, quantization: str = "") -> Found:
    """Return what a text means: ``user/repo``, an address on the Hub, ``user/repo@q4_k_m``, or the name of a staff pick.

    Without a quantization the recommended one is chosen. Raises ``InvalidRequest``, ``NotFound`` and what ``hub.repository`` raises.
    """
    pick = catalog.find(text.partition("@")[0].strip())
    reference = hub.Reference(pick.repos[0], quantization=text.partition("@")[2]) if pick else hub.parse_reference(text)
    if reference is None:
        raise InvalidRequest("Name the model as user/repo, or give its address on the Hugging Face Hub.", param="model")
    repository = hub.repository(reference.repo)
    offered = variants(repository)
    if not offered:
        raise InvalidRequest(f"{reference.repo} has no complete model in a format that runs here (GGUF).", param="model")
    wanted = quantization or reference.quantization
    if wanted:
        chosen = find_variant(offered, wanted)
        if chosen is None:
            labels = ", ".join(variant.label for variant in offered)
            raise InvalidRequest(f"{reference.repo} has no quantization '{wanted[:60]}'. It has: {labels}.", param="quantization")
    elif reference.file:
        chosen = variant_of_file(offered, reference.file)
        if chosen is None:
            raise InvalidRequest(f"{reference.repo} has no model file {reference.file[:200]}.", param="model")
    else:
        chosen = recommended_of(repository, offered) or offered[0]
    return Found(repository, offered, chosen)


def recommended_of(repository: Repository, offered: list[Variant]) -> Variant | None:
    """Return the variant to recommend on this installation's hardware (any, while no worker runs); None if none fits."""
    hardware = Hardware.of_installation()
    if hardware is None:
        return recommended(offered)
    return recommended([variant for variant in offered if verdict_of(repository, variant, hardware).fits])


def missing_engine(variant: Variant) -> str:
    """Return what to do about the engine that would read this variant but is not installed here; empty if it is."""
    card = registry.card_of(variant.format)
    return "" if card.is_installed else f"The engine for {variant.format.upper()} models is not installed here. {card.install}"


def fingerprint(repo: str, variant: Variant) -> str:
    """Return what makes two downloads the same: where from and which content."""
    content = [repo.lower(), *sorted(f"{file.path}:{file.size}:{file.sha256 or file.git_sha1}" for file in variant.all_files)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def installed(repository: Repository, variant: Variant) -> InstalledModel | None:
    """Return the model that this variant has become here already, or None."""
    first = variant.files[0]
    path = f"{repository.found.repo}/{first.name if variant.format == mlx.FORMAT else naming.file_name(first.name)}"
    file = ModelFile.objects.filter(path__iexact=path).exclude(role=ModelFile.Role.PROJECTOR).select_related("model").first()
    if file is None or (file.sha256 and first.sha256 and file.sha256 != first.sha256):
        return None
    return file.model


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(*, principal: Principal | None, repository: Repository, variant: Variant) -> Asked:
    """Have a variant downloaded, or ask for it where the right is missing: then an admin decides.

    ``principal`` None is the administrator at the command line. Raises ``PermissionDenied``, ``InvalidRequest`` for names that cannot
    become folders, ``Conflict`` without disk space and ``HubOffline``.
    """
    may_download = principal is None or principal.may(Action.DOWNLOAD_MODELS)
    if principal is not None and not may_download:
        require(principal, Action.REQUEST_DOWNLOADS)
    naming.parse_user_repo(repository.found.repo)
    if missing := missing_engine(variant):
        raise InvalidRequest(missing, param="model")
    if (model := installed(repository, variant)) is not None:
        return Asked(None, model)
    user = principal.user if principal else None
    mark = fingerprint(repository.found.repo, variant)
    if (joined := _join(mark, user, may_download=may_download)) is not None:
        return Asked(joined, None)
    if may_download:
        placement.require_free_space(variant.size_bytes + reserved_bytes())
    _refuse_too_many(user)
    download = Download(
        repo=repository.found.repo,
        revision=repository.revision,
        label=variant.label,
        format=variant.format,
        files=msgspec.to_builtins(variant.all_files),
        fingerprint=mark,
        status=Status.QUEUED if may_download else Status.REQUESTED,
        total_bytes=variant.size_bytes,
        requested_by=user,
    )
    try:
        with transaction.atomic():
            download.save(force_insert=True)
            if user:
                download.people.add(user)
            transaction.on_commit(send_waiting)
    except IntegrityError:  # somebody else asked for the same at this very moment
        joined = _join(mark, user, may_download=may_download)
        if joined is None:
            raise Conflict("This download ended at this moment. Try again.") from None
        return Asked(joined, None)
    return Asked(download, None, is_new=True)


def _join(mark: str, user: User | None, *, may_download: bool) -> Download | None:
    """Join the same download that is under way, or the request for it; whoever may download grants the request."""
    with transaction.atomic():
        there = Download.objects.select_for_update().filter(
            Q(status__in=Download.UNFINISHED) | Q(status=Status.REQUESTED), fingerprint=mark
        )
        download = there.first()
        if download is None:
            return None
        if user:
            download.people.add(user)
        if may_download and download.status == Status.REQUESTED:
            _move(download, Status.QUEUED, decided_by=user)
    return download


def reserved_bytes() -> int:
    """Return the disk space that unfinished downloads will still take."""
    unfinished = Download.objects.unfinished().exclude(status=Status.VERIFYING).values_list("total_bytes", "done_bytes")
    return sum(max(0, total - done) for total, done in unfinished)


def _refuse_too_many(user: User | None) -> None:
    waiting = Download.objects.filter(Q(status__in=Download.UNFINISHED) | Q(status=Status.REQUESTED), requested_by=user)
    if user and waiting.count() >= MAX_UNFINISHED_PER_PERSON:
        raise Conflict(f"You have {MAX_UNFINISHED_PER_PERSON} downloads that wait or run. Cancel some first.")


# --- changing ---------------------------------------------------------------------------------------------------------


def get(principal: Principal, download_id: str) -> Download:
    """Return a download that this principal may know of. Raises ``JobNotFound``."""
    found = Download.objects.visible_to(principal).filter(pk=download_id.replace("\x00", "")[:64]).first()
    if found is None:
        raise JobNotFound("There is no such download.")
    return found


def may_change(principal: Principal, download: Download) -> bool:
    """Return whether this principal may pause, resume, cancel and retry: admins, and who asked for it with the right to download."""
    if principal.may(Action.DECIDE_REQUESTS):
        return True
    return principal.may(Action.DOWNLOAD_MODELS) and download.people.filter(pk=principal.user.pk).exists()


def pause(*, principal: Principal | None, download: Download) -> None:
    """Stop a download for now and keep what is there. Raises ``PermissionDenied``, ``Conflict`` if it does not wait or run."""
    _require_change(principal, download)
    _change(download, Status.PAUSED, (Status.QUEUED, Status.DOWNLOADING), "Only a download that waits or runs can be paused.")


def resume(*, principal: Principal | None, download: Download) -> None:
    """Go on with one that was paused or has failed. Raises ``PermissionDenied``, ``Conflict``."""
    _require_change(principal, download)
    try:
        _change(download, Status.QUEUED, (Status.PAUSED, Status.FAILED), "Only a download that is paused or has failed can go on.")
    except IntegrityError:
        raise Conflict("The same model is being downloaded already.") from None


def cancel(*, principal: Principal | None, download: Download) -> None:
    """End a download and delete what is there. One of several people who asked for it only leaves; a request is withdrawn.

    Raises ``PermissionDenied``, ``Conflict`` if it has ended.
    """
    own_request = principal is not None and download.status == Status.REQUESTED and download.requested_by_id == principal.user.pk
    if not own_request:
        _require_change(principal, download)
    if principal is not None and not principal.may(Action.DECIDE_REQUESTS):
        download.people.remove(principal.user)
        if download.people.exists():
            return
    ends = (*Download.UNFINISHED, Status.FAILED, Status.REQUESTED)
    _change(download, Status.CANCELLED, ends, "This download has ended.")
    forget_parts(download.pk)


def approve(*, principal: Principal | None, download: Download, always: bool = False) -> None:
    """Grant a request; ``always`` also gives its author the right to download. Raises ``PermissionDenied``, ``Conflict``."""
    if principal:
        require(principal, Action.DECIDE_REQUESTS)
    placement.require_free_space(download.total_bytes + reserved_bytes())
    with transaction.atomic():
        _change(download, Status.QUEUED, (Status.REQUESTED,), "This request has been decided already.", decided_by=_user(principal))
        if always and download.requested_by:
            download.requested_by.may_download = True
            download.requested_by.save(update_fields=["may_download"])


def decline(*, principal: Principal | None, download: Download, reason: str) -> None:
    """Refuse a request, with words for who asked. Raises ``PermissionDenied``, ``InvalidRequest`` without words, ``Conflict``."""
    if principal:
        require(principal, Action.DECIDE_REQUESTS)
    words = " ".join(reason.replace("\x00", "").split())
    if not words or len(words) > 500:
        raise InvalidRequest("Say why, in at most 500 characters: whoever asked will read it.", param="reason")
    _change(
        download, Status.DECLINED, (Status.REQUESTED,), "This request has been decided already.", decided_by=_user(principal), reason=words
    )


def _user(principal: Principal | None) -> User | None:
    return principal.user if principal else None


def _require_change(principal: Principal | None, download: Download) -> None:
    if principal is not None and not may_change(principal, download):
        raise PermissionDenied("This is somebody else's download. Who asked for it, or an admin, may change it.")


def _change(download: Download, status: str, allowed: tuple[str, ...], refusal: str, **fields: object) -> None:
    with transaction.atomic():
        fresh = Download.objects.select_for_update().filter(pk=download.pk, status__in=allowed).first()
        if fresh is None:
            raise Conflict(refusal)
        _move(fresh, status, **fields)
    download.refresh_from_db()


def _move(download: Download, status: str, **fields: object) -> None:
    """Write a new status: nobody has it in hand from now on."""
    ended = status in {Status.CANCELLED, Status.DECLINED}
    fields |= {
        "status": status,
        "incarnation": None,
        "lease_until": None,
        "bytes_per_second": 0.0,
        "note": "",
        "error_code": "",
        "error_message": "",
        "finished_at": timezone.now() if ended else None,
    }
    Download.objects.filter(pk=download.pk).update(**fields)
    if status == Status.QUEUED:
        transaction.on_commit(send_waiting)


# --- between here and the io worker -----------------------------------------------------------------------------------


def send_waiting() -> None:
    """Tell the io workers of what waits. Claiming decides who takes it and how many run; the periodic look repeats this."""
    from lmweb.celery import app

    for pk in Download.objects.filter(status=Status.QUEUED).order_by("created_at").values_list("pk", flat=True)[:20]:
        try:
            app.send_task(RUN_TASK, args=(pk,), queue="io", ignore_result=True, expires=30)
        except (OperationalError, RedisError, OSError) as error:
            logger.warning("could not send download %s: %s", pk, error)
            return


def forget_parts(download_id: str) -> None:
    """Delete what a download has brought so far."""
    placement.remove_folder(parts_folder(download_id))


def parts_folder(download_id: str) -> Path:
    """Return where a download keeps what it has so far; the id is one that the server made."""
    return placement.hidden_folder("downloads") / download_id


def files_of(download: Download) -> list[RemoteFile]:
    """Return the files of a download."""
    return convert(download.files, list[RemoteFile])
