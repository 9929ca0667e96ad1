"""Files that lie in LM Studio's layout are found, once, and nothing outside the layout is touched."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import Client

from lmweb.access import Principal
from lmweb.errors import InvalidRequest, PermissionDenied
from lmweb.models import User
from models_app import placement, services
from models_app.models import InstalledModel
from models_app.placement import Mode
from models_app.scan import Found, scan
from tests.models.hostile import hostile_files

pytestmark = pytest.mark.django_db


def lay(root: Path, relative: str, source: Path) -> Path:
    target = root / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))


def test_the_models_directory_itself(micro: Path, member: Principal, models_dir: Path) -> None:
    services.import_file(principal=None, source=micro, user_repo="known/model", mode=Mode.COPY)
    mine = lay(placement.models_dir(), "bartowski/New-Model-GGUF/new.gguf", micro)
    lay(placement.models_dir(), ".incoming/x/left-over.gguf", micro)
    lay(placement.models_dir(), "too/shallow.gguf", micro)
    assert scan(principal=member) == [Found("bartowski/New-Model-GGUF/new.gguf", key="bartowski/new-model")]
    model = InstalledModel.objects.get(key="bartowski/new-model")
    assert (model.file, model.files.count(), model.imported_by) == (mine, 1, member.user)
    assert scan(principal=member) == []


def test_a_folder_of_lm_studio_is_linked(micro: Path, tmp_path: Path, models_dir: Path) -> None:
    folder = tmp_path / "lmstudio" / "models"
    theirs = lay(folder, "bartowski/New-Model-GGUF/new-Q4_K_M.gguf", micro)
    lay(folder, "bartowski/New-Model-GGUF/mmproj-new.gguf", micro)
    lay(folder, "bad name/x y/new.gguf", micro)
    (folder / "text" / "text").mkdir(parents=True)
    (folder / "text/text/bad.gguf").write_bytes(hostile_files()["text"])
    found = {each.path: each for each in scan(principal=None, folder=folder)}
    assert found["bartowski/New-Model-GGUF/new-Q4_K_M.gguf"].key == "bartowski/new-model"
    assert found["bad name/x y/new.gguf"].problem
    assert found["text/text/bad.gguf"].problem
    assert len(found) == 3
    model = InstalledModel.objects.get()
    assert model.file.is_symlink()
    assert model.file.resolve() == theirs
    services.delete_model(principal=None, model=model)
    assert theirs.exists()


def test_links_and_hostile_names_lead_nowhere(micro: Path, tmp_path: Path, models_dir: Path) -> None:
    root = placement.models_dir()
    outside = lay(tmp_path, "outside/secret/m.gguf", micro)
    (root / "evil").symlink_to(tmp_path / "outside")
    (root / "pub").mkdir()
    (root / "pub" / "evil").symlink_to(outside.parent)
    for name in ("a\nb.gguf", "..gguf", "x" * 200 + ".gguf", "ｅvil.gguf", "a;b.gguf"):
        lay(root, f"pub/model/{name}", micro)
    found = scan(principal=None)
    assert all(each.problem for each in found), found
    assert not InstalledModel.objects.exists()
    assert outside.exists()


def test_the_command_and_the_button(micro: Path, admin: User, stranger: User, models_dir: Path, tmp_path: Path) -> None:
    lay(placement.models_dir(), "a/b/c.gguf", micro)
    out = io.StringIO()
    call_command("import_model", "--scan", "--json", stdout=out)
    assert json.loads(out.getvalue()) == [{"path": "a/b/c.gguf", "modelKey": "a/b", "problem": None}]
    lay(placement.models_dir(), "a/other/c.gguf", micro)
    client = Client()
    client.force_login(admin)
    answer = client.post("/models/scan")
    assert "1 model added." in answer.headers["HX-Trigger"]
    assert "a/other" in answer.content.decode()
    client.force_login(stranger)
    assert client.post("/models/scan").status_code == 403
    with pytest.raises(PermissionDenied):
        scan(principal=Principal(stranger))
    for nowhere in (tmp_path / "nowhere", Path("~nobody-of-this-name/x"), Path("x" * 5000), Path("a\0b")):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            scan(principal=None, folder=nowhere)
    with pytest.raises(InvalidRequest, match="not a folder"):
        scan(principal=None, folder=micro)


def test_paths_on_the_server_from_the_browser(micro: Path, admin: User, owner: User, models_dir: Path, tmp_path: Path) -> None:
    """An admin names a file or a folder; it is linked, and whatever else is named is refused in words."""
    folder = tmp_path / "lmstudio" / "models"
    theirs = lay(folder, "bartowski/New-Model-GGUF/new.gguf", micro)
    lay(folder, "Directly-F32.gguf", micro)
    client = Client(raise_request_exception=False)
    client.force_login(admin)
    assert "2 models added." in client.post("/models/import-path", {"path": f" {folder} "}).headers["HX-Trigger"]
    assert "Nothing new was found." in client.post("/models/import-path", {"path": str(folder)}).headers["HX-Trigger"]
    linked = client.post("/models/import-path", {"path": str(micro), "mode": "hard-link"})
    assert "local/micro-test" in linked.content.decode()
    first, flat, second = InstalledModel.objects.order_by("key")
    assert flat.key == "local/directly"
    assert (first.file.resolve(), second.file.stat().st_ino) == (theirs, micro.stat().st_ino)
    (tmp_path / "bad.gguf").write_bytes(hostile_files()["text"])
    wrong = ["", "a\0b", "/nowhere", "~nobody-of-this-name/x", "/dev/zero", "/etc/passwd", "x" * 5000]
    wrong += [str(tmp_path / "bad.gguf"), str(second.file)]
    for path in wrong:
        assert client.post("/models/import-path", {"path": path}).status_code in {400, 409}, path
    client.force_login(owner)
    for path in (str(micro), str(folder)):
        assert client.post("/models/import-path", {"path": path}).status_code == 403
    assert InstalledModel.objects.count() == 3
