"""Directories in the MLX format: what is read from them, what is refused, and how they come in and go."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from django.conf import settings
from django.http import QueryDict
from django.test import Client

from lmweb.access import Principal
from lmweb.errors import Conflict, InvalidModelFile, InvalidRequest
from lmweb.models import User
from models_app import drafts, mlx, services, verify
from models_app.defaults import check_config
from models_app.forms import LoadForm
from models_app.memory import estimate_model, read_shape
from models_app.models import InstalledModel, ModelFile
from models_app.placement import Mode
from models_app.scan import Found, scan, take_in
from tests.hub.server import Hub, Repo
from tests.micro_models import make_micro, make_micro_mlx
from tests.models.conftest import stored_files
from tests.models.test_downloads import ask, endpoint, run, worker  # noqa: F401  (fixtures)
from workers import mlx_directory
from workers.memory import estimate
from workers.schemas import LoadConfig

pytestmark = pytest.mark.django_db
PARTS = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a directory outside the models directory."""
    return make_micro_mlx(tmp_path / "Tiny-Model").parent


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_directory_is_moved_in(source: Path, member: Principal, models_dir: Path) -> None:
    size = sum(file.stat().st_size for file in source.iterdir())
    (source / "README.md").write_text("read me")
    model = services.import_file(principal=member, source=source, user_repo="Acme/Tiny-MLX")
    assert (model.key, model.format, model.architecture, model.quantization) == ("acme/tiny-mlx", "mlx", "qwen2", "F32")
    assert (model.params_string, model.max_context_length, model.size_bytes) == ("261K", 2048, size)
    assert "<|im_start|>" in model.chat_template
    assert sorted(file.path for file in model.files.all()) == [f"Acme/Tiny-MLX/{name}" for name in PARTS]
    assert model.files.get(role=ModelFile.Role.WEIGHTS).path == "Acme/Tiny-MLX/model.safetensors"
    assert names(source) == ["README.md"], "what is no part of the model stays where it was"
    services.delete_model(principal=None, model=model)
    assert stored_files(models_dir) == []


@pytest.mark.parametrize("mode", [Mode.COPY, Mode.HARD_LINK, Mode.SYMBOLIC_LINK])
def test_other_modes_keep_the_source(source: Path, mode: Mode) -> None:
    model = services.import_file(principal=None, source=source, mode=mode)
    assert model.key == "local/tiny-model"
    assert names(source) == PARTS
    assert model.file.is_symlink() == (mode is Mode.SYMBOLIC_LINK)
    mlx_directory.read_directory(model.file.parent)
    with pytest.raises(Conflict):
        services.import_file(principal=None, source=source, mode=mode)


def test_what_was_changed_is_found_by_verification(source: Path) -> None:
    model = services.import_file(principal=None, source=source)
    verify.run(model.pk)
    verify.run(model.pk)
    model.refresh_from_db()
    assert model.verification["status"] == "ok"
    with (model.file.parent / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"?")
    verify.run(model.pk)
    model.refresh_from_db()
    assert model.verification["status"] == "failed"
    assert "model.safetensors" in model.verification["message"]


def test_scans_find_directories(source: Path, models_dir: Path, tmp_path: Path) -> None:
    target = Path(settings.MODELS_DIR) / "acme" / "Tiny"
    target.parent.mkdir(parents=True)
    shutil.copytree(source, target)
    assert scan(principal=None) == [Found("acme/Tiny/config.json", key="acme/tiny")]
    assert scan(principal=None) == []
    theirs = tmp_path / "lmstudio" / "mlx-community" / "Other-4bit"
    theirs.parent.mkdir(parents=True)
    shutil.copytree(source, theirs)
    (tmp_path / "lmstudio" / "mlx-community" / "notes").mkdir()
    (tmp_path / "lmstudio" / "mlx-community" / "notes" / "config.json").write_text("{}")
    assert [each.key for each in scan(principal=None, folder=tmp_path / "lmstudio")] == ["mlx-community/other-4bit"]
    assert InstalledModel.objects.get(key="mlx-community/other-4bit").file.is_symlink()


def test_an_admin_names_a_directory_on_the_server(source: Path, boss: Principal) -> None:
    (found,) = take_in(principal=boss, path=source, mode=Mode.SYMBOLIC_LINK)
    assert found.key == "local/tiny-model"
    assert InstalledModel.objects.get().file.resolve() == source / "config.json"


def edit(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def void(_: object) -> None:
    """Return None."""


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "module": (edit("config.json", model_file="evil.py"), "model_file"),
    "nested module": (edit("config.json", text_config={"model_file": "evil.py"}), "model_file"),
    "python": (write("modeling_evil.py", b"import os"), "program code"),
    "library": (write("kernel.so", b"\x7fELF"), "program code"),
    "pickle": (write("pytorch_model.bin", pickle.dumps({})), "pickle"),
    "numpy": (write("weights.npz", b"PK"), "pickle"),
    "link out": (link("tokenizer.json", "/etc/hostname"), "leads out"),
    "weights link out": (link("model-extra.safetensors", "../../secret"), "leads out"),
    "type is a path": (edit("config.json", model_type="../../os"), "model_type"),
    "type is a module": (edit("config.json", model_type="base.x"), "model_type"),
    "no type": (edit("config.json", model_type=None), "model_type"),
    "huge layers": (edit("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "negative": (edit("config.json", vocab_size=-1), "vocab_size"),
    "infinite": (edit("config.json", hidden_size=float("inf")), "hidden_size"),
    "deep": (write("config.json", b'{"a":' * 200_000), "valid JSON"),
    "list": (write("config.json", b"[]"), "JSON object"),
    "binary": (write("config.json", bytes(range(256))), "valid JSON"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
    "no weights": (remove("model.safetensors"), "no weights"),
    "directory for a file": (lambda folder: (remove("tokenizer.json")(folder), (folder / "tokenizer.json").mkdir())[1], "regular file"),
    "short": (write("model.safetensors", b"\x01"), "header"),
    "header too long": (write("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), "header"),
    "no object": (write("model.safetensors", struct.pack("<Q", 2) + b"[]"), "JSON object"),
    "unknown type": (write("model.safetensors", header(a={"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 1]})), "known type"),
    "wrong size": (write("model.safetensors", header(a={"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}) + b"1234"), "another size"),
    "negative offset": (write("model.safetensors", header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]})), "place"),
    "boolean shape": (write("model.safetensors", header(a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}) + b"1234"), "shape"),
    "gap": (write("model.safetensors", header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"12345678"), "gaps"),
    "cut off": (write("model.safetensors", header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"1234"), "not complete"),
    "missing part": (write("model.safetensors.index.json", b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'), "missing"),
    "part elsewhere": (write("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'), "missing"),
    "strange index": (write("model.safetensors.index.json", b'{"weight_map": [1]}'), "where the weights"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_directories_are_refused_in_words(source: Path, models_dir: Path, name: str) -> None:
    change, words = HOSTILE[name]
    change(source)
    before = names(source)
    with pytest.raises(InvalidModelFile, match=words):
        services.import_file(principal=None, source=source, user_repo="a/b")
    assert names(source) == before
    assert stored_files(models_dir) == []
    assert not InstalledModel.objects.exists()


def test_templates_and_names_that_no_database_takes(source: Path) -> None:
    edit("tokenizer_config.json", chat_template="a\x00b\ud800c")(source)
    assert services.import_file(principal=None, source=source).chat_template == "ab?c"


@pytest.mark.parametrize(
    ("change", "template"),
    [
        (edit("tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]), "D"),
        (write("chat_template.jinja", b"J"), "J"),
        (edit("tokenizer_config.json", chat_template=7), ""),
    ],
)
def test_where_templates_come_from(source: Path, change: Callable[[Path], None], template: str) -> None:
    change(source)
    assert mlx.describe(mlx_directory.read_directory(source)).chat_template == template


def test_precision_and_size_of_a_quantized_model(source: Path) -> None:
    words = {"dtype": "U32", "shape": [100, 8], "data_offsets": [0, 3200]}
    scales = {"dtype": "BF16", "shape": [100, 1], "data_offsets": [3200, 3400]}
    (source / "model.safetensors").write_bytes(header(**{"a.weight": words, "a.scales": scales}) + bytes(3400))
    edit("config.json", quantization={"bits": 4, "group_size": 64})(source)
    model = mlx.describe(mlx_directory.read_directory(source))
    assert (model.quantization, model.bits_per_weight, model.parameters) == ("4bit", 4.0, 100 * 64)


def test_an_estimate_counts_keys_and_values_as_the_engine_does(source: Path, tmp_path: Path) -> None:
    edit("config.json", head_dim=32)(source)  # wider than its share
    model = services.import_file(principal=None, source=source)
    found = estimate_model(model, LoadConfig(context_length=1024, parallel=2), on_gpu=True)
    assert found.gpu_bytes == 0
    assert found.kv_bytes == 2 * 2 * 2 * 32 * 4 * 2048  # layers x (keys, values) x heads x width x bytes x cells
    gguf = read_shape(make_micro(tmp_path / "m.gguf"))
    assert found.needed_bytes > estimate(gguf, LoadConfig(context_length=1024, parallel=2)).needed_bytes


def test_options_that_the_engine_lacks_are_refused_before_the_load(source: Path, tmp_path: Path, member: Principal) -> None:
    model = services.import_file(principal=None, source=source)
    with pytest.raises(InvalidRequest, match="precision of the model") as refused:
        check_config(model, LoadConfig(k_cache_type="q8_0"))
    assert refused.value.param == "k_cache_type"
    draft = services.import_file(principal=None, source=make_micro(tmp_path / "draft.gguf", layers=1), user_repo="a/draft")
    with pytest.raises(InvalidRequest, match="one answer at a time"):
        drafts.check_draft(None, model, draft.key)
    assert drafts.compatible_drafts(member, model) == []


def test_my_models_shows_the_format(source: Path, admin: User) -> None:
    model = services.import_file(principal=None, source=source)
    client = Client()
    client.force_login(admin)
    assert ">MLX<" in client.get("/models/").content.decode()
    page = client.get(f"/models/{model.pk}/").content.decode()
    assert "model.safetensors" in page
    assert ">MLX<" in page


def test_options_that_the_engine_lacks_cannot_be_chosen_and_say_why(source: Path) -> None:
    form = LoadForm(services.import_file(principal=None, source=source), QueryDict("context_length=512&parallel=2&k_cache_type=q8_0"))
    assert form.is_valid(), form.errors
    assert form.config() == LoadConfig(context_length=512, parallel=2)
    assert "disabled" in str(form["draft_model"])
    assert "precision of the model" in form["k_cache_type"].help_text
    assert "disabled" not in str(form["eval_batch_size"])


@pytest.mark.usefixtures("endpoint")
def test_a_directory_is_downloaded_as_one_model(source: Path, hub: Hub, boss: Principal, worker: object, models_dir: Path) -> None:  # noqa: F811
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    hub.add(Repo("mlx-community/Tiny-4bit", {**files, "README.md": b"# Tiny", "run.py": b"evil"}, tags=["mlx"]))
    done = run(ask(boss, "mlx-community/Tiny-4bit"), worker)  # type: ignore[arg-type]
    assert done.status == "completed", done.error_message
    assert done.model is not None
    assert (done.model.key, done.model.format) == ("mlx-community/tiny-4bit", "mlx")
    assert names(done.model.file.parent) == PARTS
    assert done.model.files.get(role=ModelFile.Role.WEIGHTS).sha256
    assert done.model.file.parent.joinpath("model.safetensors").read_bytes() == files["model.safetensors"]


@pytest.mark.usefixtures("endpoint")
def test_a_download_that_is_no_model_is_refused(source: Path, hub: Hub, boss: Principal, worker: object, models_dir: Path) -> None:  # noqa: F811
    edit("config.json", model_file="evil.py")(source)
    hub.add(Repo("evil/Tiny-4bit", {file.name: file.read_bytes() for file in source.iterdir()}, tags=["mlx"]))
    done = run(ask(boss, "evil/Tiny-4bit"), worker)  # type: ignore[arg-type]
    assert done.status == "failed"
    assert "model_file" in done.error_message
    assert not InstalledModel.objects.exists()
