"""The chat page."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render


def chat_page(request: HttpRequest) -> HttpResponse:
    """Show the chat page."""
    return render(request, "chat/page.html")
