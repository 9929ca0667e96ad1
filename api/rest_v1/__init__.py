"""LM Studio's native REST API, version 1, under ``/api/v1/``."""
