"""Routes of the Developer page."""

from __future__ import annotations

from django.urls import path

from api import views

urlpatterns = [
    path("", views.developer, name="developer"),
    path("instances", views.instances, name="developer-instances"),
    path("snippets", views.snippets, name="developer-snippets"),
    path("tokens", views.create, name="token-create"),
    path("tokens/<uuid:token_id>/revoke", views.revoke, name="token-revoke"),
]
