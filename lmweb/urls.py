"""All HTTP routes, one include per application."""

from __future__ import annotations

from django.contrib.auth.views import LogoutView
from django.urls import URLPattern, URLResolver, include, path

from lmweb import views
from models_app.mirror import node_file

urlpatterns: list[URLPattern | URLResolver] = [
    path("", include("chat.urls")),
    path("models/", include("models_app.urls")),
    path("discover/", include("models_app.discover_urls")),
    path("activity/", include("models_app.activity_urls")),
    path("workers/", include("models_app.workers_urls")),
    path("node-files/<int:file_id>", node_file, name="node-file"),
    path("developer/", include("api.pages")),
    path("setup/<str:secret>", views.set_up, name="set-up"),
    path("sign-in", views.SignInView.as_view(), name="sign-in"),
    path("sign-out", LogoutView.as_view(), name="sign-out"),
    path("password", views.PasswordView.as_view(), name="password"),
]

handler400 = "lmweb.views.bad_request"
handler403 = "lmweb.views.forbidden"
handler404 = "lmweb.views.not_found"
handler500 = "lmweb.views.server_error"
