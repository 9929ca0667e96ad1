"""Routes of the Discover page."""

from __future__ import annotations

from django.urls import path

from models_app import discover

urlpatterns = [
    path("", discover.discover, name="discover"),
    path("results", discover.results, name="discover-results"),
    path("model", discover.model, name="discover-model"),
    path("readme", discover.readme, name="discover-readme"),
    path("download", discover.download, name="discover-download"),
    path("staff-picks", discover.edit_catalog, name="discover-catalog"),
]
