"""Memory: the estimate is close to what a load takes, is corrected by it, and keeps loads away that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.micro_models import make_micro, make_micro_bert
from workers import memory
from workers.engines import registry
from workers.memory import AutoEvict, Guardrail, ModelShape, Resident, choose_leavers, estimate
from workers.policy import Policy
from workers.schemas import LoadConfig

if TYPE_CHECKING:
    from models_app.models import InstalledModel, ModelInstance
    from tests.workers.support import Bench

MIB = 1024 * 1024
#: A 7B model of the Llama kind at 4 bits.
SEVEN_B = ModelShape(
    file_bytes=4_000 * MIB,
    repacked_bytes=3_800 * MIB,
    layers=32,
    width=4096,
    heads=32,
    heads_kv=8,
    token_kv_bytes=131_072,
    vocab_size=128_256,
    trained_context=131_072,
    is_embedding=False,
)


def test_parts_follow_the_file_and_the_configuration() -> None:
    small = estimate(SEVEN_B, LoadConfig(context_length=8192, parallel=4))
    large = estimate(SEVEN_B, LoadConfig(context_length=32768, parallel=4))
    assert small.weights_bytes == 4_000 * MIB
    assert small.kv_bytes == 8192 * 131_072
    assert large.kv_bytes == 4 * small.kv_bytes
    assert small.needed_bytes < 4_000 * MIB + 3_800 * MIB + 1_024 * MIB + 512 * MIB
    beyond = estimate(SEVEN_B, LoadConfig(context_length=10**7, parallel=1))
    assert beyond.kv_bytes == 131_072 * 131_072, "a load never has more context than the model"
    measured = estimate(SEVEN_B, LoadConfig(context_length=8192, parallel=4), measured_bytes=5_000 * MIB)
    assert measured.needed_bytes == 5_000 * MIB + small.compute_bytes


def test_what_lies_on_a_gpu() -> None:
    """Whole models lie there in full, parts in proportion, and only what stays on the processor is copied into its order."""
    config = LoadConfig(context_length=8192, parallel=4)
    host, full = estimate(SEVEN_B, config), estimate(SEVEN_B, config, on_gpu=True)
    assert (host.gpu_bytes, full.repacked_bytes) == (0, 0)
    assert full.gpu_bytes == full.weights_bytes + full.kv_bytes + full.compute_bytes
    assert full.needed_bytes == host.needed_bytes - host.repacked_bytes
    some = estimate(SEVEN_B, msgspec.structs.replace(config, gpu_layers=11), on_gpu=True)
    assert some.gpu_bytes - some.compute_bytes == (full.weights_bytes + full.kv_bytes) // 3
    assert some.repacked_bytes == host.repacked_bytes * 2 // 3
    apart = estimate(SEVEN_B, msgspec.structs.replace(config, offload_kv_cache_to_gpu=False), on_gpu=True)
    assert full.gpu_bytes - apart.gpu_bytes == full.kv_bytes
    assert estimate(SEVEN_B, msgspec.structs.replace(config, gpu_layers=0), on_gpu=True) == host
    assert estimate(SEVEN_B, config, measured_bytes=1, on_gpu=True) == full


@pytest.mark.parametrize(("context", "parallel"), [(256, 1), (2048, 4), (2048, 64)])
def test_the_engine_has_as_many_cells_as_were_estimated(tmp_path: Path, context: int, parallel: int) -> None:
    from models_app.memory import read_shape

    file = make_micro(tmp_path / "micro.gguf")
    config = LoadConfig(context_length=context, parallel=parallel, cpu_threads=1)
    shape = read_shape(file)
    engine = registry.factory("llama.cpp")(str(file), config, lambda _: None)
    assert engine.info.cells * shape.token_kv_bytes == estimate(shape, config).kv_bytes
    engine.close()


def test_every_sequence_has_a_cache_of_its_own_where_that_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = 12_288, 131_072  # bytes per token
    config = LoadConfig(parallel=16)
    monkeypatch.setattr("workers.memory.machine_memory", lambda: (0, 64 * 1024**3))
    assert memory.kv_layout(config, 8000, small, on_gpu=False) == memory.KvLayout(16 * 8192, is_unified=False)
    assert memory.kv_layout(config, 8000, large, on_gpu=False).is_unified
    assert memory.kv_layout(config, 8000, small, on_gpu=True).is_unified
    assert not memory.kv_layout(msgspec.structs.replace(config, unified_kv_cache=False), 8000, large, on_gpu=True).is_unified
    assert memory.kv_layout(msgspec.structs.replace(config, unified_kv_cache=True), 8000, small, on_gpu=False).cells == 22_016
    monkeypatch.setattr("workers.memory.machine_memory", lambda: (0, 8 * 1024**3))
    assert memory.kv_layout(config, 8000, small, on_gpu=False).is_unified, "a tenth of a small machine is less"


@pytest.mark.parametrize(("level", "reserved"), [("off", 0), ("relaxed", 0), ("balanced", 50), ("strict", 150)])
def test_levels(level: str, reserved: int) -> None:
    assert memory.reserve(Guardrail(level), 1000) == reserved
    error = memory.refusal("m", 100, level=Guardrail(level), free_bytes=99, total_bytes=1000, held_by={"other": 7})
    assert error.details == {"needed_bytes": 100, "free_bytes": 99, "held_by": [{"identifier": "other", "memory_bytes": 7}]}
    assert "m needs about" in error.message
    assert "other (0.00 GB)" in error.message


def test_who_leaves() -> None:
    busy = Resident(1, 500, is_busy=True, unused_seconds=0)
    fresh, stale = Resident(2, 300, is_busy=False, unused_seconds=5), Resident(3, 200, is_busy=False, unused_seconds=900)
    everybody = [busy, fresh, stale]
    assert choose_leavers(100, everybody) == [stale]
    assert choose_leavers(250, everybody) == [fresh], "the stale one alone is too small, and not needed then"
    assert choose_leavers(400, everybody) == [stale, fresh]
    assert choose_leavers(600, everybody) == [fresh, busy]
    assert choose_leavers(1000, everybody) == [stale, fresh, busy]
    assert choose_leavers(1001, everybody) is None
    assert choose_leavers(0, everybody) == []


def test_precisions_of_the_cache_change_the_estimate() -> None:
    plain = estimate(SEVEN_B, LoadConfig(context_length=8192)).kv_bytes
    halved = estimate(SEVEN_B, LoadConfig(context_length=8192, k_cache_type="q8_0", v_cache_type="q8_0")).kv_bytes
    assert halved / plain == pytest.approx(34 / 64)


def test_this_machine_has_memory() -> None:
    free, total = memory.machine_memory()
    assert 0 < free <= total


# --- with real loads --------------------------------------------------------------------------------------------------


def load(bench: Bench, model: InstalledModel, **config: Any) -> ModelInstance:
    import msgspec

    from models_app.models import ModelInstance
    from tests.workers.support import wait_for

    row = ModelInstance.objects.create(
        identifier=model.key, model=model, node_id="test-node", config=msgspec.to_builtins(LoadConfig(**config))
    )
    bench.host.load(row.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=row.pk).status != "loading")
    row.refresh_from_db()
    return row


@pytest.mark.parametrize("kind", ["starter", "decoder", "bert"])
def test_the_estimate_is_close_and_then_exact(bench: Bench, starter_gguf: Path, tmp_path: Path, kind: str) -> None:
    from models_app.memory import estimate_model

    if kind == "starter":
        model = bench.install(starter_gguf)
    elif kind == "decoder":
        model = bench.install(make_micro(tmp_path / "m.gguf", context=131_072))
    else:
        model = bench.install(make_micro_bert(tmp_path / "b.gguf"), type="embedding")
    config = LoadConfig(context_length=100_000 if kind == "decoder" else None, parallel=16)
    before = estimate_model(model, config)
    loaded = load(bench, model, context_length=config.context_length, parallel=16)
    assert loaded.status == "ready"
    assert loaded.memory_bytes
    assert before.needed_bytes - before.compute_bytes == pytest.approx(loaded.memory_bytes, rel=0.25)
    after = estimate_model(model, config)
    assert after.measured_bytes == loaded.memory_bytes
    assert estimate_model(model, LoadConfig(context_length=512, parallel=2)).measured_bytes is None


def test_a_load_that_does_not_fit_is_refused_in_words(
    bench: Bench, starter: InstalledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.host.runners.policy = Policy(auto_evict=AutoEvict.OFF)
    first = bench.install(make_micro(tmp_path / "m.gguf"), "test/first")
    bench.run(first, "to be")
    monkeypatch.setattr("workers.runners.machine_memory", lambda: (50 * MIB, 1000 * MIB))
    refused = load(bench, starter, parallel=4)
    assert refused.status == "failed"
    assert "lmweb/starter needs about" in refused.error
    assert "Loaded models hold: test/first (" in refused.error
    # A request that would load it is told the same, with the figures.
    generation = bench.create(starter, "hello")
    bench.host.generate(str(generation.pk))
    generation = bench.finished(generation)
    assert (generation.status, generation.error_code) == ("failed", "insufficient_memory")
    error = next(event.error for event in bench.events(generation) if hasattr(event, "error"))
    assert error.details["free_bytes"] == 50 * MIB
    assert error.details["needed_bytes"] > 50 * MIB
    assert [holder["identifier"] for holder in error.details["held_by"]] == ["test/first"]
    # What is in memory goes on, and with memory the load works.
    assert bench.run(first, "to be").status == "completed"
    monkeypatch.undo()
    assert bench.run(starter, "hello").status == "completed"


def test_gpu_memory_is_asked_of_nvidia_smi(tmp_path, monkeypatch):
    from workers import memory

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '24576\\n[N/A]\\n8192\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(memory, "has_gpu_build", lambda: True)
    assert memory.gpu_memory() == 32768 * 1024 * 1024
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert memory.gpu_memory() == 0
