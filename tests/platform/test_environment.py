"""The test environment itself: real services, reachable through the same discovery as any command's."""

from __future__ import annotations

import pytest
import redis
from django.conf import settings
from django.db import connection


@pytest.mark.django_db
def test_database_is_postgresql_with_vectors(admin):
    with connection.cursor() as cursor:
        cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
        cursor.execute("SELECT '[1,2]'::vector <-> '[1,4]'::vector, current_setting('server_version_num')::int")
        distance, version = cursor.fetchone()
    assert distance == 2.0
    assert version >= 180000
    assert admin.is_admin


def test_valkey_answers():
    client = redis.Redis.from_url(settings.REDIS_URL)
    assert client.ping()
    client.close()
