"""How static files are named and compressed."""

from __future__ import annotations

from whitenoise.storage import CompressedManifestStaticFilesStorage


class StaticFilesStorage(CompressedManifestStaticFilesStorage):
    """Names with a hash of the content, also in the imports between JavaScript modules, so that all may be cached for ever."""

    support_js_module_import_aggregation = True
