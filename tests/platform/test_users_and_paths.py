"""Root, ordinary users, and data directories in awkward places."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from lmweb.supervisor import embedded
from lmweb.supervisor.identity import unprivileged
from tests.live import Live

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change users")


def owner(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


@pytest.fixture
def installation():
    """Make an installation below a directory that only its owner may enter, with a blank in a path too long for sockets."""
    parent = Path(tempfile.mkdtemp(prefix="lmweb-live-"))
    assert stat.S_IMODE(parent.stat().st_mode) == 0o700
    live = Live(parent / "a name with blanks" / ("long-" * 22) / "data")
    live.data_dir.parent.mkdir(parents=True)
    yield live
    if live.supervisor is not None:
        live.stop()
    shutil.rmtree(parent)


def test_private_parent_and_long_path_with_blanks(installation):
    installation.start()
    installation.create_admin()
    assert installation.rows("SELECT username FROM lmweb_user") == [("admin",)]
    assert (installation.data_dir / "models").stat().st_mode & 0o077 == 0
    sockets = embedded.run_dir(installation.data_dir)
    assert sockets != installation.data_dir / "run"
    assert len(os.fsencode(sockets)) < 80
    pids = installation.processes
    if os.geteuid() == 0:
        assert owner(pids["postgres"]) != 0
    installation.stop()
    assert not sockets.exists()


@as_root
def test_ordinary_user(installation):
    nobody = pwd.getpwnam("nobody")
    parent = installation.data_dir.parent
    for directory in (parent, parent.parent, parent.parent.parent):
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    # The environment's Python may lie in root's home directory; to enter it is the only right that is passed on.
    rights = "-all,+dac_read_search"
    change = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
    installation.environment["HOME"] = str(parent)
    installation.environment.pop("XDG_RUNTIME_DIR", None)
    installation.start(prefix=(*change, f"--inh-caps={rights}", f"--ambient-caps={rights}", f"--bounding-set={rights}", "--"))
    assert {owner(pid) for pid in installation.processes.values()} == {nobody.pw_uid}
    installation.wait_healthy()
    assert installation.stop() == 0


@as_root
def test_capability_is_kept_only_where_it_is_needed(tmp_path):
    public = Path(tempfile.mkdtemp(dir="/tmp"))
    public.chmod(0o755)
    private = public / "private"
    private.mkdir(mode=0o700)
    try:
        assert not any("ambient" in part for part in unprivileged([public / "data"], death_signal=signal.SIGINT).prefix)
        assert any(
            "ambient-caps=-all,+dac_read_search" in part for part in unprivileged([private / "data"], death_signal=signal.SIGINT).prefix
        )
    finally:
        shutil.rmtree(public)


def test_foreign_socket_directory_is_refused(tmp_path, monkeypatch):
    from lmweb.errors import ServiceUnavailable

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    long = tmp_path / ("x" * 100)
    expected = embedded.run_dir(long)
    expected.rmdir()
    expected.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ServiceUnavailable, match="somebody else"):
        embedded.run_dir(long)
