"""Routes of the Activity page."""

from __future__ import annotations

from django.urls import path

from models_app import activity

urlpatterns = [
    path("", activity.activity, name="activity"),
    path("list", activity.activity_list, name="activity-list"),
    path("badge", activity.badge, name="activity-badge"),
    path("<str:download_id>/pause", activity.pause, name="download-pause"),
    path("<str:download_id>/resume", activity.resume, name="download-resume"),
    path("<str:download_id>/cancel", activity.cancel, name="download-cancel"),
    path("<str:download_id>/approve", activity.approve, name="download-approve"),
    path("<str:download_id>/decline", activity.decline, name="download-decline"),
]
