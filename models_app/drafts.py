"""Draft models: which of the installed models may guess ahead for which, by their vocabularies.

What is compared here are the headers of the files; the engine compares the loaded vocabularies again, by the same rules.
"""

from __future__ import annotations

from pathlib import Path

from lmweb.access import Principal
from lmweb.errors import InvalidModelFile, InvalidRequest, ModelNotFound
from models_app import gguf
from models_app.file_memory import remembered
from models_app.memory import complete, read_shape
from models_app.models import InstalledModel
from workers.engines import registry
from workers.engines.card import Feature
from workers.memory import MemoryEstimate, estimate
from workers.schemas import LoadConfig
from workers.store import DraftFile

#: How a draft model is loaded beside its model (``workers.engines.llama_draft``).
DRAFT_CONFIG = LoadConfig(parallel=4, eval_batch_size=128)


def compatible_drafts(principal: Principal, model: InstalledModel) -> list[InstalledModel]:
    """Return the smaller language models with this model's vocabulary that the principal may see, smallest first."""
    visible = InstalledModel.objects.visible_to(principal).filter(type=InstalledModel.Type.LLM, size_bytes__lt=model.size_bytes)
    return [draft for draft in visible.order_by("size_bytes", "key") if not _mismatch(model, draft)]


def check_draft(principal: Principal | None, model: InstalledModel, key: str) -> InstalledModel:
    """Return the draft model of this key. ``principal`` None is the administrator at the command line.

    Raises ``ModelNotFound``, or ``InvalidRequest`` with the reason if it cannot guess for ``model``.
    """
    visible = InstalledModel.objects.visible_to(principal) if principal else InstalledModel.objects.all()
    draft = None if "\x00" in key else visible.filter(key__iexact=key).first()
    if draft is None:
        raise ModelNotFound(f"There is no model '{key[:200]}' to be the draft model.", param="draft_model")
    reason = "it is the model itself" if draft.pk == model.pk else _mismatch(model, draft)
    if reason:
        raise InvalidRequest(f"'{draft.key}' cannot be the draft model of {model.key}: {reason}.", param="draft_model")
    return draft


def draft_file(key: str | None) -> DraftFile | None:
    """Return where a draft model lies and what it takes; None for none, or for one that was deleted meanwhile."""
    draft = InstalledModel.objects.filter(key=key).first() if key else None
    if draft is None:
        return None
    try:
        needed = estimate_draft(draft).needed_bytes
    except InvalidModelFile:
        return None
    return DraftFile(draft.key, str(draft.file), needed)


def estimate_draft(draft: InstalledModel) -> MemoryEstimate:
    """Return what a draft model takes. Raises ``InvalidModelFile`` if its file is gone or broken."""
    shape = read_shape(draft.file)
    return estimate(shape, complete(DRAFT_CONFIG, shape.trained_context))


def _mismatch(model: InstalledModel, draft: InstalledModel) -> str:
    """Return why the draft's tokens are not the model's, empty if they are."""
    if draft.type != InstalledModel.Type.LLM or model.type != InstalledModel.Type.LLM:
        return "an embedding model writes no text"
    for each in (model, draft):
        if reason := registry.lack(each.format, Feature.DRAFT_MODEL):
            return reason[:1].lower() + reason[1:].rstrip(".")
    try:
        mine, theirs = _vocabulary(model.file), _vocabulary(draft.file)
    except InvalidModelFile as error:
        return error.message.rstrip(".")
    return mine.mismatch(theirs)


@remembered(files=256)
def _vocabulary(file: Path) -> gguf.Vocabulary:
    return gguf.read_vocabulary(file)
