"""Importing stores a good file once, under a safe name, and leaves nothing of a bad one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmweb.access import Principal
from lmweb.errors import Conflict, InvalidModelFile, InvalidRequest, LmwebError, PermissionDenied
from lmweb.models import User
from models_app import gguf, naming, placement, services
from models_app.models import InstalledModel
from models_app.placement import Mode
from tests.micro_models import make_micro
from tests.models.conftest import stored_files
from tests.models.hostile import VALID, hostile_files, mutants

pytestmark = pytest.mark.django_db
HOSTILE = hostile_files()


def test_move_stores_the_model(member: Principal, micro: Path, models_dir: Path) -> None:
    data = micro.read_bytes()
    model = services.import_file(principal=member, source=micro, user_repo="Acme/Tiny-Model-GGUF")
    assert (model.key, model.publisher, model.display_name) == ("acme/tiny-model", "Acme", "Micro Test")
    assert (model.architecture, model.quantization, model.bits_per_weight) == ("qwen2", "F32", 32.0)
    assert (model.params_string, model.max_context_length, model.size_bytes) == ("261K", 2048, len(data))
    assert model.path == "Acme/Tiny-Model-GGUF/Micro-Test-F32.gguf"
    assert model.imported_by == member.user
    assert model.file.read_bytes() == data
    assert not micro.exists()
    assert stored_files(models_dir) == ["Acme", "Acme/Tiny-Model-GGUF", model.path]


@pytest.mark.parametrize("mode", [Mode.COPY, Mode.HARD_LINK, Mode.SYMBOLIC_LINK])
def test_other_modes_keep_the_source(micro: Path, mode: Mode) -> None:
    model = services.import_file(principal=None, source=micro, user_repo="a/b", mode=mode)
    assert micro.exists()
    assert model.file.read_bytes() == micro.read_bytes()
    assert model.file.is_symlink() == (mode is Mode.SYMBOLIC_LINK)
    assert (model.file.stat().st_ino == micro.stat().st_ino) == (mode is not Mode.COPY)


def test_copy_reports_progress(micro: Path) -> None:
    seen: list[tuple[int, int]] = []
    services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY, progress=lambda *now: seen.append(now))
    assert seen[-1] == (micro.stat().st_size, micro.stat().st_size)


@pytest.mark.parametrize(
    ("file", "repo"),
    [
        ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "Qwen2.5-0.5B-Instruct"),
        ("llama.F16.gguf", "llama"),
        ("Thing-UD-IQ2_XXS.gguf", "Thing"),
        ("gpt-oss-MXFP4.GGUF", "gpt-oss"),
        ("my model (1).gguf", "my-model-1"),
        ("Modèle.gguf", "Modele"),
        ("...gguf", "model"),
        ("模型.gguf", "model"),
        ("a/../../b.gguf", "b"),
        ("C:\\Users\\x\\c.gguf", "c"),
        ("x" * 400 + ".gguf", "x" * 96),
    ],
)
def test_guessed_names(micro: Path, file: str, repo: str) -> None:
    publisher, name = naming.guess_user_repo(file, gguf.read_model(micro))
    assert (publisher, name) == ("local", repo)
    assert naming.parse_user_repo(f"{publisher}/{name}") == (publisher, name)
    assert len(naming.file_name(file)) <= 165


@pytest.mark.parametrize(
    "user_repo",
    [
        "", "/", "a", "a/", "/a", "a/b/c", "../b", "a/..", "./b", "a/.hidden", "a/b\\c", "a/b\x00", "a/b\nc", "a/b c", "а/b", "a/ｂ", "a/b\u202e",
        "a/" + "x" * 97, "a/b..c", "-a/b", "a/b.", "~/b", "C:/b", "a/b@c", "a//b", "%2e%2e/b",
    ],
)  # fmt: skip
def test_hostile_names_are_refused(micro: Path, models_dir: Path, user_repo: str) -> None:
    if user_repo == "":
        with pytest.raises(InvalidRequest):
            naming.parse_user_repo(user_repo)
        return
    with pytest.raises(InvalidRequest) as caught:
        services.import_file(principal=None, source=micro, user_repo=user_repo)
    assert caught.value.param in {"user_repo", "publisher", "name"}
    assert micro.exists()
    assert stored_files(models_dir) == []


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("mode", [Mode.MOVE, Mode.COPY])
def test_nothing_of_a_hostile_file_is_stored(tmp_path: Path, models_dir: Path, name: str, mode: Mode) -> None:
    file = tmp_path / "evil.gguf"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(InvalidModelFile):
        services.import_file(principal=None, source=file, user_repo="a/b", mode=mode)
    assert file.read_bytes() == HOSTILE[name]
    assert stored_files(models_dir) == []
    assert not InstalledModel.objects.exists()


def test_a_thousand_mutated_headers_through_the_import(tmp_path: Path, models_dir: Path) -> None:
    """What passes is stored as it is where it belongs, the rest stays where it was, and nothing else appears or goes anywhere."""
    source, stored = tmp_path / "mutant.gguf", 0
    seeds = [VALID.encode(), make_micro(tmp_path / "m.gguf", layers=1, quantization="q4_0").read_bytes()]
    around = sorted(path.name for path in tmp_path.iterdir())
    for number, data in enumerate(mutants(seeds, 1000, seed=11)):
        source.write_bytes(data)
        try:
            model = services.import_file(principal=None, source=source, user_repo=f"mutants/number-{number}")
        except InvalidModelFile:
            assert source.read_bytes() == data
            continue
        stored += 1
        assert model.file.read_bytes() == data
        assert not source.exists()
    source.unlink(missing_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*around, "models"])
    files = sorted(str(path.relative_to(models_dir)) for path in models_dir.rglob("*") if not path.is_dir())
    assert files == sorted(InstalledModel.objects.values_list("path", flat=True))
    assert 20 < stored < 500


def test_second_quantization_gets_its_name(tmp_path: Path) -> None:
    first = make_micro(tmp_path / "m-f32.gguf")
    second = make_micro(tmp_path / "m-q8_0.gguf", quantization="q8_0")
    third = make_micro(tmp_path / "again-q8_0.gguf", quantization="q8_0", seed=1)
    assert services.import_file(principal=None, source=first, user_repo="a/M").key == "a/m"
    assert services.import_file(principal=None, source=second, user_repo="a/M").key == "a/m@q8_0"
    with pytest.raises(Conflict, match="installed as a/m@q8_0"):
        services.import_file(principal=None, source=third, user_repo="a/m")
    assert third.exists()


def test_same_model_twice_is_a_conflict(micro: Path, models_dir: Path) -> None:
    services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY)
    before = stored_files(models_dir)
    with pytest.raises(Conflict, match="already installed as a/b"):
        services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY)
    assert stored_files(models_dir) == before


def test_stored_file_cannot_be_taken_away(micro: Path) -> None:
    model = services.import_file(principal=None, source=micro, user_repo="a/b")
    with pytest.raises(Conflict, match="installed already"):
        services.import_file(principal=None, source=model.file, user_repo="c/d")
    assert model.file.exists()


def test_foreign_file_in_the_way_is_kept(micro: Path, models_dir: Path) -> None:
    present = models_dir / "a" / "b" / micro.name
    present.parent.mkdir(parents=True)
    present.write_text("mine")
    with pytest.raises(Conflict, match="already a file"):
        services.import_file(principal=None, source=micro, user_repo="a/b")
    assert present.read_text() == "mine"
    assert micro.exists()
    assert not InstalledModel.objects.exists()


def test_folder_that_is_a_link_is_refused(micro: Path, models_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    models_dir.mkdir()
    (models_dir / "a").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="symbolic link"):
        services.import_file(principal=None, source=micro, user_repo="a/b")
    assert micro.exists()
    assert not InstalledModel.objects.exists()


def _missing(path: Path) -> Path:
    return path / "missing.gguf"


def _directory(path: Path) -> Path:
    (path / "folder.gguf").mkdir()
    return path / "folder.gguf"


def _pipe(path: Path) -> Path:
    os.mkfifo(path / "pipe.gguf")
    return path / "pipe.gguf"


def _loop(path: Path) -> Path:
    (path / "loop.gguf").symlink_to(path / "loop.gguf")
    return path / "loop.gguf"


def _dangling(path: Path) -> Path:
    (path / "dangling.gguf").symlink_to("/nowhere")
    return path / "dangling.gguf"


def _device(path: Path) -> Path:
    (path / "zero.gguf").symlink_to("/dev/zero")
    return path / "zero.gguf"


@pytest.mark.parametrize("make", [_missing, _directory, _pipe, _loop, _dangling, _device])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(InvalidRequest):
        services.import_file(principal=None, source=make(tmp_path), user_repo="a/b", mode=Mode.COPY)


def test_other_file_types_are_refused(tmp_path: Path) -> None:
    for name in ("model.bin", "model.safetensors", "model.pt", "gguf", "model.gguf.exe"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(InvalidRequest, match="GGUF format"):
            services.import_file(principal=None, source=tmp_path / name)


def test_symbolic_link_is_copied_but_not_moved(micro: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(micro)
    with pytest.raises(InvalidRequest, match="symbolic link"):
        services.import_file(principal=None, source=link, user_repo="a/b")
    model = services.import_file(principal=None, source=link, user_repo="a/b", mode=Mode.COPY)
    assert not model.file.is_symlink()
    assert model.file.name == "link.gguf"


def test_full_disk_is_said_before_copying(micro: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "RESERVED_BYTES", shutil.disk_usage("/").free * 2)
    with pytest.raises(Conflict, match="not enough space"):
        services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY)
    assert stored_files(models_dir) == []


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_failing_disk_leaves_nothing(micro: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((placement.os, "fsync", full) if failing == "fsync" else (Path, "rename", full)))
    with pytest.raises(Conflict, match="disk became full"):
        services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY)
    assert stored_files(models_dir) == []
    assert not InstalledModel.objects.exists()
    assert micro.exists()


def test_move_between_disks_copies(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(placement.os, "link", other_disk)
    data = micro.read_bytes()
    with pytest.raises(InvalidRequest, match="hard link"):
        services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.HARD_LINK)
    model = services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.MOVE)
    assert model.file.read_bytes() == data
    assert not micro.exists()


def test_file_that_changes_meanwhile_is_refused(micro: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = placement.Incoming._copy

    def swapped(self: placement.Incoming) -> None:
        make_micro(self.source, context=64)
        copy(self)

    monkeypatch.setattr(placement.Incoming, "_copy", swapped)
    with pytest.raises(InvalidModelFile, match="changed while"):
        services.import_file(principal=None, source=micro, user_repo="a/b", mode=Mode.COPY)
    assert stored_files(models_dir) == []


def test_permission_is_asked_first(stranger: User, tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied):
        services.import_file(principal=Principal(stranger), source=tmp_path / "missing.gguf")


# --- starter ----------------------------------------------------------------------------------------------------------


def test_starter_is_installed_once(models_dir: Path) -> None:
    model = services.ensure_starter()
    assert model is not None
    assert (model.key, model.publisher, model.imported_by) == ("lmweb/starter", "lmweb", None)
    assert model.description == services.STARTER_DESCRIPTION
    assert services.STARTER_FILE.exists()
    assert services.ensure_starter() == model
    assert InstalledModel.objects.count() == 1


def test_deleted_starter_stays_away_until_asked_for(boss: Principal) -> None:
    model = services.ensure_starter()
    assert model is not None
    services.delete_model(principal=boss, model=model)
    assert services.ensure_starter() is None
    assert not InstalledModel.objects.exists()
    assert services.ensure_starter(restore=True) is not None
    assert services.ensure_starter() is not None


def test_starter_comes_back_after_a_lost_database_or_file(models_dir: Path) -> None:
    model = services.ensure_starter()
    assert model is not None
    InstalledModel.objects.all().delete()
    again = services.ensure_starter()
    assert again is not None
    again.file.unlink()
    repaired = services.ensure_starter()
    assert repaired is not None
    assert repaired.file.is_file()


def test_every_error_is_ours(micro: Path) -> None:
    """No door of the import lets another exception through, whatever the name."""
    for name in ("x" * 300 + ".gguf", "\ud800.gguf", "a\x00b.gguf", " .gguf", "😀.gguf"):
        try:
            services.import_file(principal=None, source=micro, original_name=name, mode=Mode.COPY)
        except LmwebError:
            continue
    assert InstalledModel.objects.count() >= 1
