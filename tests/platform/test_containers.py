"""The rules that docker-compose.yml and the Dockerfile have to keep, read as data."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.live import REPOSITORY

COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = {"prepare", "web", "gpu-worker", "gpu-worker-nvidia", "io-worker"}


def test_services_and_images():
    assert set(SERVICES) == OURS | {"database", "valkey"}
    assert SERVICES["database"]["image"] == "pgvector/pgvector:pg18"
    assert SERVICES["valkey"]["image"].startswith("valkey/valkey:")


def test_only_the_web_server_is_published_and_on_loopback_unless_told():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["web"]
    assert SERVICES["web"]["ports"] == ["${LMWEB_BIND:-127.0.0.1}:${LMWEB_PORT:-1234}:1234"]
    assert not any("network_mode" in service or service.get("privileged") for service in SERVICES.values())


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"prepare"}))
def test_long_running_services_have_health_checks_and_restart(name):
    assert SERVICES[name]["healthcheck"]["test"]
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_secrets_come_from_the_environment_and_have_no_default():
    text = (REPOSITORY / "docker-compose.yml").read_text()
    secrets = re.findall(r"\$\{(LMWEB_(?:SECRET_KEY|NODE_TOKEN|\w*PASSWORD))([^}]*)\}", text)
    assert {name for name, _ in secrets} == {"LMWEB_SECRET_KEY", "LMWEB_NODE_TOKEN", "LMWEB_DATABASE_PASSWORD", "LMWEB_REDIS_PASSWORD"}
    assert all(rest.startswith(":?") for _, rest in secrets)


def test_cpu_by_default_and_nvidia_as_a_profile():
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["gpu-worker-nvidia"]
    nvidia = SERVICES["gpu-worker-nvidia"]
    assert nvidia["profiles"] == ["nvidia"]
    assert nvidia["build"]["args"]["LMWEB_GPU"] == "cuda"
    assert nvidia["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"


def test_workers_scale():
    """Several containers of one service are nodes of different names, let in by one token, on the same models directory."""
    for name in ("gpu-worker", "gpu-worker-nvidia"):
        environment = SERVICES[name]["environment"]
        assert "LMWEB_NODE_NAME" not in environment, "they take their own host names"
        assert "LMWEB_LOCAL_WORKER" not in environment
        assert "LMWEB_NODE_TOKEN" in environment
        assert not {"hostname", "container_name", "ports"} & set(SERVICES[name])
    assert "LMWEB_NODE_TOKEN" in SERVICES["prepare"]["environment"], "it has the installation accept the token"


def test_the_secrets_of_the_documented_env_file_are_those_that_are_wanted():
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    (names,) = re.findall(r"for name in ([A-Z_ ]+); do", text)
    wanted = re.findall(r"\$\{(LMWEB_\w+):\?", (REPOSITORY / "docker-compose.yml").read_text())
    assert set(names.split()) == set(wanted)


def test_state_lives_in_named_volumes():
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])
    assert all(SERVICES[name]["volumes"] == ["data:/data"] for name in OURS)


def test_our_containers_have_no_rights_to_gain():
    assert all(SERVICES[name]["cap_drop"] == ["ALL"] for name in OURS)
    assert all(SERVICES[name]["security_opt"] == ["no-new-privileges:true"] for name in OURS)


def test_image_runs_as_an_ordinary_user_and_copies_only_what_it_needs():
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    stages = [line for line in lines if line.startswith("FROM ")]
    assert len(stages) == 2
    assert [line for line in lines if line.startswith("USER ")] == ["USER lmweb"]
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = {entry[1:] for entry in ignored if entry.startswith("!")}
    assert {"lmweb", "workers", "models_app", "chat", "api", "requirements", "manage.py"} <= copied
    assert not copied & {"tests", ".git", ".venv", "bench"}
