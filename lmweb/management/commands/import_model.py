"""``import_model``: take a GGUF file or an MLX directory into the models directory, as ``lms import`` does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from models_app import gguf, mlx, naming, placement, scan, services, virtual
from models_app.cli import ModelCommand, model_info, size
from models_app.models import InstalledModel
from models_app.placement import Mode
from workers.mlx_directory import CONFIG, read_directory

HAPPENED = {
    Mode.MOVE: "Moved it to",
    Mode.COPY: "Copied it to",
    Mode.HARD_LINK: "Hard-linked it as",
    Mode.SYMBOLIC_LINK: "Linked to it from",
}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{file} cannot be read: {error}") from None


class Command(ModelCommand):
    """Import a model file."""

    help = "Import a GGUF model file, or a directory in the MLX format. Without an option it is moved."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("file", nargs="?", type=Path, help="the .gguf file, the directory of an MLX model, or a model.yaml")
        parser.add_argument("--user-repo", metavar="PUBLISHER/NAME", help="where to store it; without, this is guessed from the file")
        mode = parser.add_mutually_exclusive_group()
        for flags, value, words in (
            (["--move"], Mode.MOVE, "move the file (the default)"),
            (["-c", "--copy"], Mode.COPY, "copy the file"),
            (["-L", "--hard-link"], Mode.HARD_LINK, "make a hard link to the file"),
            (["-l", "--symbolic-link"], Mode.SYMBOLIC_LINK, "make a symbolic link to the file"),
        ):
            mode.add_argument(*flags, dest="mode", action="store_const", const=value, help=words)
        parser.add_argument("-y", "--yes", action="store_true", help=argparse.SUPPRESS)  # as lms has it; nothing is asked here
        parser.add_argument("--dry-run", action="store_true", help="check the file and say what would be done")
        parser.add_argument(
            "--scan",
            nargs="?",
            const="",
            metavar="FOLDER",
            help="take in what lies in the models directory, or in another folder of LM Studio's layout (linked, unless --copy or another way)",
        )
        parser.add_argument("--starter", action="store_true", help="install the small starter model again after it was deleted")

    def handle(self, *_: Any, **options: Any) -> None:
        """Import, and say what happened."""
        if options["dry_run"] and (options["scan"] is not None or options["starter"]):
            raise CommandError("--dry-run is for a file or a directory.")
        if options["scan"] is not None:
            return self._scan(options)
        if options["starter"] == (options["file"] is not None):
            raise CommandError("Name the file to import, or give --starter or --scan.")
        mode: Mode = options["mode"] or Mode.MOVE
        if options["starter"]:
            model = services.ensure_starter(restore=True)
            if model is None:
                raise CommandError("The starter model could not be installed.")
            mode = Mode.COPY
        elif options["file"].suffix in {".yaml", ".yml"}:
            return self._virtual(options)
        elif options["dry_run"]:
            return self._dry_run(options, mode)
        else:
            with self.bar(desc="Copying", unit="B", unit_scale=True) as bar:

                def copied(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                source = options["file"]
                model = services.import_file(principal=None, source=source, user_repo=options["user_repo"], mode=mode, progress=copied)
        if options["json"]:
            return self.print_json(model_info(model))
        return self._say(model, mode)

    def _virtual(self, options: dict[str, Any]) -> None:
        text = _text(options["file"])
        model = virtual.read(text) if options["dry_run"] else virtual.install(principal=None, text=text)
        if options["json"]:
            return self.print_json(model_info(model))
        added = "Would add" if options["dry_run"] else "Added"
        self.stdout.write(f"{added} {model.key}, which runs on {model.base.key if model.base else 'nothing'}")
        return None

    def _scan(self, options: dict[str, Any]) -> None:
        folder = Path(options["scan"]) if options["scan"] else None
        found = scan.scan(principal=None, folder=folder, mode=options["mode"] or Mode.SYMBOLIC_LINK)
        if options["json"]:
            return self.print_json([{"path": each.path, "modelKey": each.key or None, "problem": each.problem or None} for each in found])
        for each in found:
            self.stdout.write(f"{each.path}: {f'added as {each.key}' if each.key else each.problem}")
        added = sum(bool(each.key) for each in found)
        self.stdout.write(f"{added} model{'' if added == 1 else 's'} added" if found else "Nothing new was found.")
        return None

    def _say(self, model: InstalledModel, mode: Mode) -> None:
        self.stdout.write(f"{HAPPENED[mode]} {model.file.parent if model.format == mlx.FORMAT else model.file}")
        facts = [model.architecture, model.params_string, model.quantization, size(model.size_bytes)]
        self.stdout.write(f"Imported {model.key} ({', '.join(facts)}, context {model.max_context_length})")

    def _dry_run(self, options: dict[str, Any], mode: Mode) -> None:
        file, user_repo = options["file"], options["user_repo"]
        if file.is_dir():
            source = mlx.check_source(file, mode)
            name, facts = CONFIG, mlx.describe(read_directory(source))
            guessed = naming.guess_directory(source)
        else:
            name, facts = naming.file_name(file.name), gguf.read_model(placement.check_source(file, mode))
            guessed = naming.guess_user_repo(file.name, facts)
        publisher, repo = naming.parse_user_repo(user_repo) if user_repo else guessed
        path = f"{publisher}/{repo}/{name}"
        key = services.free_key(publisher, repo, path, facts.quantization)
        target = placement.models_dir() / path.removesuffix(f"/{CONFIG}")
        if options["json"]:
            return self.print_json({"modelKey": key, "path": path, "mode": mode.value, "dryRun": True})
        self.stdout.write(f"Would {mode.value} {file} to {target} as {key}. Nothing was done.")
        return None
