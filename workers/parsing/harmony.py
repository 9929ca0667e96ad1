"""Splits the channels of gpt-oss ("harmony") into reasoning and answer. Calls of tools stay in the answer, for ``CallReader``."""

from __future__ import annotations

from workers.parsing.stops import partial_suffix

MESSAGE, CALL = "<|message|>", " to=functions."
_BREAKS = ("<|end|>", "<|start|>", "<|channel|>", "<|call|>")
_CONTROL = (*_BREAKS, MESSAGE, "<|constrain|>")
#: What begins or continues a header. Anything else, where a header may come, is text: a constrained answer has none.
_HEADERS = ("assistant", "<|", " to=")


def speaks_harmony(template: str) -> bool:
    """Return whether a model with this chat template writes in channels."""
    return "<|channel|>" in template and MESSAGE in template


class HarmonySplitter:
    """Text of the channel ``analysis`` is reasoning, that of the others the answer; headers are taken out.

    A call's header stays from `` to=functions.`` on, and its text after it, if the answer ``has_calls``.
    """

    visible = frozenset(_CONTROL)

    def __init__(self, *, has_calls: bool) -> None:
        self._has_calls = has_calls
        self._state = "header"
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking at the moment."""
        return self._state == "reasoning"

    def feed(self, text: str) -> tuple[str, str]:
        """Take more text; return what is certain by now as ``(reasoning, answer)``."""
        self._held += text
        parts = {"reasoning": "", "answer": ""}
        while self._held and (self._header() if self._state == "header" else self._body(parts)):
            pass
        return parts["reasoning"], parts["answer"]

    def finish(self) -> tuple[str, str]:
        """Return what is held back at the end of the text; a header that was cut is nothing."""
        rest, self._held = self._held, ""
        if self._state == "header" or any(marker.startswith(rest) for marker in _BREAKS):
            return "", ""
        return (rest, "") if self._state == "reasoning" else ("", rest)

    def _header(self) -> bool:
        """Read a header as far as it is there; return whether it ended."""
        call, end = self._held.find(CALL), self._held.find(MESSAGE)
        if call >= 0 and (end < 0 or call < end):
            self._held, self._state = self._held[call:], "call"
        elif end >= 0:
            is_final = "final" in self._held[:end] or "commentary" in self._held[:end]
            self._held, self._state = self._held[end + len(MESSAGE) :], "answer" if is_final else "reasoning"
        elif any(self._held.startswith(start) or start.startswith(self._held) for start in _HEADERS):
            return False
        else:
            self._state = "answer"
        return True

    def _body(self, parts: dict[str, str]) -> bool:
        """Pass text on up to the next header; return whether one begins. A call's own header has a channel in it."""
        breaks = [marker for marker in _BREAKS if self._state != "call" or marker != "<|channel|>"]
        places = [place for marker in breaks if (place := self._held.find(marker)) >= 0]
        keep = max(partial_suffix(self._held, marker) for marker in breaks)
        end = min(places) if places else len(self._held) - keep
        if self._state != "call" or self._has_calls:
            parts["reasoning" if self._state == "reasoning" else "answer"] += self._held[:end]
        self._held = self._held[end:]
        if places:
            self._state = "header"
        return bool(places)
