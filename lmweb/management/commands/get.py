"""``get``: search and download models, as ``lms get`` does."""

from __future__ import annotations

import sys
import time
from typing import Any

from django.core.management.base import CommandParser

from lmweb.errors import Conflict, InvalidRequest, LmwebError, OutboundFailed
from models_app import catalog, downloads, hub
from models_app.cli import ModelCommand, size
from models_app.load_options import whole_number
from models_app.models import Download, InstalledModel
from models_app.variants import Variant

POLL_SECONDS = 0.5
DEFAULT_LIMIT = 10
AMBIGUOUS = "Several are possible. Name one of them, or take the first with --yes."


class Command(ModelCommand):
    """Find a model on the Hub, have the io worker download it, and show how far it is."""

    help = "Search and download models from the Hugging Face Hub."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        super().add_arguments(parser)
        parser.add_argument("model", nargs="?", default="", help="keywords, user/repo or an address; @q4_k_m chooses a quantization")
        only = parser.add_mutually_exclusive_group()
        only.add_argument("--gguf", action="store_true", help="only GGUF models (the default)")
        only.add_argument("--mlx", action="store_true", help="only MLX models")
        parser.add_argument("-n", "--limit", type=whole_number(1, 100), default=DEFAULT_LIMIT, metavar="N", help="how many results to show")
        parser.add_argument("--always-show-all-results", action="store_true", help="choose among results also when one is named exactly")
        parser.add_argument("-a", "--always-show-download-options", action="store_true", help="always choose the quantization")
        parser.add_argument("-y", "--yes", action="store_true", help="take the first result and the recommended quantization")
        parser.add_argument("--no-wait", action="store_true", help="start the download and return at once")

    def handle(self, *_: Any, **options: Any) -> None:
        """Choose, start, watch."""
        text: str = options["model"]
        quantization = ""
        if "://" not in text:
            text, quantization = text.split("@", 1) if "@" in text else (text, "")
        found = downloads.find(self._choose_model(text.strip(), options), quantization)
        variant = found.chosen
        if options["always_show_download_options"] or (not quantization and self._asks(options) and len(found.offered) > 1):
            variant = self._choose_variant(found.offered, found.chosen, options)
        asked = downloads.ask(principal=None, repository=found.repository, variant=variant)
        if asked.installed is not None:
            return self._say_installed(asked.installed, options)
        assert asked.download is not None
        if not options["json"]:
            name = f"{asked.download.repo} {asked.download.label} ({size(asked.download.total_bytes)})"
            self.stdout.write(f"Downloading {name}, job {asked.download.pk}")
        if options["no_wait"]:
            return self.print_json(_info(asked.download)) if options["json"] else None
        done = self._watch(asked.download)
        if options["json"]:
            return self.print_json(_info(done))
        self.stdout.write(f"{done.model.key if done.model else done.repo} is installed.")
        return None

    # --- choosing -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _asks(options: dict[str, Any]) -> bool:
        """Whether somebody is there to choose."""
        return not options["yes"] and not options["json"] and sys.stdin.isatty()

    def _choose_model(self, text: str, options: dict[str, Any]) -> str:
        """Return a name that means one repository."""
        named = bool(text) and (catalog.find(text) is not None or hub.parse_reference(text) is not None)
        if named and not options["always_show_all_results"]:
            return text
        if text:
            results = hub.search(text, model_format="mlx" if options["mlx"] else "gguf", limit=options["limit"])
            names = [f"{found.repo}  ({found.downloads:,} downloads)" for found in results]
            chosen = [found.repo for found in results]
        else:
            picks = catalog.picks()[: options["limit"]]
            names = [f"{pick.model}  {pick.params}  {pick.description}" for pick in picks]
            chosen = [pick.model for pick in picks]
        if not chosen:
            raise InvalidRequest(f"The Hub has no {'MLX' if options['mlx'] else 'GGUF'} model for '{text}'.")
        if options["yes"]:
            return chosen[0]
        if options["json"]:
            self.print_json({"models": chosen})
            raise InvalidRequest(AMBIGUOUS)
        return chosen[self._choose("Models:" if text else "Staff picks:", names)]

    def _choose_variant(self, offered: list[Variant], default: Variant, options: dict[str, Any]) -> Variant:
        if options["json"]:
            self.print_json({"quantizations": [{"name": each.label, "sizeBytes": each.size_bytes} for each in offered]})
            raise InvalidRequest(AMBIGUOUS)
        lines = [f"{variant.label}  {size(variant.size_bytes)}{'  (recommended)' if variant is default else ''}" for variant in offered]
        return offered[self._choose("Quantizations:", lines, offered.index(default))]

    def _choose(self, title: str, lines: list[str], default: int = 0) -> int:
        """Show numbered lines and return the index of the chosen one. Raises ``InvalidRequest`` where nobody can choose."""
        self.stdout.write(title)
        for number, line in enumerate(lines, 1):
            self.stdout.write(f"  {number:>2}  {line}")
        if not sys.stdin.isatty():
            raise InvalidRequest(AMBIGUOUS)
        answer = input(f"Number [{default + 1}]: ").strip()
        if not answer:
            return default
        if not (answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(lines)):
            raise InvalidRequest(f"'{answer[:20]}' is no number from 1 to {len(lines)}.")
        return int(answer) - 1

    def _say_installed(self, model: InstalledModel, options: dict[str, Any]) -> None:
        if options["json"]:
            return self.print_json({"status": "already_downloaded", "modelKey": model.key})
        self.stdout.write(f"{model.key} is installed already.")
        return None

    # --- watching -----------------------------------------------------------------------------------------------------

    def _watch(self, download: Download) -> Download:
        """Wait for the end, with a bar. Ctrl-C leaves the download to the server."""
        try:
            with self.bar(total=download.total_bytes, unit="B", unit_scale=True) as bar:
                while True:
                    now = Download.objects.select_related("model").get(pk=download.pk)
                    if now.status == Download.Status.COMPLETED:
                        return now
                    if not now.is_unfinished:
                        raise _failure(now)
                    bar.set_description(now.note or now.get_status_display(), refresh=False)
                    bar.update(now.done_bytes - bar.n)
                    time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self.stderr.write("The server goes on with the download; Activity in the browser shows it.")
            raise


def _failure(download: Download) -> LmwebError:
    if download.status == Download.Status.FAILED:
        return OutboundFailed(download.error_message)
    return Conflict(f"The download was {download.get_status_display().lower()}.")


def _info(download: Download) -> dict[str, Any]:
    return {
        "jobId": download.pk,
        "status": download.status,
        "modelKey": download.model.key if download.model else None,
        "repo": download.repo,
        "quantization": download.label,
        "totalSizeBytes": download.total_bytes,
        "downloadedBytes": download.done_bytes,
    }
