"""Routes of the chat page."""

from __future__ import annotations

from django.urls import path

from chat import views

urlpatterns = [
    path("", views.chat_page, name="chat"),
    path("chat/<uuid:chat_id>", views.chat_page, name="chat"),
    path("chat/<uuid:chat_id>/messages", views.older_messages, name="chat-messages"),
    path("chat/<uuid:chat_id>/rename", views.rename, name="chat-rename"),
    path("chat/<uuid:chat_id>/delete", views.delete, name="chat-delete"),
    path("chat/<uuid:chat_id>/settings", views.settings, name="chat-settings"),
    path("chats", views.chat_list, name="chat-list"),
    path("chat/models", views.models, name="chat-models"),
    path("chat/models/load", views.load, name="chat-model-load"),
    path("chat/models/eject", views.eject, name="chat-model-eject"),
]
