"""How models come into memory and leave it, on a real host with real runners: TTL, auto-evict, pin, swap, rollback, turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest

from tests.micro_models import make_micro, make_micro_bert
from tests.models.hostile import VALID, engine_killers, mutants
from tests.workers.support import ENDLESS, Bench, make_host, wait_for
from workers.events import QueueUpdate
from workers.memory import AutoEvict
from workers.policy import Policy
from workers.schemas import EmbeddingRequest, LoadConfig, SamplingParams, request_to_builtins

if TYPE_CHECKING:
    from models_app.models import InstalledModel, ModelInstance

MB = 1000**2
LONG = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def models(bench: Bench, tmp_path: Path) -> list[InstalledModel]:
    """Return three small models."""
    return [bench.install(make_micro(tmp_path / f"{name}.gguf", seed=n, layers=4), f"test/{name}") for n, name in enumerate("abc")]


def there() -> dict[str, str]:
    """Return the rows of models in memory: identifier and status."""
    from models_app.models import ModelInstance

    return dict(ModelInstance.objects.order_by("identifier").values_list("identifier", "status"))


def begin(bench: Bench, model: InstalledModel, sampling: SamplingParams = LONG, **fields: Any) -> Any:
    """Start a generation and wait for its first text."""
    generation = bench.create(model, "to be", sampling=sampling, **fields)
    bench.host.generate(str(generation.pk))
    return generation


def embed(bench: Bench, model: InstalledModel) -> None:
    """Have a text turned into a vector."""
    from models_app.models import Generation

    request = request_to_builtins(EmbeddingRequest(model=model.key, inputs=["to be"]))
    user = bench.principal.user
    generation = Generation.objects.create(user=user, source="test", model=model, model_key=model.key, request=request, node="test-node")
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).status == "completed"


def ask(bench: Bench, model: InstalledModel, **fields: Any) -> ModelInstance:
    """Have a model loaded as a person would, and return its row when that has ended."""
    from models_app.models import ModelInstance

    config = LoadConfig(**fields.pop("config", {}))
    fields = {"identifier": model.key, "node_id": "test-node", "config": msgspec.to_builtins(config), **fields}
    row = ModelInstance.objects.create(model=model, **fields)
    bench.host.load(row.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=row.pk).status != "loading")
    row.refresh_from_db()
    return row


def limit_to(bench: Bench, count: float, **policy: Any) -> None:
    """Give models the memory of so many of the micro models (the first one has to be loaded)."""
    runner = next(iter(bench.host.runners.by_id.values()))
    one = max(runner.memory_bytes(), runner.needed_bytes)
    bench.host.runners.policy = Policy(limit_bytes=int(count * one), **{"auto_evict": AutoEvict.NEEDED, "turn_seconds": 0, **policy})
    runner.turn_until = 0


# --- options ------------------------------------------------------------------------------------------------------------


def test_options_reach_the_engine_and_the_row_says_what_is_in_force(bench: Bench, starter: InstalledModel) -> None:
    config = {
        "context_length": 512,
        "parallel": 2,
        "eval_batch_size": 64,
        "flash_attention": True,
        "k_cache_type": "q8_0",
        "v_cache_type": "q8_0",
    }
    row = ask(bench, starter, config=config, identifier="mine", ttl_seconds=500)
    assert row.status == "ready", row.error
    assert row.config == {**config, "cpu_threads": row.config["cpu_threads"]}
    assert row.load_seconds
    assert row.memory_bytes
    assert (row.jit, row.ttl_seconds) == (False, 500)
    assert bench.run(starter, "hello").status == "completed"
    second = ask(bench, starter, identifier="lmweb/starter:2")
    assert there() == {"lmweb/starter:2": "ready", "mine": "ready"}
    assert second.config["context_length"] == 2048


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"v_cache_type": "q4_0", "flash_attention": False}, "quantized V cache requires flash_attn"),
        ({"num_experts": 2}, "2 experts were asked for; this model has 0"),
    ],
)
def test_what_the_engine_cannot_do_is_said_in_words(bench: Bench, models: list[InstalledModel], config: dict[str, Any], words: str) -> None:
    row = ask(bench, models[0], config=config)
    assert row.status == "failed"
    assert words in row.error


def test_hostile_headers_that_pass_the_parser_end_their_runner_at_most(bench: Bench, starter: InstalledModel, tmp_path: Path) -> None:
    """llama.cpp refuses them in words, aborts, or answers nonsense; either way the host says what happened and goes on."""
    micro = make_micro(tmp_path / "m.gguf", layers=1, quantization="q4_0").read_bytes()
    asked = ask(bench, starter)
    passing = [data for data in mutants([VALID.encode(), micro], 200, seed=3) if is_accepted(tmp_path / "mutant.gguf", data)]
    killers = engine_killers(micro)
    outcomes = []
    for number, data in enumerate([*killers.values(), *passing[:6]]):
        file = tmp_path / f"hostile-{number}.gguf"
        file.write_bytes(data)
        assert is_accepted(file, data)
        ended = bench.run(bench.install(file, f"hostile/{number}"), "to be", sampling=SHORT)
        assert ended.status == "completed" or (ended.error_code in {"model_load_failed", "generation_interrupted"} and ended.error_message)
        outcomes.append(ended.error_message)
    assert "The engine crashed while it read the file" in outcomes[0]
    assert bench.run(starter, "hello", sampling=SHORT).status == "completed"
    assert bench.host.runners.by_id[asked.pk].process.poll() is None


def is_accepted(file: Path, data: bytes) -> bool:
    """Return whether the parser takes a file with this content for a model."""
    from lmweb.errors import InvalidModelFile
    from models_app import gguf

    file.write_bytes(data)
    try:
        gguf.read_model(file)
    except InvalidModelFile:
        return False
    return True


# --- by request: JIT and TTL --------------------------------------------------------------------------------------------


def test_a_request_loads_with_the_defaults_of_its_model(bench: Bench, models: list[InstalledModel]) -> None:
    from models_app.models import InstalledModel, ModelInstance

    InstalledModel.objects.filter(pk=models[0].pk).update(load_defaults={"context_length": 256, "parallel": 3})
    bench.run(models[0], "to be", sampling=SHORT)
    row = ModelInstance.objects.get()
    assert (row.config["context_length"], row.config["parallel"]) == (256, 3)
    assert (row.jit, row.ttl_seconds) == (True, 3600)


def test_without_jit_requests_need_a_loaded_model(bench: Bench, models: list[InstalledModel]) -> None:
    bench.host.runners.policy = Policy(jit=False)
    refused = bench.run(models[0], "to be", sampling=SHORT)
    assert (refused.status, refused.error_code) == ("failed", "model_not_loaded")
    assert there() == {}
    ask(bench, models[0])
    assert bench.run(models[0], "to be", sampling=SHORT).status == "completed"


def test_an_unused_model_leaves_and_its_memory_returns(bench: Bench, models: list[InstalledModel]) -> None:
    """The request's TTL counts; a model that a person loaded has none, a pinned one stays."""
    ask(bench, models[1])
    pinned = ask(bench, models[2], ttl_seconds=1)
    type(pinned).objects.update(pinned=True)
    type(pinned).objects.filter(identifier="test/b").update(pinned=False)
    begin(bench, models[0], SHORT, ttl_seconds=1)
    wait_for(lambda: there().get("test/a") == "ready")
    process = psutil.Process(next(r for r in bench.host.runners.by_id.values() if r.identifier == "test/a").process.pid)
    wait_for(lambda: "test/a" not in there())
    assert not process.is_running()
    time.sleep(1)  # the pinned one's time is over, too
    assert there() == {"test/b": "ready", "test/c": "ready"}


def test_a_busy_model_does_not_expire(bench: Bench, models: list[InstalledModel]) -> None:
    generation = begin(bench, models[0], LONG, ttl_seconds=1)
    assert bench.finished(generation).status == "completed"


def test_a_fault_that_nobody_foresaw_ends_one_load(bench: Bench, models: list[InstalledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that decides about loads is one for all."""
    estimate = bench.host.store.memory_estimate

    def surprise(instance: Any) -> Any:
        if instance.model.key == "test/a":
            raise RuntimeError("surprise")
        return estimate(instance)

    monkeypatch.setattr(bench.host.store, "memory_estimate", surprise)
    failed = ask(bench, models[0])
    assert (failed.status, failed.error_code) == ("failed", "model_load_failed")
    assert "RuntimeError" in failed.error
    assert bench.run(models[0], "to be", sampling=SHORT).error_code == "model_load_failed"
    assert ask(bench, models[1]).status == "ready"


# --- auto-evict -----------------------------------------------------------------------------------------------------------


def test_one_model_at_a_time_as_lm_studio_does(bench: Bench, models: list[InstalledModel]) -> None:
    """What a person loaded is not touched, nor what is pinned."""
    from models_app.models import ModelInstance

    ask(bench, models[2])
    bench.run(models[0], "to be", sampling=SHORT)
    bench.run(models[1], "to be", sampling=SHORT)
    assert there() == {"test/b": "ready", "test/c": "ready"}
    ModelInstance.objects.filter(identifier="test/b").update(pinned=True)
    bench.run(models[0], "to be", sampling=SHORT)
    assert there() == {"test/a": "ready", "test/b": "ready", "test/c": "ready"}


def test_a_language_model_and_an_embedding_model_stay_side_by_side(bench: Bench, models: list[InstalledModel], tmp_path: Path) -> None:
    """Who asks about documents uses both in turn."""
    from models_app.models import ModelInstance

    bert = bench.install(
        make_micro_bert(tmp_path / "bert.gguf"), "test/bert", type="embedding", architecture="bert", max_context_length=512
    )
    ids = []
    for _ in range(2):
        bench.run(models[0], "to be", sampling=SHORT)
        embed(bench, bert)
        ids.append(set(ModelInstance.objects.values_list("pk", flat=True)))
    assert there() == {"test/a": "ready", "test/bert": "ready"}
    assert ids[0] == ids[1], "none was loaded anew"
    bench.run(models[1], "to be", sampling=SHORT)
    assert there() == {"test/b": "ready", "test/bert": "ready"}


def test_a_busy_model_is_not_evicted_where_there_is_room(bench: Bench, models: list[InstalledModel]) -> None:
    long = begin(bench, models[0], **ENDLESS)
    wait_for(lambda: bench.text(long))
    assert bench.run(models[1], "to be", sampling=SHORT).status == "completed"
    bench.host.cancel(str(long.pk))
    assert bench.finished(long).status == "cancelled"
    assert set(there()) == {"test/a", "test/b"}


def test_off_keeps_everything_and_says_when_memory_is_short(bench: Bench, models: list[InstalledModel]) -> None:
    bench.run(models[0], "to be", sampling=SHORT)
    limit_to(bench, 1.5, auto_evict=AutoEvict.OFF)
    refused = bench.run(models[1], "to be", sampling=SHORT)
    assert refused.error_code == "insufficient_memory"
    assert "test/a" in refused.error_message
    assert there() == {"test/a": "ready", "test/b": "failed"}


# --- taking turns ---------------------------------------------------------------------------------------------------------


def test_whoever_waits_for_memory_is_told_and_gets_a_turn(bench: Bench, models: list[InstalledModel]) -> None:
    """A stream of requests for one model does not keep another one out, and nothing is cut off."""
    first = begin(bench, models[0], **ENDLESS)
    wait_for(lambda: bench.text(first))
    limit_to(bench, 1.5)
    other = begin(bench, models[1], SHORT)
    told: Callable[[], bool] = lambda: any(isinstance(event, QueueUpdate) for event in bench.events(other))  # noqa: E731
    wait_for(told)
    update = next(event for event in bench.events(other) if isinstance(event, QueueUpdate))
    assert (update.position, update.reason) == (0, "Waiting until test/a has finished.")
    late = begin(bench, models[0], SHORT)  # its model's turn is over
    bench.host.cancel(str(first.pk))
    assert bench.finished(first).status == "cancelled"
    assert bench.finished(other).status == "completed"
    assert bench.finished(late).status == "completed"
    assert first.finished_at < other.finished_at < late.finished_at
    assert there() == {"test/a": "ready"}


def test_a_cancelled_wait_leaves_the_loaded_model_alone(bench: Bench, models: list[InstalledModel]) -> None:
    first = begin(bench, models[0], **ENDLESS)
    wait_for(lambda: bench.text(first))
    limit_to(bench, 1.5)
    other = begin(bench, models[1], SHORT)
    wait_for(lambda: "test/b" in there())
    bench.host.cancel(str(other.pk))
    late = begin(bench, models[0], SHORT)
    assert bench.finished(other).status == "cancelled"
    assert bench.finished(late).status == "completed"
    bench.host.cancel(str(first.pk))
    assert bench.finished(first).status == "cancelled"
    wait_for(lambda: there() == {"test/a": "ready"})


def test_requests_for_a_model_that_is_being_unloaded_load_it_again(bench: Bench, models: list[InstalledModel]) -> None:
    """Found as a violated unique name: the row of the old load lives until its process has ended."""
    from models_app.models import ModelInstance

    for _ in range(3):
        bench.run(models[0], "to be", sampling=SHORT)
        instance = ModelInstance.objects.get()
        ModelInstance.objects.update(status="unloading")
        runner = bench.host.runners.by_id[instance.pk]
        runner.stopping = True  # as the first line of an unload does
        late = begin(bench, models[0], SHORT)
        bench.host.unload(instance.pk)
        assert bench.finished(late).status == "completed"


# --- swaps that people ask for --------------------------------------------------------------------------------------------


def test_a_swap_waits_for_the_old_model_and_replaces_it(bench: Bench, models: list[InstalledModel]) -> None:
    old = ask(bench, models[0])
    long = begin(bench, models[0])
    wait_for(lambda: bench.text(long))
    limit_to(bench, 1.5)
    assert ask(bench, models[1], identifier="refused").status == "failed"
    new = ask(bench, models[1], identifier="new", replaces=[old.pk])
    assert new.status == "ready", new.error
    assert bench.finished(long).status == "completed", "what was running was not cut off"
    wait_for(lambda: there() == {"new": "ready", "refused": "failed"})


def test_the_old_model_comes_back_if_the_new_one_cannot_be_loaded(bench: Bench, models: list[InstalledModel], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    old = ask(bench, models[0], identifier="old", config={"context_length": 512}, ttl_seconds=900)
    new = ask(bench, bench.install(broken, "test/broken"), replaces=[old.pk])
    assert new.status == "failed"
    assert new.error
    wait_for(lambda: there() == {"old": "ready", "test/broken": "failed"})
    back = type(old).objects.get(identifier="old")
    assert (back.config, back.ttl_seconds, back.jit) == (old.config, 900, False)
    assert bench.run(models[0], "to be", sampling=SHORT).status == "completed"


def test_what_a_request_had_evicted_comes_back_too(bench: Bench, models: list[InstalledModel], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    bench.run(models[0], "to be", sampling=SHORT)
    failed = bench.run(bench.install(broken, "test/broken"), "to be")
    assert failed.error_code == "model_load_failed"
    wait_for(lambda: there().get("test/a") == "ready")


def test_pinned_models_stay_in_a_swap(bench: Bench, models: list[InstalledModel]) -> None:
    old = ask(bench, models[0], pinned=True)
    limit_to(bench, 1.5)
    assert ask(bench, models[1], replaces=[old.pk]).status == "failed"
    assert there()["test/a"] == "ready"


def test_a_load_that_waits_can_be_stopped(bench: Bench, models: list[InstalledModel]) -> None:
    from models_app.models import ModelInstance

    old = ask(bench, models[0])
    long = begin(bench, models[0], **ENDLESS)
    wait_for(lambda: bench.text(long))
    row = ModelInstance.objects.create(identifier="new", model=models[1], node_id="test-node", replaces=[old.pk])
    bench.host.load(row.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=row.pk).note == "Waiting until test/a has finished.")
    bench.host.unload(row.pk)
    assert there() == {"test/a": "ready"}
    bench.host.cancel(str(long.pk))
    assert bench.finished(long).status == "cancelled"
    assert bench.run(models[0], "to be", sampling=SHORT).status == "completed"


def test_unloading_gives_all_memory_back(bench: Bench, tmp_path: Path) -> None:
    model = bench.install(make_micro(tmp_path / "large.gguf", context=131_072), "test/large", max_context_length=131_072)
    row = ask(bench, model, config={"context_length": 131_072})
    runner = bench.host.runners.by_id[row.pk]
    assert runner.memory_bytes() > 60 * MB
    bench.host.unload(row.pk)
    assert runner.memory_bytes() == 0
    wait_for(lambda: there() == {})


def test_a_host_that_stops_during_a_swap_leaves_no_process(bench: Bench, models: list[InstalledModel], tmp_path: Path) -> None:
    host = make_host(tmp_path / "other")
    runners = host.runners
    host.start()
    from models_app.models import ModelInstance

    for number, model in enumerate(models):
        row = ModelInstance.objects.create(identifier=f"x{number}", model=model, node_id="test-node")
        host.load(row.pk)
    wait_for(lambda: runners.by_id)
    host.stop()
    assert all(runner.process.poll() is not None for runner in runners.by_id.values())
