"""Template tags of the page frame."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from django import template
from django.conf import settings
from django.templatetags.static import static
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()

SPRITE = "vendor/lucide.svg"


@lru_cache(maxsize=1)
def icon_names() -> frozenset[str]:
    """Return the names of the icons in the sprite."""
    return frozenset(re.findall(r'<symbol id="([^"]+)"', (Path(settings.BASE_DIR) / "static" / SPRITE).read_text()))


@register.simple_tag
@lru_cache(maxsize=256)
def icon(name: str, label: str = "") -> SafeString:
    """Return an icon; decorative without a label, an image with that accessible name with one.

    Raises ``ValueError`` for an icon that ``scripts/vendor_static.py`` does not list.
    """
    if name not in icon_names():
        raise ValueError(f"There is no icon '{name}' in static/{SPRITE}; add it to scripts/vendor_static.py.")
    href = f"{static(SPRITE)}#{name}"
    if label:
        return format_html('<svg class="icon" role="img" aria-label="{}"><use href="{}"></use></svg>', label, href)
    return format_html('<svg class="icon" aria-hidden="true"><use href="{}"></use></svg>', href)


@register.simple_tag
def icon_sprite() -> str:
    """Return the URL of the icon sprite, for icons that scripts make."""
    return static(SPRITE)


@register.inclusion_tag("rail_item.html", takes_context=True)
def rail_item(context: dict[str, Any], url: str, label: str, icon_name: str) -> dict[str, Any]:
    """One place in the rail, marked as current on its own pages."""
    path = context["request"].path
    current = path == url or path.startswith("/chat/" if url == "/" else url)
    return {"url": url, "label": label, "icon_name": icon_name, "current": current}


@register.filter
def filesize(size_bytes: int | None) -> str:
    """Return a size as people read it: ``5.3 MB``, ``4.37 GB`` (decimal units, as disks and model pages use)."""
    if size_bytes is None:
        return ""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            return f"{value:.3g} {unit}"
    raise AssertionError("unreachable")
