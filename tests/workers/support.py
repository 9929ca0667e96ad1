"""A host inside the test process: real runners, real Redis, real rows; only Celery's delivery is left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.conf import settings

from lmweb.access import Principal
from lmweb.models import User
from models_app.models import Generation, InstalledModel
from models_app.store import DjangoStore
from workers import stream
from workers.events import AnyEvent, ChatEnd, MessageDelta, decode_events
from workers.host import Host
from workers.policy import Policy
from workers.schemas import ChatMessage, GenerationRequest, SamplingParams, request_to_builtins
from workers.tasks import complete_config

GREEDY = SamplingParams(temperature=0.0, repeat_penalty=1.0)
#: Of an answer that is there until somebody stops it, however slow the machine is.
ENDLESS: dict[str, Any] = {
    "sampling": SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=100_000, ignore_eos=True),
    "context_overflow": "rollingWindow",
}


def wait_for(condition: Callable[[], object], *, seconds: float = 20.0, every: float = 0.02) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(every)


def make_host(logs: Path, policy: Policy | None = None, *, store: DjangoStore | None = None) -> Host:
    """Return a host that is not started yet."""
    store = store or DjangoStore("test-node", engines=[])
    return Host(store=store, redis_url=settings.REDIS_URL, logs=logs, step_log=True, complete_config=complete_config, policy=policy)


class Bench:
    """What a host test needs: models, generations, and what viewers would see of them."""

    def __init__(self, host: Host, user: User) -> None:
        self.host = host
        self.principal = Principal(user)
        self.redis = stream.connect(settings.REDIS_URL)

    def install(self, file: Path, key: str = "test/model", **fields: object) -> InstalledModel:
        """Make the row of a model file that lies anywhere."""
        values = {
            "publisher": "test",
            "display_name": key,
            "architecture": "qwen3",
            "size_bytes": file.stat().st_size,
            "max_context_length": 2048,
        }
        return InstalledModel.objects.create(key=key, path=str(file), **{**values, **fields})

    def create(
        self,
        model: InstalledModel,
        text: str,
        *,
        sampling: SamplingParams = GREEDY,
        messages: list[ChatMessage] | None = None,
        node: str = "test-node",
        **fields: Any,
    ) -> Generation:
        """Make a queued generation for a node; further fields are those of ``GenerationRequest``."""
        messages = messages or [ChatMessage(role="user", content=text)]
        request = GenerationRequest(model=model.key, messages=messages, sampling=sampling, **fields)
        return Generation.objects.create(
            user=self.principal.user,
            source="test",
            model=model,
            model_key=model.key,
            request=request_to_builtins(request),
            node=node,
        )

    def run(self, model: InstalledModel, text: str, *, sampling: SamplingParams = GREEDY) -> Generation:
        """Run a generation to its end and return its row."""
        generation = self.create(model, text, sampling=sampling)
        self.host.generate(str(generation.pk))
        return self.finished(generation)

    def finished(self, generation: Generation, *, seconds: float = 30.0) -> Generation:
        """Wait for the end of a generation, in the row and in the stream."""
        wait_for(lambda: self.events(generation) and isinstance(self.events(generation)[-1], ChatEnd), seconds=seconds)
        generation.refresh_from_db()
        return generation

    def entries(self, generation: Generation) -> list[stream.Entry]:
        """Return everything in the stream."""
        return stream.read_after(self.redis, str(generation.pk), 0)

    def events(self, generation: Generation) -> list[AnyEvent]:
        """Return all events in the stream."""
        return [event for entry in self.entries(generation) for event in decode_events(entry.events)]

    def text(self, generation: Generation) -> str:
        """Return the answer as a viewer assembles it."""
        return "".join(event.content for event in self.events(generation) if isinstance(event, MessageDelta))
