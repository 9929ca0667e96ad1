"""Running a program with fewer rights than root, and tying its life to its parent's.

PostgreSQL refuses to run as root, so root starts it as another user. Its files may lie below a directory that only root can
enter (``/root``, ``mktemp -d``); then, and only then, the process keeps the one capability it needs to get there.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lmweb.errors import ServiceUnavailable

_PR_SET_PDEATHSIG = 1
_CAPABILITY_BITS = {"dac_read_search": 2, "dac_override": 1}


@dataclass(frozen=True)
class Identity:
    """The user that a service runs as; ``prefix`` is what to put before its command (empty: run as we are)."""

    uid: int
    gid: int
    prefix: tuple[str, ...] = ()

    def own(self, path: Path) -> None:
        """Make the user the owner of a directory that nobody else may enter."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if path.stat().st_uid != self.uid:
            os.chown(path, self.uid, self.gid)


def unprivileged(paths: Iterable[Path], *, death_signal: signal.Signals) -> Identity:
    """Return who runs a service that root must not run and that needs to reach ``paths``.

    For an ordinary user that is the user. Raises ``ServiceUnavailable`` when root cannot change to another user.
    """
    if os.geteuid() != 0:
        return Identity(os.geteuid(), os.getegid())
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ServiceUnavailable(
            "PostgreSQL does not run as root, and the program 'setpriv' (package util-linux) that starts it as another user is missing. "
            "Install it, start lmweb as an ordinary user, or give a DATABASE_URL."
        )
    account = _account()
    prefix = [setpriv, f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    if not all(_reachable(path, account.pw_uid, account.pw_gid) for path in paths):
        capability = _traversal_capability()
        keep = f"-all,+{capability}"
        prefix += [f"--inh-caps={keep}", f"--ambient-caps={keep}", f"--bounding-set={keep}"]
    else:
        prefix += ["--inh-caps=-all", "--bounding-set=-all"]
    # Changing the user forgets the signal that a dying parent would send; setpriv asks for it again.
    prefix += [f"--pdeathsig={death_signal.name.removeprefix('SIG')}", "--"]
    return Identity(account.pw_uid, account.pw_gid, tuple(prefix))


def die_with_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    """Return a ``preexec_fn`` that has the kernel send the signal when the starting *thread* ends; None where it cannot.

    Linux follows the thread that forked: call from a thread that lives as long as its process.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


def _account() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServiceUnavailable("PostgreSQL does not run as root, and this machine has neither a user 'postgres' nor 'nobody'.")


def _reachable(path: Path, uid: int, gid: int) -> bool:
    """Whether this user may enter every existing directory on the way to ``path``, links resolved."""
    for directory in path.resolve().parents:
        try:
            info = directory.stat()
        except FileNotFoundError:
            continue
        wanted = stat.S_IXUSR if info.st_uid == uid else stat.S_IXGRP if info.st_gid == gid else stat.S_IXOTH
        if not info.st_mode & wanted:
            return False
    return True


def _traversal_capability() -> str:
    """Return the smallest capability that this process holds and that enters directories of others."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            for name, bit in _CAPABILITY_BITS.items():
                if held >> bit & 1:
                    return name
    raise ServiceUnavailable(
        "The data directory lies below a directory that only root can enter, and this process may not pass that right on. "
        "Choose another --data-dir or start lmweb as an ordinary user."
    )
