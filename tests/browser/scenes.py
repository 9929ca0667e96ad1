"""Rows and stream entries behind the scenes of ``screenshots.py``; runs inside an installation (``Live.python``)."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

from django.utils import timezone

from chat.models import Chat, Message
from lmweb.models import User
from models_app.models import Generation, InstalledModel, ModelInstance
from tests.chat import worker
from workers.events import (
    AnyEvent,
    ChatStart,
    ModelLoadProgress,
    ModelLoadStart,
    PromptProcessingProgress,
    PromptProcessingStart,
    QueueUpdate,
)
from workers.models import JoinRefusal, NodeToken, WorkerNode

MARKDOWN = """# Batching, in short

**Continuous batching** lets several requests share one model. Each *step* of the engine computes one token for every sequence that is being written, and `llama_decode` is called once.

1. Take new requests from the inbox
2. Prefill a chunk of the oldest prompt
   - at most 512 tokens
   - less while somebody decodes
3. Sample, detokenise, send

> The engine does admission, not the thread pool.

```python
def step(self) -> list[Output]:
    \"\"\"One batched step: decode first, then prompt chunks.\"\"\"
    batch = [sequence.next_token for sequence in self.running]
    for sequence in self.waiting:
        batch += sequence.take(self.budget_ms / self.ms_per_token)  # the share that fits into the time that is left for it
    return self.engine.decode(batch)
```

| Streams | Tokens/s each | Total |
|---|---:|---:|
| 1 | 42.3 | 42.3 |
| 8 | 22.8 | 182.4 |

- [x] parsed
- [ ] measured

See [the documentation](https://example.org/batching) and ![a chart](https://example.org/chart.png).
"""
ARABIC = "ما هو التكميم؟ اشرح لي باختصار من فضلك، مع مثال على ملف GGUF."
HEBREW = "הסבר קצר: **quantization** שומר את המשקולות בפחות ביטים.\n\n- קטן יותר\n- מהיר יותר"
REASONING = "The person asks how batching works. " * 12
STATS = {
    "total_output_tokens": 289,
    "tokens_per_second": 42.31,
    "time_to_first_token_seconds": 0.314,
    "reasoning_time_seconds": 12.3,
    "stop_reason": "eosFound",
}
LONG_NAME = "Qwen3-Coder-480B-A35B-Instruct-Abliterated-v2-i1-Uncensored-Longer-Name-Than-Anyone-Wants-GGUF"


def models() -> None:
    """Add models that exist on paper only."""
    for name, params, quantization, size, context in (
        ("Llama 3.2 3B Instruct", "3B", "Q4_K_M", 2_019_377_696, 131_072),
        ("Mistral Small 3.2 24B", "24B", "Q4_K_M", 14_333_908_832, 131_072),
        (LONG_NAME, "480B", "IQ2_XXS", 129_000_000_000, 262_144),
    ):
        key = name.lower().replace(" ", "-")
        InstalledModel.objects.get_or_create(
            key=key,
            defaults={
                "publisher": "community",
                "display_name": name,
                "architecture": "llama",
                "params_string": params,
                "quantization": quantization,
                "size_bytes": size,
                "max_context_length": context,
                "path": f"community/{key}/model.gguf",
            },
        )


def chat(user: User, question: str, answer: str, title: str = "", *, events: tuple[AnyEvent, ...] = (), **generation: Any) -> str:
    """Make a chat of one question and one answer in some state and return its id. Nobody works on it: its lease lasts a day."""
    values = {"status": "completed", "stats": STATS, "lease_until": timezone.now() + timedelta(days=1), "seq": 1} | generation
    row = Generation.objects.create(user=user, source="chat", model_key="lmweb/starter", request={"model": "x"}, content=answer, **values)
    made = Chat.objects.create(user=user, title=title or question[:60], model_key="lmweb/starter")
    asked = Message.objects.create(chat=made, role="user", content=question)
    Message.objects.create(chat=made, role="assistant", parent=asked, generation=row)
    if events:
        worker.add(row, 2, *events)
    return str(made.pk)


def build(name: str) -> dict[str, str]:
    """Make everything for one person and return the chat of each scene."""
    user = User.objects.get(username=name)
    models()
    for number in range(1, 300):
        made = Chat.objects.create(user=user, title=f"Chat number {number} about something")
        Chat.objects.filter(pk=made.pk).update(updated_at=timezone.now() - timedelta(hours=7 * number))
    start = ChatStart(model_instance_id="lmweb/starter")
    none: dict[str, Any] = {"stats": {}}
    return {
        "answer": chat(user, "Explain continuous batching with an example.", MARKDOWN, reasoning=REASONING),
        "streaming": chat(user, "Explain batching", MARKDOWN[:760], status="running", **none),
        "queued": chat(
            user,
            "What is lmweb?",
            "",
            status="queued",
            events=(QueueUpdate(position=2, reason="You have 2 answers running, as many as you may have at once.", eta_seconds=8.0),),
            **none,
        ),
        "loading": chat(
            user,
            "What is lmweb?",
            "",
            status="running",
            events=(
                start,
                ModelLoadStart(model_instance_id="lmweb/starter"),
                ModelLoadProgress(model_instance_id="lmweb/starter", progress=0.43),
            ),
            **none,
        ),
        "prompt": chat(
            user,
            "Summarise this: " + "a long document " * 60,
            "",
            status="running",
            events=(start, PromptProcessingStart(), PromptProcessingProgress(progress=0.62)),
            **none,
        ),
        "failed": chat(
            user,
            "Tell me a story",
            "Once upon a time there was a server that",
            status="failed",
            error_code="generation_interrupted",
            error_message="The model's process ended unexpectedly, three times in a row.",
        ),
        "stopped": chat(user, "Count to a thousand", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", status="cancelled"),
        "rtl": chat(user, ARABIC, HEBREW),
        "code": chat(
            user, "Write a long program", "```c\n" + "\n".join(f"int value_{i} = {i};" for i in range(500)) + "\n```\n\nThat is it."
        ),
    }


def nodes(name: str) -> None:
    """Make machines on paper, one in each state; their heartbeats are a day ahead, so that they stay alive."""
    user = User.objects.get(username=name)
    now = timezone.now()
    local = WorkerNode.objects.get(key_digest="")
    models()
    rows = list(InstalledModel.objects.filter(publisher="community"))
    about: dict[str, Any] = {"engines": local.engines, "version": local.version, "incarnation": uuid.uuid4(), "key_digest": "x"}
    gpu = {"cpu_cores": 32, "cpu_name": "AMD EPYC 7543 32-Core Processor", "system": "Linux x86_64", "gpu_names": ["NVIDIA L40S"] * 2}
    for number, (node, state, seconds, free) in enumerate(
        (
            ("rack-2-a", "active", -86_400, 61), ("rack-2-b", "cordoned", -86_400, 200), ("rack-2-c", "draining", -86_400, 150),
            ("rack-2-d", "draining", -86_400, 240), ("a-machine-with-a-rather-long-name.building-7.example.org", "active", 600, 0),
            ("laptop", "active", 86_400, 0),
        )
    ):  # fmt: skip
        row = WorkerNode.objects.create(
            name=node,
            state=state,
            heartbeat_at=now - timedelta(seconds=seconds),
            started_at=now if seconds == 86_400 else now - timedelta(hours=1),
            hardware={**gpu, "gpu_memory_bytes": 96 * 10**9},
            free_memory_bytes=free * 10**9,
            total_memory_bytes=256 * 10**9,
            free_disk_bytes=1_700 * 10**9,
            clock_offset_seconds=4.2 if number == 1 else 0.01,
            log_lines=[f"12:0{n}:00 INFO loading community/llama-{n}" for n in range(9)],
            **about,
        )
        for model in rows[: max(0, 3 - number)]:
            ModelInstance.objects.create(identifier=model.key, model=model, node=row, status="ready", memory_bytes=model.size_bytes)
        if number == 0:
            ModelInstance.objects.create(identifier="coming", model=rows[0], node=row, status="loading", progress=0.43, memory_bytes=None)
        for status in ("running", "running", "queued") if number in {0, 2} else ():
            Generation.objects.create(
                user=user,
                source="chat",
                model_key="x",
                request={"model": "x"},
                status=status,
                node=node,
                lease_until=now + timedelta(days=1),
            )
    Generation.objects.create(user=user, source="chat", model_key="x", request={"model": "x"}, lease_until=now + timedelta(days=1))
    reason = "The clock of this machine is 47.2 s ahead of the database's; at most 3 s are allowed. Set it by NTP and start again."
    JoinRefusal.objects.create(name="rack-3-a", reason=reason)
    NodeToken.issue(name="rack 1")
    NodeToken.objects.update(revoked_at=now)
