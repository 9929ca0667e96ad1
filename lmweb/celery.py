"""The Celery application. Queues: ``gpu.<node>`` for generations and loads on one machine, ``io`` for everything else.

Messages carry ids only, as JSON; the rows are the truth, so a message that Redis loses costs a delay, never work
(``models_app.reaper`` sends it again). Early acknowledgement is deliberate for the same reason.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.beat import EmbeddedService
from celery.signals import worker_ready
from kombu.connection import Connection

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")

import django  # needs the variable above
from django.apps import apps
from django.conf import settings

BROKER_RETRY = {"interval_start": 0.2, "interval_step": 0.2, "interval_max": 1.0}

if not apps.ready:  # a worker starts here
    django.setup()


class PatientConnection(Connection):
    """Looks for a lost broker several times a second: Celery's own steps of 2, 4, 6... seconds outlast any restart of ours."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Connection:
        """Wait for the broker, with short steps."""
        super().ensure_connection(*args, **(BROKER_RETRY | kwargs))  # type: ignore[no-untyped-call]
        return self


class Amqp(AMQP):
    """Celery's messaging over such connections."""

    Connection = PatientConnection


# Without Celery's own fixup for Django: it closes the database connection after every task, and a new one costs 10 ms.
app = Celery("lmweb", fixups=[], amqp=Amqp)
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
        "reap": {"task": "workers.tasks.reap", "schedule": 2.0, "options": {"expires": 2.0}},
        "tend-downloads": {"task": "models_app.tasks.tend_downloads", "schedule": 2.0, "options": {"expires": 2.0}},
        "forget-deleted-chats": {"task": "chat.tasks.forget_deleted", "schedule": 60.0, "options": {"expires": 60.0}},
    },
    imports=("workers.tasks", "models_app.tasks", "chat.tasks"),
)


@worker_ready.connect
def start_beat(sender: Any, **_: Any) -> None:
    """Run the periodic tasks in a thread of the io worker. Celery's own ``-B`` forks a process, which outlives a killed worker."""
    if sender.hostname.startswith("io@"):
        EmbeddedService(app, thread=True, scheduler_cls="celery.beat:Scheduler").start()
