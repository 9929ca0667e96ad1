"""Splits a model's thinking from its answer by the model's own tags."""

from __future__ import annotations

from typing import NamedTuple

from workers.parsing.stops import partial_suffix


class Tags(NamedTuple):
    """What a model writes before and after its thoughts."""

    open: str
    close: str


THINK = Tags("<think>", "</think>")
#: Those of other families, each with what their templates contain.
FAMILIES: tuple[tuple[str, Tags], ...] = (
    ("<|START_THINKING|>", Tags("<|START_THINKING|>", "<|END_THINKING|>")),  # Cohere
    ("[THINK]", Tags("[THINK]", "[/THINK]")),  # Mistral
    ("<|channel>thought", Tags("<|channel>thought\n", "<channel|>")),  # Gemma 4
    ("<seed:think>", Tags("<seed:think>", "</seed:think>")),
    ("<mm:think>", Tags("<mm:think>", "</mm:think>")),  # MiniMax-M3
    ("<think{}>", Tags("<think:opensource>", "</think:opensource>")),  # Hunyuan
    ("<|inner_prefix|>", Tags("<|inner_prefix|>", "<|inner_suffix|>")),  # Apertus
    ("[BEGIN FINAL RESPONSE]", Tags("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]")),  # Apriel
    ("assistant<|think|>", Tags("<|think|>", "<|end|><|begin|>assistant")),  # Solar
)
#: Tags, and parts of tags, that may be control tokens.
VISIBLE = frozenset({*THINK, *(tag for _, tags in FAMILIES for tag in tags), "<|channel>", "<|end|>", "<|begin|>"})


def tags_of(template: str) -> Tags:
    """Return the tags of the model with this chat template."""
    return next((tags for part, tags in FAMILIES if part in template), THINK)


class ReasoningSplitter:
    """Text goes to ``reasoning`` between the tags and to the answer otherwise.

    Only a block that opens the answer counts. ``inside`` says that the prompt itself ended with the opening tag.
    """

    def __init__(self, *, inside: bool, tags: Tags = THINK) -> None:
        self._tags = tags
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
        opening = self._tags.open
        if stripped.startswith(opening):
            self._state, self._held = "reasoning", stripped[len(opening) :].lstrip("\n")
        elif not opening.startswith(stripped):
            self._state = "answer"

    def _close(self) -> str:
        closing = self._tags.close
        position = self._held.find(closing)
        if position >= 0:
            reasoning, self._held = self._held[:position], self._held[position + len(closing) :]
            self._state = "gap"
            return reasoning
        keep = partial_suffix(self._held, closing)
        reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return reasoning
