"""The routes of REST v1: models. They parse, call a service and write; what is allowed is decided in ``lmweb.access``."""

from __future__ import annotations

from ninja import Router

router = Router()
