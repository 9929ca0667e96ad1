"""Stop strings: found across token borders, and never let through in part."""

from __future__ import annotations


class StopScanner:
    """Passes text on, holding back whatever could be the beginning of a stop string."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take more text; return what is certainly before any stop string. ``found`` tells that one came."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        ends = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            passed, self._held = self._held[: min(ends)], ""
            return passed
        keep = max(partial_suffix(self._held, stop) for stop in self._stops)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def release(self) -> str:
        """Return what is still held back: the text ended, or went on elsewhere, without the rest of a stop string."""
        passed, self._held = self._held, ""
        return "" if self.found else passed


def partial_suffix(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
