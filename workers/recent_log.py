"""The last lines of this process's log, for admins to read on the Workers page. What looks like a secret is left out."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque

KEPT_LINES = 40
MAX_LINE_CHARACTERS = 400

_SECRETS = (
    (re.compile(r"(\w+://)[^/\s@]*@"), r"\1***@"),  # user and password in a URL
    (re.compile(r"\b(sk-lm-|lmweb-node-|hf_)[\w-]{6,}"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|password|secret|token)(\s*[=:]?\s+|[=:])\S{8,}"), r"\1\2***"),
)


def without_secrets(text: str) -> str:
    """Return a text with credentials of URLs, tokens and passwords replaced."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class RecentLog(logging.Handler):
    """Keeps the last lines in memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._is_new = False
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; of one with several lines the first, and the last, which names the exception."""
        lines = self.format(record).splitlines() or [""]
        kept = lines if len(lines) < 3 else [lines[0], lines[-1]]
        with self._guard:
            self._lines.extend(without_secrets(line)[:MAX_LINE_CHARACTERS].replace("\x00", "") for line in kept)
            self._is_new = True

    def fresh(self) -> list[str] | None:
        """Return the lines, or None if nothing was added since the last call."""
        with self._guard:
            if not self._is_new:
                return None
            self._is_new = False
            return list(self._lines)
