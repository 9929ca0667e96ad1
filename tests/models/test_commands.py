"""The commands: what they print, in words and JSON, and how they fail: one line, exit status 1, no traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.db import connection

from models_app import services, transfer
from models_app.models import Download, InstalledModel, ModelInstance
from tests.hub.server import Hub, Repo
from tests.micro_models import make_micro
from tests.models.hostile import hostile_files
from workers.models import WorkerNode

if TYPE_CHECKING:
    from pytest_django import Settings

pytestmark = pytest.mark.django_db(transaction=True)


def run(*args: str) -> str:
    out = io.StringIO()
    call_command(*args, stdout=out)
    return out.getvalue()


@pytest.fixture
def worker(node: WorkerNode) -> Iterator[Callable[[Callable[[ModelInstance], None]], None]]:
    """Answer load and unload requests as a node does, from a thread, until the test ends."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(on_load: Callable[[ModelInstance], None]) -> None:
        def loop() -> None:
            while not stop.wait(0.02):
                for instance in ModelInstance.objects.filter(status="loading"):
                    on_load(instance)
                ModelInstance.objects.filter(status="unloading").delete()
            connection.close()

        threads.append(threading.Thread(target=loop))
        threads[0].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def ready(instance: ModelInstance) -> None:
    ModelInstance.objects.filter(pk=instance.pk).update(status="ready", config={**instance.config, "context_length": 512})


def test_import_says_what_happened(micro: Path) -> None:
    said = run("import_model", str(micro), "--user-repo", "team/model")
    model = InstalledModel.objects.get()
    assert said == f"Moved it to {model.file}\nImported team/model (qwen2, 261K, F32, 1.13 MB, context 2048)\n"
    assert not micro.exists()


@pytest.mark.parametrize(("option", "words"), [("--copy", "Copied"), ("--hard-link", "Hard-linked"), ("-l", "Linked"), ("--move", "Moved")])
def test_import_modes(micro: Path, option: str, words: str) -> None:
    assert run("import_model", str(micro), option).startswith(words)
    assert micro.exists() == (option != "--move")
    assert InstalledModel.objects.get().key == "local/micro-test"


def test_import_in_json(micro: Path) -> None:
    facts = json.loads(run("import_model", str(micro), "--copy", "--json"))
    assert facts["modelKey"] == "local/micro-test"
    assert facts["quantization"] == {"name": "F32", "bits": 32.0}
    assert facts["maxContextLength"] == 2048


def test_dry_run_changes_nothing(micro: Path, tmp_path: Path) -> None:
    assert "Would move" in run("import_model", str(micro), "--dry-run")
    assert json.loads(run("import_model", str(micro), "--dry-run", "--json"))["dryRun"] is True
    assert micro.exists()
    assert not InstalledModel.objects.exists()
    run("import_model", str(micro), "--copy", "--user-repo", "acme/base")
    virtual = tmp_path / "model.yaml"
    virtual.write_text("model: acme/other\nbase: acme/base\n")
    assert "Would add acme/other" in run("import_model", str(virtual), "--dry-run")
    assert not InstalledModel.objects.filter(key="acme/other").exists()
    with pytest.raises(CommandError, match="file or a directory"):
        run("import_model", "--scan", "--dry-run")


def test_starter_comes_back(boss: Any) -> None:
    assert "lmweb/starter" in run("import_model", "--starter")
    services.delete_model(principal=boss, model=InstalledModel.objects.get())
    assert services.ensure_starter() is None
    run("import_model", "--starter")
    assert InstalledModel.objects.get().key == "lmweb/starter"


@pytest.mark.parametrize("name", ["text", "one byte short", "offset beyond the file", "vision projector"])
def test_import_of_a_bad_file_is_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(hostile_files()[name])
    with pytest.raises(CommandError) as caught:
        run("import_model", str(file))
    assert "\n" not in str(caught.value)
    assert file.exists()
    assert not InstalledModel.objects.exists()


@pytest.mark.parametrize(
    "args",
    [
        ["import_model"], ["import_model", "/nowhere.gguf"], ["import_model", "x.gguf", "--copy", "--move"], ["import_model", "x", "--starter"],
        ["load"], ["load", "nothing"], ["load", "--yes"], ["estimate", "nothing"], ["load", "x", "--ttl", "0"], ["load", "x", "--flash-attention", "maybe"], ["load", "a\x00b"], ["unload"], ["unload", "nothing"], ["unload", "x", "--all"],
        ["load", "x", "--context-length", "0"], ["load", "x", "--context-length", "many"], ["load", "x", "--parallel", "1000"],
    ],
)  # fmt: skip
def test_bad_calls(args: list[str]) -> None:
    with pytest.raises(CommandError):
        run(*args)


def test_ls(micro: Path) -> None:
    assert "No models" in run("ls")
    run("import_model", str(micro), "--user-repo", "team/model")
    lines = run("ls").splitlines()
    assert lines[0].split() == ["MODEL", "PARAMS", "ARCH", "QUANT", "SIZE", "CONTEXT", "STATE"]
    assert lines[1].split() == ["team/model", "261K", "qwen2", "F32", "1.13", "MB", "2048"]
    assert lines[2] == "1 model, 1.13 MB on disk"
    assert json.loads(run("ls", "--json"))[0]["path"] == "team/model/Micro-Test-F32.gguf"


def test_ls_of_several_quantizations(tmp_path: Path, node: WorkerNode) -> None:
    for quantization in ("f32", "q8_0"):
        run("import_model", str(make_micro(tmp_path / f"m-{quantization}.gguf", quantization=quantization)), "--user-repo", "team/Model")
    run("import_model", str(make_micro(tmp_path / "other.gguf")), "--user-repo", "team/model2")
    assert [line.split()[0] for line in run("ls").splitlines()] == ["MODEL", "team/model", "team/model2", "team/model@q8_0", "3"]
    assert [line.split()[0] for line in run("ls", "--variants").splitlines()] == ["MODEL", "team/model", "team/model@q8_0", "2"]
    assert "team/model2" not in run("ls", "model@q8_0")
    several = json.loads(run("ls", "--json", "--variants"))
    assert [entry["selectedVariant"] for entry in several] == several[0]["variants"] == ["team/model", "team/model@q8_0"]
    assert several[0]["quantization"] == {"name": "F32", "bits": 32.0}
    ModelInstance.objects.create(identifier="mine", model=InstalledModel.objects.get(key="team/model2"), node=node, status="ready")
    [single] = json.loads(run("ls", "team/model2/other.gguf", "--json"))
    assert (single["modelKey"], single["loadedInstances"]) == ("team/model2", ["mine"])
    assert "variants" not in single
    assert run("ls", "--embedding").startswith("No models.")
    assert json.loads(run("ls", "--embedding", "--json")) == []


def test_load_ps_unload(micro: Path, worker: Callable[..., None]) -> None:
    run("import_model", str(micro), "--user-repo", "team/model")
    worker(ready)
    assert "No model is loaded" in run("ps")
    assert run("load", "model", "--context-length", "512", "--gpu", "0.5").startswith("Loaded team/model in ")
    assert ModelInstance.objects.get().config["gpu_layers"] == 1
    second = json.loads(run("load", "team/model", "--identifier", "second", "--gpu", "off", "--json"))
    assert (second["identifier"], second["status"], second["contextLength"]) == ("second", "ready", 512)
    lines = run("ps").splitlines()
    assert [line.split()[0] for line in lines] == ["IDENTIFIER", "second", "team/model"]
    assert "idle" in lines[1]
    assert [entry["queued"] for entry in json.loads(run("ps", "--json"))] == [0, 0]
    assert run("unload", "second") == "Unloaded second\n"
    assert run("unload", "--all") == "Unloaded team/model\n"
    assert run("unload", "--all") == "No model was loaded.\n"


def test_options_of_load_are_remembered_only_when_asked(micro: Path, worker: Callable[..., None]) -> None:
    run("import_model", str(micro), "--user-repo", "team/model")
    worker(ready)
    options = ["--parallel", "3", "--flash-attention", "on", "--v-cache-type", "q8_0", "--cpu-threads", "2", "--kv-cache-on-gpu", "off"]
    run("load", "model", *options, "--ttl", "90")
    instance = ModelInstance.objects.get()
    config = {"parallel": 3, "flash_attention": True, "v_cache_type": "q8_0", "cpu_threads": 2, "offload_kv_cache_to_gpu": False}
    assert instance.config == {**config, "context_length": 512}
    assert instance.ttl_seconds == 90
    assert "90 s" in run("ps") or "89 s" in run("ps")
    assert json.loads(run("ps", "--json"))[0]["ttlMs"] == 90_000
    assert InstalledModel.objects.get().load_defaults == {}
    run("load", "model", "--parallel", "5", "--remember", "--identifier", "five")
    assert InstalledModel.objects.get().load_defaults == {"parallel": 5}
    run("load", "model", "--cpu-threads", "1", "--identifier", "six")
    assert ModelInstance.objects.get(identifier="six").config == {"parallel": 5, "cpu_threads": 1, "context_length": 512}


def test_estimates_load_nothing(micro: Path, node: WorkerNode, tmp_path: Path) -> None:
    WorkerNode.objects.update(free_memory_bytes=8_000_000_000, total_memory_bytes=10_000_000_000)
    run("import_model", str(micro), "--user-repo", "team/model")
    said = run("load", "model", "--estimate-only", "--context-length", "512")
    lines = said.splitlines()
    assert (lines[0], lines[1]) == ("Model: team/model", "Context: 512 tokens, 16 answers at once")
    assert lines[2].startswith("Estimated GPU Memory:   ") == lines[3].startswith("Estimated Total Memory: ") is True
    assert "may be loaded" in said
    assert run("estimate", "model", "--context-length", "512") == said
    facts = json.loads(run("load", "model", "--estimate-only", "--json"))
    assert (facts["verdict"], facts["availableBytes"], facts["wouldUnload"]) == ("fits", 7_500_000_000, [])
    draft = make_micro(tmp_path / "draft.gguf", layers=1)
    run("import_model", str(draft), "--user-repo", "team/draft")
    guessed = json.loads(run("estimate", "team/model", "--draft-model", "team/draft", "--json"))
    assert guessed["neededBytes"] == facts["neededBytes"] + guessed["draftBytes"] > facts["neededBytes"]
    assert not ModelInstance.objects.exists()


def test_an_estimate_names_the_memory_on_the_gpu(micro: Path, node: WorkerNode) -> None:
    WorkerNode.objects.update(hardware={"has_gpu": True}, free_memory_bytes=8_000_000_000, total_memory_bytes=10_000_000_000)
    run("import_model", str(micro), "--user-repo", "team/model")
    whole = json.loads(run("estimate", "model", "--json"))
    assert (whole["verdict"], whole["gpuBytes"]) == ("unknown", whole["weightsBytes"] + whole["kvBytes"] + whole["computeBytes"])
    assert "Estimated GPU Memory:   0 B" in run("estimate", "model", "--gpu", "off")
    assert json.loads(run("estimate", "model", "--gpu", "off", "--json"))["verdict"] == "fits"
    half = json.loads(run("estimate", "model", "--gpu", "0.5", "--json"))
    assert 0 < half["gpuBytes"] < whole["gpuBytes"]
    WorkerNode.objects.update(hardware={})
    assert "has no GPU that llama.cpp can use" in run("estimate", "model")


def test_what_would_have_to_leave_is_said_and_leaves_only_when_asked(micro: Path, node: WorkerNode) -> None:
    WorkerNode.objects.update(free_memory_bytes=510_000_000, total_memory_bytes=10_000_000_000)
    run("import_model", str(micro), "--user-repo", "team/model")
    model = InstalledModel.objects.get()
    old = ModelInstance.objects.create(identifier="old", model=model, node=node, status="ready", memory_bytes=900_000_000)
    ModelInstance.objects.create(identifier="pinned", model=model, node=node, status="ready", memory_bytes=900_000_000, pinned=True)
    facts = json.loads(run("estimate", "model", "--json"))
    assert facts["verdict"] == "swap"
    assert facts["wouldUnload"] == [{"identifier": "old", "memoryBytes": 900_000_000, "generating": 0, "queued": 0}]
    assert "fits after unloading old (900 MB); load --make-room does that" in run("estimate", "model")
    from models_app import loading

    asked = loading.request_load(principal=None, model=model, make_room=True)
    assert asked.replaces == [old.pk]
    assert loading.request_load(principal=None, model=model).replaces == []
    ModelInstance.objects.filter(pk=old.pk).update(pinned=True)
    assert "cannot be loaded like this" in run("estimate", "model")


def test_failed_load_says_why(micro: Path, worker: Callable[..., None]) -> None:
    run("import_model", str(micro), "--user-repo", "team/model")
    worker(lambda i: ModelInstance.objects.filter(pk=i.pk).update(status="failed", error="Not enough memory: 9 GB needed."))
    with pytest.raises(CommandError, match="Not enough memory: 9 GB needed"):
        run("load", "team/model")


def test_load_without_a_worker(micro: Path) -> None:
    run("import_model", str(micro), "--user-repo", "team/model")
    with pytest.raises(CommandError, match="No worker is running"):
        run("load", "team/model")


@pytest.mark.parametrize("gpu", ["2", "-1", "lots", "nan"])
def test_bad_gpu(micro: Path, node: WorkerNode, gpu: str) -> None:
    run("import_model", str(micro), "--user-repo", "team/model")
    with pytest.raises(CommandError, match="--gpu"):
        run("load", "team/model", f"--gpu={gpu}")


def test_same_name_of_two_publishers(micro: Path) -> None:
    for publisher in ("a", "b"):
        run("import_model", str(micro), "--user-repo", f"{publisher}/model", "--copy")
    with pytest.raises(CommandError, match="a/model, b/model"):
        run("load", "model")


def test_exit_status_and_no_traceback(tmp_path: Path) -> None:
    """As a process: also when no database runs."""
    environment = {**os.environ, "LMWEB_DATA_DIR": str(tmp_path / "data"), "DJANGO_SETTINGS_MODULE": "lmweb.settings"}
    for args in (["ls"], ["import_model", "/nowhere.gguf"]):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "django", *args], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("CommandError: ")
        assert time.monotonic() - started < 20


# --- get --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_on_hub(hub: Hub, settings: Settings, tmp_path: Path) -> str:
    settings.HF_ENDPOINT = hub.url
    cache.clear()
    hub.add(
        Repo("acme/Got-GGUF", {"Got-F32.gguf": make_micro(tmp_path / "got.gguf").read_bytes(), "Got-Q8_0.gguf": b"x" * 5000}, downloads=5)
    )
    return "acme/Got-GGUF"


@pytest.fixture
def io_worker() -> Iterator[None]:
    """Work on downloads as the io worker does, from a thread, until the test ends."""
    stop = threading.Event()
    worker = transfer.Worker("test", uuid.uuid4(), threading.Event())

    def loop() -> None:
        while not stop.wait(0.02):
            for pk in Download.objects.filter(status="queued").values_list("pk", flat=True):
                transfer.run(pk, worker)
        connection.close()

    thread = threading.Thread(target=loop)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("io_worker")
def test_get(tiny_on_hub: str) -> None:
    assert "acme/got is installed." in run("get", f"{tiny_on_hub}@f32")
    assert "installed already" in run("get", f"https://huggingface.co/{tiny_on_hub}/blob/main/Got-F32.gguf")
    assert json.loads(run("get", f"{tiny_on_hub}@F32", "--json")) == {"status": "already_downloaded", "modelKey": "acme/got"}
    with pytest.raises(CommandError, match=r"no model|not a GGUF"):
        run("get", f"{tiny_on_hub}@q8_0", "--json")


@pytest.mark.django_db(transaction=True)
def test_bytes_that_are_no_text_are_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    import manage

    assert manage.django_command(["ls", "\udcff"]) == 1
    assert capsys.readouterr().err == "An argument is not valid UTF-8.\n"


def test_get_says_what_is_wrong(tiny_on_hub: str, hub: Hub) -> None:
    hub.add(Repo("acme/half", {"half-00001-of-00002.gguf": b"GGUF"}))
    answer = json.loads(run("get", "got", "--yes", "--json", "--no-wait"))
    assert (answer["repo"], answer["status"], answer["modelKey"]) == (tiny_on_hub, "queued", None)
    for words, message in (
        (["got"], "Several are possible"), (["no-such-thing", "--yes"], "no GGUF model"), (["acme/none"], "no model acme/none"),
        ([f"{tiny_on_hub}@q2"], "no quantization 'q2'"), (["https://evil.example/a/b"], "Only addresses"), ([], "Several are possible"),
        (["got", "--mlx", "--yes"], "no MLX model"), (["acme/half"], "acme/half has no complete model"),
    ):  # fmt: skip
        with pytest.raises(CommandError, match=message):
            run("get", *words)
    # For a program, what there is to choose from is JSON as well.
    for words, found in ((["got", "--json"], "models"), ([tiny_on_hub, "--json", "-a"], "quantizations")):
        out = io.StringIO()
        with pytest.raises(CommandError, match="Several are possible"):
            call_command("get", *words, stdout=out)
        assert json.loads(out.getvalue())[found]
    hub.down = True
    cache.clear()
    with pytest.raises(CommandError, match="cannot be reached"):
        run("get", tiny_on_hub)
