#!/usr/bin/env python3
"""The one command of lmweb: ``manage.py up`` starts everything, every other command works on the running instance.

Standard library only until the environment exists, so that it runs on a machine with nothing but Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent
USAGE = """\
Usage: python3 manage.py COMMAND [OPTIONS]

  up                   start everything: database, web server, workers (--host, --port, --data-dir)
  worker               run models on this machine for another one's installation
  node list            the machines that run models; token lets another one in, drain empties one
  token create         make an API token (--user NAME --name LABEL)
  get MODEL            find a model on the Hugging Face Hub and download it
  import_model FILE    add a GGUF file to My Models
  ls, ps               the models on disk; those in memory
  load, unload MODEL   bring a model into memory, or free it; estimate says what it takes
  createsuperuser      make an admin
  shell                a Python prompt with the models loaded
  test                 run the tests; lint: run the linters
  help --all           every other command

Each takes --data-dir DIR to name an installation other than the default one.
"""
LINTERS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports", "--no-logo"),
)


def main(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this very file may be started by an older one)
        print(f"lmweb needs Python 3.11 or newer; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 1
    arguments = take_data_dir(arguments)
    if arguments in (["help"], ["--help"], ["-h"]):
        print(USAGE)
        return 0
    command = arguments[0]

    from lmweb import bootstrap, env

    try:
        env.check()
    except ValueError as error:
        sys.exit(str(error))
    bootstrap.enter(REPOSITORY, dev=command in {"test", "lint"})
    if command in {"up", "worker"}:
        from lmweb.supervisor.main import run

        return run(command, arguments[1:])
    if command == "test":
        # The whole suite runs several files at a time, each process with an installation of its own; a part of it runs in one.
        selection = arguments[1:] or ["-n", str(min(4, (os.cpu_count() or 1) + 1)), "--dist", "loadfile"]
        return subprocess.call([sys.executable, "-m", "pytest", *selection], cwd=REPOSITORY)
    if command == "lint":
        return lint()
    return django_command(["help"] if arguments == ["help", "--all"] else arguments)


def take_data_dir(arguments: list[str]) -> list[str]:
    """Move ``--data-dir`` into the environment, where every process of ours finds it, and return the other arguments."""
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--data-dir":
            chosen = value if equals else next(remaining, "")
            if not chosen:
                sys.exit("--data-dir needs a directory.")
            os.environ["LMWEB_DATA_DIR"] = str(Path(chosen).expanduser().absolute())
        else:
            rest.append(argument)
    return rest or ["help"]


def lint() -> int:
    """Run every linter, also after one has failed, and return how many did."""
    tools = Path(sys.executable).parent
    commands = [(str(tools / name), *rest) for name, *rest in LINTERS]
    # It warns that no database runs, which it does not need.
    migrations = (str(REPOSITORY / "manage.py"), "makemigrations", "--check", "--dry-run")
    commands.append((sys.executable, "-W", "ignore::RuntimeWarning", *migrations))
    failed = 0
    for line in commands:
        print(f"$ {Path(line[0]).name} {' '.join(line[1:])}", flush=True)
        failed += subprocess.call(line, cwd=REPOSITORY) != 0
    return failed


def django_command(arguments: list[str]) -> int:
    """Run a management command; no running instance is a sentence, not a traceback."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lmweb.settings")
    from django.core.management import execute_from_command_line
    from django.db import OperationalError
    from redis.exceptions import ConnectionError as RedisConnectionError

    from lmweb.errors import LmwebError
    from lmweb.supervisor.main import describe_services

    try:
        execute_from_command_line(["manage.py", *arguments])
    except (OperationalError, RedisConnectionError) as error:
        print(f"{describe_services()}\n({str(error).strip().splitlines()[0]})", file=sys.stderr)
        return 1
    except LmwebError as error:
        print(error.message, file=sys.stderr)
        return 1
    except UnicodeEncodeError:  # bytes that are no text, on their way to the database
        print("An argument is not valid UTF-8.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
