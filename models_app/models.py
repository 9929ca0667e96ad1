"""Models on disk, models in memory, and generations. PostgreSQL is the truth; runners and streams can be lost at any time."""

from __future__ import annotations

import secrets
import uuid
from pathlib import Path
from typing import Any, ClassVar

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q

from lmweb.access import Action, Principal
from lmweb.db import Lookup, Memory, Version, field_names, mark_of
from lmweb.decoding import convert
from lmweb.models import ApiToken, User
from workers.models import WorkerNode
from workers.schemas import ToolCall


class InstalledModelQuerySet(models.QuerySet["InstalledModel"]):
    """Queries over models on disk."""

    def visible_to(self, principal: Principal) -> InstalledModelQuerySet:
        """Return the models that the principal may know of."""
        return self if self._are_visible_to(principal) else self.none()

    @classmethod
    def named(cls, principal: Principal, key: str) -> InstalledModel | None:
        """Return ``visible_to(principal).filter(key=key).first()``, sooner; with the few fields that a request needs.

        For a remembered principal the model may be a remembered one too (``unread``).
        """
        if not cls._are_visible_to(principal):
            return None
        return (_recent.get(key) if principal.unread else None) or _read(key)

    @staticmethod
    def _are_visible_to(principal: Principal) -> bool:
        return principal.may(Action.READ_MODELS) or principal.may(Action.GENERATE)


class InstalledModel(models.Model):
    """A model on disk. Field names follow LM Studio's REST v1; ``key`` is what API clients send as ``model``."""

    class Type(models.TextChoices):
        LLM = "llm", "LLM"
        EMBEDDING = "embedding", "Embedding"

    #: Not empty if this was remembered: what is done with it has to be proved (``lmweb.db.insert``).
    unread: tuple[Version, ...] = ()

    key = models.CharField(max_length=512, unique=True)
    type = models.CharField(max_length=16, choices=Type.choices, default=Type.LLM)
    publisher = models.CharField(max_length=255)
    display_name = models.CharField(max_length=255)
    description = models.TextField(blank=True)
    architecture = models.CharField(max_length=64)
    quantization = models.CharField(max_length=32, blank=True)
    bits_per_weight = models.FloatField(null=True)
    params_string = models.CharField(max_length=32, blank=True)
    size_bytes = models.BigIntegerField()
    max_context_length = models.PositiveIntegerField()
    format = models.CharField(max_length=16, default="gguf")
    capabilities = models.JSONField(default=dict)
    path = models.CharField(max_length=1024, unique=True, help_text="Relative to the models directory: publisher/name/file.gguf.")
    chat_template = models.TextField(blank=True, help_text="The file's own.")
    chat_template_override = models.TextField(blank=True, help_text="Used instead of the file's; services.set_chat_template writes it.")
    load_defaults = models.JSONField(default=dict, blank=True, help_text="Overrides of workers.schemas.LoadConfig.")
    inference_defaults = models.JSONField(default=dict, blank=True, help_text="Of models_app.defaults.InferenceDefaults.")
    base = models.ForeignKey(
        "self",
        null=True,
        on_delete=models.CASCADE,
        related_name="virtual_models",
        help_text="A virtual model runs on the weights of this one.",
    )
    verification = models.JSONField(default=dict, blank=True, help_text="How the last check of the files went: models_app.verify.")
    custom_fields = models.JSONField(default=list, blank=True, help_text="Of models_app.virtual.CustomField.")
    imported_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    objects: ClassVar[InstalledModelQuerySet] = InstalledModelQuerySet.as_manager()  # type: ignore[assignment]

    class Meta:
        ordering: ClassVar[list[str]] = ["key"]

    def __str__(self) -> str:
        return self.key

    @property
    def file(self) -> Path:
        """Return the absolute path of the (first) weights file."""
        return Path(settings.MODELS_DIR) / (self.base.path if self.base else self.path)

    @property
    def weights_bytes(self) -> int:
        """Return the size of its weights; ``size_bytes`` is what it takes on the disk itself, nothing if it is virtual."""
        return (self.base or self).size_bytes


class ModelFile(models.Model):
    """One file of a model on disk. A projector may belong to several quantizations of the same model."""

    class Role(models.TextChoices):
        WEIGHTS = "weights", "Weights"
        PROJECTOR = "projector", "Vision projector"
        OTHER = "other", "Configuration and tokenizer"

    model = models.ForeignKey(InstalledModel, on_delete=models.CASCADE, related_name="files")
    path = models.CharField(max_length=1024, help_text="Relative to the models directory.")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.WEIGHTS)
    size_bytes = models.BigIntegerField()
    sha256 = models.CharField(max_length=64, blank=True, help_text="As the source announced and the download proved; empty: not known.")

    class Meta:
        ordering: ClassVar[list[str]] = ["pk"]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["model", "path"], name="one_row_per_file_of_a_model"),
        ]
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["path"], name="model_file_by_path")]

    def __str__(self) -> str:
        return self.path

    @property
    def file(self) -> Path:
        """Return the absolute path."""
        return Path(settings.MODELS_DIR) / self.path


class ModelInstance(models.Model):
    """A model in the memory of one node; the row lives exactly as long as its runner process (or its attempt to load).

    loading -> ready -> unloading -> (row deleted);  loading -> failed
    """

    class Status(models.TextChoices):
        LOADING = "loading", "Loading"
        READY = "ready", "Ready"
        UNLOADING = "unloading", "Unloading"
        FAILED = "failed", "Failed"

    identifier = models.CharField(max_length=512, help_text="What requests may name instead of the model's key.")
    model = models.ForeignKey(InstalledModel, on_delete=models.CASCADE, related_name="instances")
    node = models.ForeignKey(WorkerNode, on_delete=models.CASCADE, related_name="instances")
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.LOADING)
    progress = models.FloatField(default=0.0)
    error = models.TextField(blank=True)
    error_code = models.CharField(max_length=64, blank=True, help_text="The ``code`` of that error: what programs tell it by.")
    error_details = models.JSONField(default=dict, blank=True, help_text="Its ``details``, such as the bytes that are missing.")
    config = models.JSONField(default=dict, help_text="The LoadConfig in force, with the sizes that the engine reported.")
    memory_bytes = models.BigIntegerField(null=True)
    load_seconds = models.FloatField(null=True)
    jit = models.BooleanField(default=False, help_text="Loaded by a request, not by a person: makes room for others.")
    ttl_seconds = models.PositiveIntegerField(null=True, help_text="It leaves memory after so long without use; null: never.")
    pinned = models.BooleanField(default=False, help_text="It stays until a person unloads it.")
    replaces = ArrayField(models.BigIntegerField(), default=list, help_text="The instances that are to leave memory for it.")
    note = models.CharField(max_length=300, blank=True, help_text="What its load waits for.")
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["node", "identifier"], name="one_identifier_per_node"),
        ]

    def __str__(self) -> str:
        return f"{self.identifier} on {self.node_id}"


class MemoryMeasurement(models.Model):
    """What a load of a model really took, by the parts of its configuration that matter. Corrects the next estimate."""

    model = models.ForeignKey(InstalledModel, on_delete=models.CASCADE, related_name="measurements")
    context_length = models.PositiveIntegerField()
    parallel = models.PositiveSmallIntegerField()
    gpu_layers = models.IntegerField()
    kv_cache = models.CharField(max_length=16, default="f16/f16", help_text="Precisions of keys and values.")
    memory_bytes = models.BigIntegerField()
    measured_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["model", "context_length", "parallel", "gpu_layers", "kv_cache"], name="one_measurement_per_configuration"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.model_id} at {self.context_length} x {self.parallel}: {self.memory_bytes}"


_REQUEST_FIELDS = field_names(
    InstalledModel, {"id", "key", "publisher", "type", "format", "created_at", "inference_defaults", "custom_fields", "base_id"}
)
_by_key = Lookup(lambda key: InstalledModel.objects.filter(key=key).values_list(mark_of(InstalledModel), *_REQUEST_FIELDS))
_recent: Memory[InstalledModel] = Memory()


def _read(key: str) -> InstalledModel | None:
    """Return the model of this key, and remember it."""
    row = _by_key(key)
    if row is None:
        return None
    mark, *values = row
    remembered = InstalledModel.from_db("default", _REQUEST_FIELDS, values)
    remembered.unread = (Version.of(remembered, mark),)
    _recent[key] = remembered
    return InstalledModel.from_db("default", _REQUEST_FIELDS, values)


class GenerationQuerySet(models.QuerySet["Generation"]):
    """Queries over generations."""

    def visible_to(self, principal: Principal) -> GenerationQuerySet:
        """Return the generations of this person; a token sees those that it started itself."""
        mine = self.filter(user=principal.user)
        return mine.filter(token=principal.token) if principal.token else mine

    def unfinished(self) -> GenerationQuerySet:
        """Return those that still wait or run."""
        return self.filter(status__in=[Generation.Status.QUEUED, Generation.Status.RUNNING])


class Generation(models.Model):
    """One request to a model, from every door.

    queued -> running -> completed | cancelled | failed
    running -> queued            (its worker died; it continues from the last stored token, at most ``MAX_RESUMES`` times)

    ``content``, ``reasoning``, ``tool_calls``, ``output_tokens`` and ``seq`` are saved together about once a second while it
    runs, so that they always describe the same moment; entries of the stream after ``seq`` are newer than the row.
    """

    class Status(models.TextChoices):
        QUEUED = "queued", "Queued"
        RUNNING = "running", "Running"
        COMPLETED = "completed", "Completed"
        CANCELLED = "cancelled", "Cancelled"
        FAILED = "failed", "Failed"

    TERMINAL: ClassVar[frozenset[str]] = frozenset({Status.COMPLETED, Status.CANCELLED, Status.FAILED})
    MAX_RESUMES: ClassVar[int] = 2

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="generations")
    token = models.ForeignKey(ApiToken, null=True, on_delete=models.SET_NULL, related_name="+")
    source = models.CharField(max_length=32, help_text="Which door: chat, openai, ...")
    model = models.ForeignKey(InstalledModel, null=True, on_delete=models.SET_NULL, related_name="+")
    model_key = models.CharField(max_length=512)
    request = models.JSONField(help_text="workers.schemas.GenerationRequest")
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.QUEUED)
    cancel_requested = models.BooleanField(default=False)

    node = models.CharField(max_length=100, blank=True, help_text="The node that it was sent to or runs on.")
    incarnation = models.UUIDField(null=True)
    lease_until = models.DateTimeField(null=True)
    resumes = models.PositiveSmallIntegerField(default=0)

    seq = models.PositiveIntegerField(default=0)
    content = models.TextField(blank=True)
    reasoning = models.TextField(blank=True)
    tool_calls = models.JSONField(default=list, help_text="Of workers.schemas.ToolCall.")
    output_tokens = ArrayField(models.IntegerField(), default=list)
    stats = models.JSONField(default=dict)
    error_code = models.CharField(max_length=64, blank=True)
    error_message = models.TextField(blank=True)

    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    objects: ClassVar[GenerationQuerySet] = GenerationQuerySet.as_manager()  # type: ignore[assignment]

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["status", "lease_until"], name="generation_unfinished", condition=Q(status__in=["queued", "running"])),
            models.Index(fields=["user", "-created_at"], name="generation_by_user"),
        ]

    def __str__(self) -> str:
        return f"{self.id} {self.model_key} {self.status}"

    @property
    def is_finished(self) -> bool:
        """Whether nothing will be added any more."""
        return self.status in self.TERMINAL

    def calls(self) -> list[ToolCall]:
        """Return the calls of tools that the model made."""
        return convert(self.tool_calls, list[ToolCall])

    def state(self) -> dict[str, Any]:
        """Return what a viewer needs to show this generation as of ``seq``."""
        return {
            "id": str(self.id),
            "status": self.status,
            "seq": self.seq,
            "content": self.content,
            "reasoning": self.reasoning,
            "tool_calls": self.tool_calls,
            "stats": self.stats,
            "error": {"code": self.error_code, "message": self.error_message} if self.error_code else None,
        }


def new_job_id() -> str:
    """Return the name of a new download, as LM Studio's API shows it."""
    return f"job_{secrets.token_hex(8)}"


class DownloadQuerySet(models.QuerySet["Download"]):
    """Queries over downloads."""

    def visible_to(self, principal: Principal) -> DownloadQuerySet:
        """Return what the principal may know of: all downloads for who may know the models, of requests one's own; admins all."""
        if not principal.may(Action.READ_MODELS):
            return self.none()
        if principal.may(Action.DECIDE_REQUESTS):
            return self
        return self.exclude(~Q(requested_by=principal.user), status__in=[Download.Status.REQUESTED, Download.Status.DECLINED])

    def unfinished(self) -> DownloadQuerySet:
        """Return those that still wait, run or pause; requests are not among them."""
        return self.filter(status__in=Download.UNFINISHED)

    def running(self) -> DownloadQuerySet:
        """Return those that an io worker has in hand."""
        return self.filter(status__in=Download.RUNNING)


class Download(models.Model):
    """A model on its way from the Hub: one variant of a repository at one commit, with all its files.

    requested -> queued | declined
    queued -> downloading -> verifying -> completed
    downloading, verifying -> queued          (its worker died or was stopped; it goes on from the bytes that are on disk)
    queued, downloading -> paused -> queued
    downloading, verifying -> failed -> queued
    everything unfinished, failed -> cancelled

    Whoever pauses or cancels it changes the row at once; the worker sees within a second that it is not its own any more.
    """

    class Status(models.TextChoices):
        REQUESTED = "requested", "Requested"
        DECLINED = "declined", "Declined"
        QUEUED = "queued", "Waiting"
        DOWNLOADING = "downloading", "Downloading"
        VERIFYING = "verifying", "Verifying"
        PAUSED = "paused", "Paused"
        COMPLETED = "completed", "Completed"
        FAILED = "failed", "Failed"
        CANCELLED = "cancelled", "Cancelled"

    RUNNING: ClassVar[tuple[str, ...]] = (Status.DOWNLOADING, Status.VERIFYING)
    UNFINISHED: ClassVar[tuple[str, ...]] = (Status.QUEUED, *RUNNING, Status.PAUSED)

    id = models.CharField(primary_key=True, max_length=32, default=new_job_id, editable=False)
    repo = models.CharField(max_length=200, help_text="publisher/name on the Hub.")
    revision = models.CharField(max_length=40)
    label = models.CharField(max_length=120, help_text="The quantization.")
    format = models.CharField(max_length=16)
    files = models.JSONField(help_text="Of models_app.hub.RemoteFile, the weights first.")
    fingerprint = models.CharField(
        max_length=64, help_text="SHA-256 of what is downloaded: two rows with the same one are the same download."
    )
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.QUEUED)

    total_bytes = models.BigIntegerField()
    done_bytes = models.BigIntegerField(default=0, help_text="Of the present phase: on disk while downloading, read while verifying.")
    bytes_per_second = models.FloatField(default=0.0)
    fetched_bytes = models.BigIntegerField(default=0, help_text="Everything that came over the network, also what came twice.")
    note = models.CharField(max_length=300, blank=True, help_text="Why nothing moves at the moment.")
    error_code = models.CharField(max_length=64, blank=True)
    error_message = models.TextField(blank=True)

    requested_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="downloads")
    people = models.ManyToManyField(User, related_name="joined_downloads", help_text="Everybody who asked for it.")
    decided_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    reason = models.CharField(max_length=500, blank=True, help_text="Why a request was declined, in the words of who did.")
    model = models.ForeignKey(InstalledModel, null=True, on_delete=models.SET_NULL, related_name="+")

    node = models.CharField(max_length=100, blank=True)
    incarnation = models.UUIDField(null=True)
    lease_until = models.DateTimeField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    objects: ClassVar[DownloadQuerySet] = DownloadQuerySet.as_manager()  # type: ignore[assignment]

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["fingerprint"],
                name="one_download_of_the_same",
                condition=Q(status__in=["requested", "queued", "downloading", "verifying", "paused"]),
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [models.Index(fields=["status", "-created_at"], name="download_by_status")]

    def __str__(self) -> str:
        return f"{self.id} {self.repo} {self.label} {self.status}"

    @property
    def is_unfinished(self) -> bool:
        """Whether it still waits, runs or pauses."""
        return self.status in self.UNFINISHED

    @property
    def seconds_left(self) -> float | None:
        """Return the time until all bytes are there at the present speed; None if nothing moves."""
        if self.status not in self.RUNNING or self.bytes_per_second < 1:
            return None
        return max(0, self.total_bytes - self.done_bytes) / self.bytes_per_second
