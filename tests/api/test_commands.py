"""``manage.py token`` and ``manage.py user``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.management import CommandError, call_command

if TYPE_CHECKING:
    from lmweb.models import User


def run(*arguments: str) -> str:
    out = io.StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def fails(*arguments: str) -> str:
    with pytest.raises(CommandError) as caught:
        run(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_token_is_printed_once_and_works(owner: User) -> None:
    from lmweb.access import authenticate_token
    from lmweb.models import ApiToken

    secret = run("token", "create", "--user", "owner", "--name", "my script").strip()
    assert secret.startswith("sk-lm-")
    assert authenticate_token(secret).user == owner
    stored = ApiToken.objects.get()
    assert secret not in {stored.digest, stored.hint}
    assert (stored.scopes, stored.expires_at) == (["inference", "models:read"], None)
    assert secret not in run("token", "list") + run("token", "list", "--json")
    assert "my script" in run("token", "list", "--user", "owner")


def test_scopes_expiry_and_revoking(owner: User) -> None:
    from lmweb.access import authenticate_token
    from lmweb.errors import NotAuthenticated

    made = json.loads(run("token", "create", "--user", "owner", "--name", "x", "--scope", "models:read", "--expires", "30d", "--json"))
    assert (made["scopes"], made["state"]) == (["models:read"], "active")
    assert made["expires_at"]
    assert json.loads(run("token", "revoke", made["id"], "--json"))["state"] == "revoked"
    with pytest.raises(NotAuthenticated, match="revoked"):
        authenticate_token(made["token"])
    assert json.loads(run("token", "list", "--json"))[0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user", "nobody", "--name", "x"), "no person named 'nobody'"),
        (("--user", "owner", "--name", " "), "name"),
        (("--user", "owner", "--name", "x" * 101), "100 characters"),
        (("--user", "owner", "--name", "x", "--scope", "root"), "no scope 'root'"),
        (("--user", "owner", "--name", "x", "--expires", "soon"), "no duration"),
        (("--user", "owner", "--name", "x", "--expires", "999999w"), "3650 days"),
    ],
)
def test_token_errors_are_one_line(owner: User, arguments: tuple[str, ...], message: str) -> None:
    from lmweb.models import ApiToken

    assert message in fails("token", "create", *arguments)
    assert not ApiToken.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("token_id", ["", "x", "00000000-0000-0000-0000-000000000000", "a\x00"])
def test_revoking_what_is_not_there(token_id: str) -> None:
    assert "no such token" in fails("token", "revoke", token_id)


@pytest.mark.django_db
def test_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmweb.models import User

    monkeypatch.setattr(sys, "stdin", io.StringIO("a-long-test-password\n"))
    run("user", "create", "ada", "--role", "viewer", "--password-stdin")
    ada = User.objects.get()
    assert (ada.username, ada.role, ada.is_admin, ada.check_password("a-long-test-password")) == ("ada", "viewer", False, True)
    (person,) = json.loads(run("user", "list", "--json"))
    assert (person["name"], person["role"], person["active"]) == ("ada", "viewer", True)


@pytest.mark.django_db
@pytest.mark.parametrize(("name", "password", "message"), [("ada", "123", "too short"), ("a b", "x", "valid username"), ("", "x", "blank")])
def test_user_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, name: str, password: str, message: str) -> None:
    from lmweb.models import User

    monkeypatch.setattr(sys, "stdin", io.StringIO(password))
    assert message in fails("user", "create", name, "--password-stdin")
    assert not User.objects.exists()


def test_limits_of_a_person(owner: User) -> None:
    assert run("user", "limits", "owner") == "owner: running default, waiting default.\n"
    assert run("user", "limits", "owner", "--running", "2", "--waiting", "0") == "owner: running 2, waiting any number.\n"
    assert run("user", "limits", "owner", "--running", "default") == "owner: running default, waiting any number.\n"
    assert json.loads(run("user", "limits", "owner", "--json"))["waiting_limit"] == 0
    assert json.loads(run("user", "downloads", "owner", "yes", "--json"))["may_download"] is True
    assert "whole number" in fails("user", "limits", "owner", "--running", "-1")
    assert "no account" in fails("user", "limits", "nobody")


def test_without_a_server_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMWEB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "lmweb.settings")
    code = "from django.core.management import execute_from_command_line as e; e(['manage.py', 'token', 'list'])"
    done: Any = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "CommandError: The database cannot be reached. Start the server first: python3 manage.py up"
