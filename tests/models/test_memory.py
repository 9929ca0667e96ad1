"""Loading, unloading and deleting: rows first, then the message to the node."""

from __future__ import annotations

import json
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.conf import settings
from django.db import connection
from django.utils import timezone

from lmweb.access import Principal
from lmweb.errors import Conflict, InvalidRequest, PermissionDenied, ServiceUnavailable
from lmweb.models import ApiToken, User
from models_app import loading, services
from models_app.models import Generation, InstalledModel, ModelInstance
from models_app.placement import Mode
from tests.micro_models import make_micro
from workers.models import WorkerNode
from workers.schemas import LoadConfig

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def model(micro: Path, db: None) -> InstalledModel:
    return services.import_file(principal=None, source=micro, user_repo="a/micro", mode=Mode.COPY)


def sent(node: WorkerNode) -> list[tuple[str, list[object]]]:
    """Return the tasks that wait in the node's queue, oldest first."""
    messages = [json.loads(raw) for raw in reversed(redis.Redis.from_url(settings.REDIS_URL).lrange(node.queue, 0, -1))]
    return [(m["headers"]["task"], eval(m["headers"]["argsrepr"])) for m in messages]


def test_load_writes_the_row_and_tells_the_node(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    instance = loading.request_load(principal=member, model=model, config=LoadConfig(context_length=512, parallel=2))
    assert (instance.identifier, instance.status, instance.node, instance.jit) == ("a/micro", "loading", node, False)
    assert instance.config == {"context_length": 512, "parallel": 2}
    assert sent(node) == [("workers.tasks.load_model", (instance.pk,))]


def test_unload_marks_the_row_and_tells_the_node(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    instance = ModelInstance.objects.create(identifier="a/micro", model=model, node=node, status="ready")
    loading.request_unload(principal=member, instance=instance)
    instance.refresh_from_db()
    assert instance.status == "unloading"
    assert sent(node) == [("workers.tasks.unload_model", (instance.pk,))]


def test_context_beyond_the_model_is_refused(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    with pytest.raises(InvalidRequest, match="2048"):
        loading.request_load(principal=member, model=model, config=LoadConfig(context_length=4096))
    assert not ModelInstance.objects.exists()


def test_further_instances_get_a_number_unless_they_are_named(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    names = [loading.request_load(principal=member, model=model).identifier for _ in range(3)]
    assert names == ["a/micro", "a/micro:2", "a/micro:3"]
    assert loading.request_load(principal=member, model=model, identifier="second").identifier == "second"
    with pytest.raises(Conflict, match="'second' is loading already"):
        loading.request_load(principal=member, model=model, identifier="second")


@pytest.mark.parametrize("identifier", ["../x", "a b", "a\x00", "", " ", "x" * 300, "ä"])
def test_hostile_identifiers(member: Principal, model: InstalledModel, node: WorkerNode, identifier: str) -> None:
    if not identifier:
        assert loading.request_load(principal=member, model=model, identifier=identifier).identifier == "a/micro"
        return
    with pytest.raises(InvalidRequest):
        loading.request_load(principal=member, model=model, identifier=identifier)


def test_identifier_of_another_model_is_refused(member: Principal, model: InstalledModel, node: WorkerNode, tmp_path: Path) -> None:
    services.import_file(principal=None, source=make_micro(tmp_path / "o.gguf"), user_repo="b/other")
    with pytest.raises(Conflict, match="another model"):
        loading.request_load(principal=member, model=model, identifier="B/Other")


def test_missing_file_is_said_before_loading(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    model.file.unlink()
    with pytest.raises(Conflict, match="missing on the server"):
        loading.request_load(principal=member, model=model)


def test_failed_attempt_makes_room(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    failed = ModelInstance.objects.create(identifier="a/micro", model=model, node=node, status="failed", error="no memory")
    assert loading.request_load(principal=member, model=model).pk != failed.pk
    assert ModelInstance.objects.count() == 1


def test_without_a_worker_loading_is_unavailable(member: Principal, model: InstalledModel) -> None:
    WorkerNode.objects.create(
        name="dead", incarnation="00000000-0000-0000-0000-000000000001", heartbeat_at=timezone.now() - timedelta(hours=1)
    )
    with pytest.raises(ServiceUnavailable, match="No worker"):
        loading.request_load(principal=member, model=model)


def test_instance_of_a_dead_node_goes_at_once(member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    WorkerNode.objects.update(heartbeat_at=timezone.now() - timedelta(hours=1))
    loading.request_unload(principal=member, instance=ModelInstance.objects.create(identifier="x", model=model, node=node, status="ready"))
    assert not ModelInstance.objects.exists()


def test_permissions(stranger: User, member: Principal, model: InstalledModel, node: WorkerNode) -> None:
    instance = ModelInstance.objects.create(identifier="x", model=model, node=node, status="ready")
    token, _ = ApiToken.issue(user=member.user, name="inference only")
    for principal in (Principal(stranger), Principal(member.user, token)):
        with pytest.raises(PermissionDenied):
            loading.request_load(principal=principal, model=model)
        with pytest.raises(PermissionDenied):
            loading.request_unload(principal=principal, instance=instance)
        with pytest.raises(PermissionDenied):
            services.delete_model(principal=principal, model=model)
    with pytest.raises(PermissionDenied):
        services.delete_model(principal=member, model=model)  # members load and import, admins delete
    assert model.file.exists()


def test_delete_removes_row_file_and_folders(boss: Principal, model: InstalledModel, models_dir: Path) -> None:
    services.delete_model(principal=boss, model=model)
    assert not InstalledModel.objects.exists()
    assert not (models_dir / "a").exists()


def test_delete_of_a_link_keeps_what_it_leads_to(boss: Principal, micro: Path) -> None:
    model = services.import_file(principal=None, source=micro, user_repo="a/link", mode=Mode.SYMBOLIC_LINK)
    services.delete_model(principal=boss, model=model)
    assert micro.exists()


def test_delete_waits_for_the_worker(boss: Principal, model: InstalledModel, node: WorkerNode) -> None:
    instance = ModelInstance.objects.create(identifier="x", model=model, node=node, status="ready")

    def worker() -> None:
        while not ModelInstance.objects.filter(pk=instance.pk, status="unloading").exists():
            pass
        ModelInstance.objects.filter(pk=instance.pk).delete()
        connection.close()

    thread = threading.Thread(target=worker)
    thread.start()
    services.delete_model(principal=boss, model=model)
    thread.join()
    assert not InstalledModel.objects.exists()


def test_delete_gives_up_in_words(boss: Principal, model: InstalledModel, node: WorkerNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "UNLOAD_WAIT_SECONDS", 0.2)
    ModelInstance.objects.create(identifier="x", model=model, node=node, status="ready")
    with pytest.raises(Conflict, match="still being unloaded"):
        services.delete_model(principal=boss, model=model)
    assert model.file.exists()


def test_model_that_answers_is_not_deleted(boss: Principal, model: InstalledModel) -> None:
    Generation.objects.create(user=boss.user, source="chat", model=model, model_key=model.key, request={}, status="running")
    with pytest.raises(Conflict, match="1 from chat"):
        services.delete_model(principal=boss, model=model)
    assert model.file.exists()


def test_generations_outlive_their_model(boss: Principal, model: InstalledModel) -> None:
    done = Generation.objects.create(user=boss.user, source="chat", model=model, model_key=model.key, request={}, status="completed")
    services.delete_model(principal=boss, model=model)
    done.refresh_from_db()
    assert (done.model, done.model_key) == (None, "a/micro")


def test_two_imports_of_one_name_at_once(micro: Path, tmp_path: Path, models_dir: Path) -> None:
    """Exactly one wins; the other one is told, and its file stays where it was."""
    files = [shutil.copy(micro, tmp_path / f"{n}" / "same.gguf") for n in range(4) if (tmp_path / f"{n}").mkdir() is None]
    barrier, outcomes = threading.Barrier(len(files)), []

    def attempt(file: Path) -> None:
        barrier.wait()
        try:
            outcomes.append(services.import_file(principal=None, source=file, user_repo="a/race").key)
        except Conflict:
            outcomes.append("conflict")
        finally:
            connection.close()

    threads = [threading.Thread(target=attempt, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["a/race", "conflict", "conflict", "conflict"]
    assert sum(file.exists() for file in files) == len(files) - 1
    assert InstalledModel.objects.get().file.is_file()
    assert not list((models_dir / ".incoming").iterdir())
