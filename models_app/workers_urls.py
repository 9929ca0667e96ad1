"""Routes of the Workers and Runtimes pages."""

from __future__ import annotations

from django.urls import path

from models_app import workers_page

urlpatterns = [
    path("", workers_page.workers, name="workers"),
    path("list", workers_page.node_list, name="worker-list"),
    path("runtimes", workers_page.runtimes, name="runtimes"),
    path("tokens", workers_page.create_token, name="join-token-create"),
    path("tokens/<uuid:join_token_id>/revoke", workers_page.revoke_token, name="join-token-revoke"),
    path("refusals/<str:name>/dismiss", workers_page.dismiss, name="join-refusal-dismiss"),
    path("nodes/<str:name>/cordon", workers_page.cordon, name="node-cordon"),
    path("nodes/<str:name>/uncordon", workers_page.uncordon, name="node-uncordon"),
    path("nodes/<str:name>/drain", workers_page.drain, name="node-drain"),
    path("nodes/<str:name>/remove", workers_page.remove, name="node-remove"),
]
