"""REST v1: models, load and unload, field for field, on a real worker's host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lmweb.db import run_db
from tests.api.client import call
from tests.micro_models import make_micro

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import InstalledModel
    from tests.workers.support import Bench

LOAD, UNLOAD = "/api/v1/models/load", "/api/v1/models/unload"


@pytest.fixture
def micro(bench: Bench, tmp_path: Path) -> InstalledModel:
    return bench.install(
        make_micro(tmp_path / "m.gguf"), "acme/micro", quantization="F32", bits_per_weight=32.0, params_string="1M", architecture="qwen2"
    )


@pytest.fixture
def manager(owner: User) -> str:
    """Return a token that may load."""
    from lmweb.models import ApiToken

    return ApiToken.issue(user=owner, name="manager", scopes=["models:manage"])[1]


@pytest.fixture
def worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Deliver tasks to the host in this process, as Celery would."""
    import threading

    from lmweb.db import visit
    from workers import dispatch

    def deliver(task: str, node: str, *args: Any) -> bool:
        act = {dispatch.LOAD: bench.host.load, dispatch.UNLOAD: bench.host.unload}[task]
        threading.Thread(target=visit, args=(act, *args), daemon=True).start()
        return True

    monkeypatch.setattr(dispatch, "send", deliver)
    return bench


async def test_the_list_has_every_documented_field(worker: Bench, micro: InstalledModel, manager: str) -> None:
    answer = await call("GET", "/api/v1/models", token=manager)
    assert answer.status == 200
    assert answer.json() == {
        "models": [
            {
                "type": "llm",
                "publisher": "test",
                "key": "acme/micro",
                "display_name": "acme/micro",
                "architecture": "qwen2",
                "quantization": {"name": "F32", "bits_per_weight": 32.0},
                "size_bytes": micro.size_bytes,
                "params_string": "1M",
                "loaded_instances": [],
                "max_context_length": 2048,
                "format": "gguf",
                "capabilities": {"vision": False, "trained_for_tool_use": False},
                "description": None,
            }
        ]
    }


async def test_load_echo_list_and_unload(worker: Bench, micro: InstalledModel, manager: str) -> None:
    body = {"model": "acme/micro", "context_length": 512, "flash_attention": True, "eval_batch_size": 64, "echo_load_config": True}
    loaded = await call("POST", LOAD, token=manager, json_body=body)
    assert loaded.status == 200, loaded.body
    answer = loaded.json()
    assert answer.pop("load_time_seconds") > 0
    config = {"context_length": 512, "eval_batch_size": 64, "flash_attention": True, "offload_kv_cache_to_gpu": True}
    assert answer == {"type": "llm", "instance_id": "acme/micro", "status": "loaded", "load_config": config}
    second = (await call("POST", LOAD, token=manager, json_body={"model": "acme/micro"})).json()
    assert second["instance_id"] == "acme/micro:2"
    assert "load_config" not in second
    listed = (await call("GET", "/api/v1/models", token=manager)).json()["models"][0]["loaded_instances"]
    assert [instance["id"] for instance in listed] == ["acme/micro", "acme/micro:2"]
    assert listed[0]["config"] == config
    gone = await call("POST", UNLOAD, token=manager, json_body={"instance_id": "acme/micro:2"})
    assert (gone.status, gone.json()) == (200, {"instance_id": "acme/micro:2"})
    assert [runner.identifier for runner in worker.host.runners.by_id.values()] == ["acme/micro"]


async def test_what_is_left_out_takes_the_model_s_defaults(worker: Bench, micro: InstalledModel, manager: str) -> None:
    """Parameters of a request win over the defaults that an admin set; what neither says is not in the echo."""
    from models_app.models import InstalledModel as Row

    defaults = {"context_length": 256, "eval_batch_size": 128, "parallel": 2}
    await run_db(lambda: Row.objects.filter(pk=micro.pk).update(load_defaults=defaults))
    body = {"model": "micro-of-mine", "offload_kv_cache_to_gpu": False, "context_length": 300, "echo_load_config": True}
    assert (await call("POST", LOAD, token=manager, json_body=body)).status == 404
    loaded = await call("POST", LOAD, token=manager, json_body={**body, "model": "ACME/Micro"})
    config = {"context_length": 300, "eval_batch_size": 128, "offload_kv_cache_to_gpu": False}
    assert (loaded.status, loaded.json()["load_config"]) == (200, config), loaded.body


async def test_an_embedding_model(worker: Bench, manager: str, tmp_path: Path) -> None:
    from tests.micro_models import make_micro_bert

    await run_db(lambda: worker.install(make_micro_bert(tmp_path / "b.gguf"), "acme/bert", type="embedding", max_context_length=512))
    loaded = (await call("POST", LOAD, token=manager, json_body={"model": "acme/bert", "echo_load_config": True})).json()
    assert (loaded["type"], loaded["instance_id"], loaded["load_config"]["context_length"]) == ("embedding", "acme/bert", 512)
    listed = (await call("GET", "/api/v1/models", token=manager)).json()["models"][0]
    assert (listed["type"], listed["quantization"], listed["params_string"]) == ("embedding", None, None)
    assert "capabilities" not in listed
    assert [instance["id"] for instance in listed["loaded_instances"]] == ["acme/bert"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {}, 400, "model"),
        (LOAD, {"model": "nobody/nothing"}, 404, "model"),
        (LOAD, {"model": "a\x00"}, 404, "model"),
        (LOAD, {"model": "acme/micro", "context_length": "long"}, 400, "context_length"),
        (LOAD, {"model": "acme/micro", "context_length": 1}, 400, "context_length"),
        (LOAD, {"model": "acme/micro", "context_length": 10**9}, 400, "context_length"),
        (LOAD, {"model": "acme/micro", "eval_batch_size": -1}, 400, "eval_batch_size"),
        (LOAD, {"model": "acme/micro", "num_experts": 0}, 400, "num_experts"),
        (LOAD, {"model": "acme/micro", "num_experts": 2}, 400, "num_experts"),
        (LOAD, {"model": "acme/micro", "flash_attention": "yes"}, 400, "flash_attention"),
        (LOAD, {"model": "acme/micro", "offload_kv_cache_to_gpu": 1}, 400, "offload_kv_cache_to_gpu"),
        (LOAD, {"model": "acme/micro", "echo_load_config": None}, 400, "echo_load_config"),
        (LOAD, {"model": "acme/micro", "colour": "blue"}, 400, "colour"),
        (UNLOAD, {"instance_id": "nobody"}, 404, "instance_id"),
        (UNLOAD, {"instance_id": "a\x00"}, 404, "instance_id"),
        (UNLOAD, {}, 400, "instance_id"),
        (UNLOAD, [], 400, None),
    ],
)
async def test_what_is_wrong_is_named(
    worker: Bench, micro: InstalledModel, manager: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = await call("POST", path, token=manager, json_body=body)
    assert answer.status == status, answer.body
    assert answer.json()["error"]["param"] == param


async def test_a_load_that_fails_says_why(worker: Bench, manager: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    await run_db(worker.install, broken, "acme/broken")
    answer = await call("POST", LOAD, token=manager, json_body={"model": "acme/broken"})
    assert answer.status == 503
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("model_load_failed", "model_load_failed")
    assert "acme/broken could not be loaded" in answer.json()["error"]["message"]


async def test_a_load_without_the_memory_for_it_is_refused_with_the_figures(
    worker: Bench, micro: InstalledModel, manager: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await call("POST", LOAD, token=manager, json_body={"model": "acme/micro"})).status == 200
    monkeypatch.setattr("workers.runners.machine_memory", lambda: (50 * 2**20, 1000 * 2**20))
    refused = await call("POST", LOAD, token=manager, json_body={"model": "acme/micro"})
    assert refused.status == 503
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_memory", "insufficient_memory")
    assert error["message"].startswith("acme/micro:2 needs about")
    assert error["details"]["needed_bytes"] > error["details"]["free_bytes"] == 50 * 2**20
    assert [(held["identifier"], held["memory_bytes"] > 0) for held in error["details"]["held_by"]] == [("acme/micro", True)]


async def test_tokens_need_their_scopes(worker: Bench, micro: InstalledModel, token: str, owner: User) -> None:
    assert (await call("POST", LOAD, token=token, json_body={"model": "acme/micro"})).status == 403
    assert (await call("POST", UNLOAD, token=token, json_body={"instance_id": "x"})).status == 403
    assert (await call("GET", "/api/v1/models", token=token)).status == 200
    assert (await call("GET", "/api/v1/models")).status == 401
