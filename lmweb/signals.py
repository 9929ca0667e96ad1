"""Whatever changes what a person may do reaches their open sockets, whichever door it came through."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.signals import user_logged_out
from django.db.models.signals import post_save
from django.dispatch import receiver

from lmweb.models import User
from lmweb.notices import notify_after_commit, user_group

ACCESS_CHANGED = {"type": "access.changed"}


@receiver(post_save, sender=User)
def user_saved(instance: User, created: bool, update_fields: frozenset[str] | None, **_: Any) -> None:
    """Close the sockets of a person whose role, activity or password may have changed; those that still may connect again."""
    if not created and update_fields != frozenset({"last_login"}):
        notify_after_commit(user_group(instance.pk), ACCESS_CHANGED)


@receiver(user_logged_out)
def user_signed_out(user: User | None, **_: Any) -> None:
    """Close the sockets of the session that ended; those of other browsers connect again."""
    if user is not None:
        notify_after_commit(user_group(user.pk), ACCESS_CHANGED)
