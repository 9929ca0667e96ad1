"""Every variable is documented, with the default it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from lmweb import env
from tests.live import REPOSITORY


def test_operations_lists_every_variable_with_default_and_meaning():
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? ?\| (.*) \|$", text, re.MULTILINE)
    documented = {name: env.Variable(name, default, meaning) for name, default, meaning in rows}
    assert documented == env.VARIABLES


def test_nothing_else_reads_the_environment_for_settings():
    allowed = {"lmweb/env.py", "lmweb/bootstrap.py", "lmweb/supervisor"}
    readers = []
    for package in ("lmweb", "workers", "models_app", "chat", "api"):
        for file in (REPOSITORY / package).rglob("*.py"):
            name = str(file.relative_to(REPOSITORY))
            if any(name.startswith(prefix) for prefix in allowed) or "/starter/" in name:
                continue
            if re.search(r"os\.environ\.get\(|os\.getenv\(|os\.environ\[[\"'](?:LMWEB|DATABASE|REDIS)", file.read_text()):
                readers.append(name)
    assert readers == []


def test_settings_can_be_read_where_nothing_runs(tmp_path):
    code = "import django; django.setup(); from django.conf import settings; print(settings.DATABASES['default']['PORT'])"
    environment = {"PATH": os.environ["PATH"], "LMWEB_DATA_DIR": str(tmp_path / "nowhere"), "DJANGO_SETTINGS_MODULE": "lmweb.settings"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.stdout.strip() == "1", done.stderr
    assert not (tmp_path / "nowhere").exists()
