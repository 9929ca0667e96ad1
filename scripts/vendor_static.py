"""Fetch the third-party browser files again at the versions pinned here: ``python scripts/vendor_static.py`` (needs npm).

Writes ``static/vendor/`` with the licence of each package and the list ``VENDORED.md``. To update one, change its version, run
this, run the browser tests and commit the result.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "static" / "vendor"

# package: (version, file in the package, name here, licence file, what it is for)
PACKAGES = {
    "htmx.org": ("2.0.11", "dist/htmx.min.js", "htmx.min.js", "LICENSE", "page parts without page loads"),
    "marked": ("18.2.1", "lib/marked.umd.js", "marked.umd.js", "LICENSE", "Markdown of answers"),
    "dompurify": ("3.4.18", "dist/purify.min.js", "purify.min.js", "LICENSE", "cleans what Markdown became"),
}
LUCIDE_VERSION = "1.62.0"
ICONS = """
activity arrow-down arrow-up arrow-up-down ban book-open box braces brain check chevron-down chevron-left chevron-right chevron-up
circle-alert circle-check circle-help circle-stop clock code-xml copy cpu download ellipsis ellipsis-vertical external-link eye eye-off
file file-up folder gauge hard-drive hash house info key-round layers link list loader-circle log-out memory-stick menu message-square
message-square-plus monitor moon package panel-left panel-right pencil pin play plus plug power refresh-cw rotate-ccw search send server
settings shield sliders-horizontal sparkles square sun terminal timer trash-2 triangle-alert upload user users wifi-off wrench x
""".split()  # noqa: SIM905  (readable as it is)


def install(folder: Path, packages: list[str]) -> Path:
    """Install exact npm packages into a folder without running their scripts and return its ``node_modules``."""
    (folder / "package.json").write_text("{}")
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages], cwd=folder, check=True)
    return folder / "node_modules"


def sprite(icons: Path) -> str:
    """Return one SVG that holds every icon as a symbol; stroke and fill come from the style sheet."""
    symbols = []
    for name in sorted(ICONS):
        body = re.search(r"<svg[^>]*>(.*)</svg>", (icons / f"{name}.svg").read_text(), re.DOTALL)
        if body is None:
            raise ValueError(f"{name}.svg is not an icon")
        symbols.append(f'<symbol id="{name}" viewBox="0 0 24 24">{re.sub(chr(10) + " *", "", body[1])}</symbol>')
    return '<svg xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(symbols) + "\n</svg>\n"


def main() -> None:
    """Fetch everything and write the list."""
    lines = ["# Vendored files", "", "Made by `scripts/vendor_static.py`; do not edit by hand.", ""]
    lines += ["| file | npm package | version | licence | for |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        specs = [f"{name}@{version}" for name, (version, *_) in PACKAGES.items()]
        modules = install(Path(temporary), [*specs, f"lucide-static@{LUCIDE_VERSION}"])
        for name, (version, source, target, licence_file, purpose) in PACKAGES.items():
            text = (modules / name / source).read_text()
            (TARGET / target).write_text(re.sub(r"\n?//# sourceMappingURL=.*\n?", "\n", text))
            shutil.copy(modules / name / licence_file, TARGET / f"{target.split('.')[0]}.LICENSE.txt")
            licence = json.loads((modules / name / "package.json").read_text())["license"]
            lines.append(f"| `{target}` | {name} | {version} | {licence} | {purpose} |")
        (TARGET / "lucide.svg").write_text(sprite(modules / "lucide-static" / "icons"))
        shutil.copy(modules / "lucide-static" / "LICENSE", TARGET / "lucide.LICENSE.txt")
        lines.append(f"| `lucide.svg` | lucide-static | {LUCIDE_VERSION} | ISC | icons, the {len(ICONS)} in use, as one sprite |")
    (TARGET / "VENDORED.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
