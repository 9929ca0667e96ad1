"""Splits a model's thinking from its answer by the model's own tags."""

from __future__ import annotations

from workers.parsing.stops import partial_suffix

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Text goes to ``reasoning`` between the tags and to the answer otherwise.

    Only a block that opens the answer counts. ``inside`` says that the prompt itself ended with the opening tag.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state = "reasoning" if inside else "start"
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking at the moment."""
        return self._state == "reasoning"

    def feed(self, text: str) -> tuple[str, str]:
        """Take more text; return what is certain by now as ``(reasoning, answer)``."""
        self._held += text
        reasoning = ""
        if self._state == "start":
            self._open()
        if self._state == "reasoning":
            reasoning = self._close()
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = "answer"
        if self._state != "answer":
            return reasoning, ""
        answer, self._held = self._held, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """Return what is held back at the end of the text."""
        rest, self._held = self._held, ""
        if self._state == "reasoning":
            return rest, ""
        return "", "" if self._state == "gap" else rest

    def _open(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(OPEN):
            self._state, self._held = "reasoning", stripped[len(OPEN) :].lstrip("\n")
        elif not OPEN.startswith(stripped):
            self._state = "answer"

    def _close(self) -> str:
        position = self._held.find(CLOSE)
        if position >= 0:
            reasoning, self._held = self._held[:position], self._held[position + len(CLOSE) :]
            self._state = "gap"
            return reasoning
        keep = partial_suffix(self._held, CLOSE)
        reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return reasoning
