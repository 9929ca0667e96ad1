"""From tokens to events: UTF-8 across token borders, stop strings, reasoning; one object per generation."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from workers.events import AnyEvent, MessageDelta, MessageEnd, MessageStart, ReasoningDelta, ReasoningEnd, ReasoningStart, TokenLogprob
from workers.parsing.reasoning import ReasoningSplitter
from workers.parsing.stops import StopScanner


class OutputParser:
    """Feeds on token bytes; its state depends on the tokens alone, so replaying them restores it after a crash."""

    def __init__(self, stops: list[str], *, starts_reasoning: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopScanner(stops)
        self._splitter = ReasoningSplitter(inside=starts_reasoning)
        self._open = ""
        self._logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was written."""
        return self._stops.found

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking at the moment."""
        return self._splitter.is_reasoning

    def note_logprob(self, logprob: TokenLogprob) -> None:
        """Keep a token's log-probability for the next piece of the answer."""
        if not self.is_reasoning:
            self._logprobs.append(logprob)

    def feed(self, piece: bytes) -> list[AnyEvent]:
        """Take one token's bytes and return the events that are certain now."""
        text = self._decoder.decode(piece).replace("\x00", "\ufffd")  # PostgreSQL stores no NUL
        events = self._split(self._stops.feed(text))
        self.reasoning_tokens += self._splitter.is_reasoning
        return events

    def finish(self) -> list[AnyEvent]:
        """Return the last events: what was held back, and the end of the open part."""
        events = self._split(self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish())
        reasoning, answer = self._splitter.finish()
        events += self._emit(reasoning, answer)
        if self._open == "reasoning":
            events.append(ReasoningEnd())
        elif self._open == "message":
            events.append(MessageEnd())
        self._open = ""
        return events

    def _split(self, text: str) -> list[AnyEvent]:
        return self._emit(*self._splitter.feed(text)) if text else []

    def _emit(self, reasoning: str, answer: str) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if reasoning:
            if self._open != "reasoning":
                events.append(ReasoningStart())
            events.append(ReasoningDelta(content=reasoning))
            self._open = "reasoning"
        if answer:
            if self._open == "reasoning":
                events.append(ReasoningEnd())
            if self._open != "message":
                events.append(MessageStart())
            logprobs, self._logprobs = self._logprobs, []
            events.append(MessageDelta(content=answer, logprobs=logprobs))
            self._open = "message"
        return events


def replay(parser: OutputParser, tokens: list[int], piece: Callable[[int], bytes]) -> None:
    """Bring a parser to the state after these tokens, without events: their text was sent before the crash."""
    for token in tokens:
        parser.feed(piece(token))
