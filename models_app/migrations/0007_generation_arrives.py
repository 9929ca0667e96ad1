"""A row that waits for a node wakes that node's worker, in the same transaction: there is no message to lose, or to pay for."""

from __future__ import annotations

from typing import ClassVar

from django.db import migrations

CREATE = """
CREATE FUNCTION models_app_generation_arrives() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('gpu_' || md5(NEW.node), NEW.id::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER models_app_generation_arrives AFTER INSERT OR UPDATE OF status, node, lease_until ON models_app_generation
FOR EACH ROW WHEN (NEW.status = 'queued' AND NEW.node <> '') EXECUTE FUNCTION models_app_generation_arrives();
"""
DROP = """
DROP TRIGGER models_app_generation_arrives ON models_app_generation;
DROP FUNCTION models_app_generation_arrives();
"""


class Migration(migrations.Migration):
    dependencies: ClassVar = [("models_app", "0006_downloads")]

    operations: ClassVar = [migrations.RunSQL(CREATE, DROP)]
