"""The Celery application. Queues: ``gpu.<node>`` for generations and loads on one machine, ``io`` for everything else.

Messages carry ids only, as JSON; the rows are the truth, so a message that Redis loses costs a delay, never work
(``models_app.reaper`` sends it again). Early acknowledgement is deliberate for the same reason.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.beat import EmbeddedService
from celery.signals import worker_ready

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")

import django  # needs the variable above
from django.apps import apps
from django.conf import settings

if not apps.ready:  # a worker starts here
    django.setup()

# Without Celery's own fixup for Django: it closes the database connection after every task, and a new one costs 10 ms.
app = Celery("lmweb", fixups=[])
app.conf.update(
    broker_url=settings.REDIS_URL.replace("unix://", "redis+socket://", 1),  # kombu's name for a unix socket
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"socket_timeout": None, "socket_connect_timeout": 5, "health_check_interval": 0},
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_default_queue="io",
    task_acks_late=False,
    task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1},
    worker_prefetch_multiplier=0,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    worker_enable_remote_control=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    timezone="UTC",
    beat_schedule={
        "reap": {"task": "workers.tasks.reap", "schedule": 3.0, "options": {"expires": 3.0}},
        "forget-deleted-chats": {"task": "chat.tasks.forget_deleted", "schedule": 60.0, "options": {"expires": 60.0}},
    },
    imports=("workers.tasks", "chat.tasks"),
)


@worker_ready.connect
def start_beat(sender: Any, **_: Any) -> None:
    """Run the periodic tasks in a thread of the io worker. Celery's own ``-B`` forks a process, which outlives a killed worker."""
    if sender.hostname.startswith("io@"):
        EmbeddedService(app, thread=True, scheduler_cls="celery.beat:Scheduler").start()
