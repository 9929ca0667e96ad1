"""Small lossy notices to browser tabs, through the channel layer. Whoever gets one reads the rows."""

from __future__ import annotations

import logging
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import transaction
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)


def user_group(user_id: int) -> str:
    """Return the group of all sockets of this person."""
    return f"user_{user_id}"


def notify_after_commit(group: str, notice: dict[str, Any]) -> None:
    """Send a notice once the transaction is committed. A lost one costs freshness only, so failure is just logged."""
    transaction.on_commit(lambda: _send(group, notice))


def _send(group: str, notice: dict[str, Any]) -> None:
    try:
        async_to_sync(get_channel_layer().group_send)(group, notice)
    except (RedisError, OSError) as error:
        logger.warning("notice %s was not sent: %s", notice["type"], error)
