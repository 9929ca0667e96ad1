"""From tokens to events: UTF-8 across token borders, stop strings, reasoning; one object per generation."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from workers.constraints import Constraint
from workers.events import AnyEvent, MessageDelta, MessageEnd, MessageStart, ReasoningDelta, ReasoningEnd, ReasoningStart, TokenLogprob
from workers.parsing.harmony import HarmonySplitter
from workers.parsing.reasoning import THINK, ReasoningSplitter, Tags
from workers.parsing.stops import StopScanner
from workers.parsing.tools.reader import CallReader


class OutputParser:
    """Feeds on token bytes; its state depends on the tokens alone, so replaying them restores it after a crash.

    ``calls`` looks for calls of tools in the answer. Stop strings do not count inside of them. ``tags`` enclose the model's thoughts;
    None says that it writes in the channels of gpt-oss.
    """

    def __init__(self, stops: list[str], *, starts_reasoning: bool, calls: CallReader | None = None, tags: Tags | None = THINK) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopScanner(stops)
        self._splitter = ReasoningSplitter(inside=starts_reasoning, tags=tags) if tags else HarmonySplitter(has_calls=calls is not None)
        self._calls = calls
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

    @property
    def units(self) -> int:
        """How many calls, or lists of calls, have begun."""
        return self._calls.units if self._calls else 0

    @property
    def open_unit(self) -> str | None:
        """The text after the marker of the unit that is being written; None outside of one."""
        return self._calls.unit_text if self._calls and self._calls.in_unit else None

    @property
    def completed_calls(self) -> int:
        """How many calls are complete."""
        return self._calls.completed if self._calls else 0

    def note_logprob(self, logprob: TokenLogprob) -> None:
        """Keep a token's log-probability for the next piece of the answer."""
        if not self.is_reasoning and self.open_unit is None:
            self._logprobs.append(logprob)

    def feed(self, piece: bytes) -> list[AnyEvent]:
        """Take one token's bytes and return the events that are certain now."""
        text = self._decoder.decode(piece).replace("\x00", "\ufffd")  # PostgreSQL stores no NUL
        events = self._split(self._stops.release() + text if self.open_unit is not None else self._stops.feed(text))
        if self.open_unit is not None:  # what stop strings hold back belongs to the call that began with this token
            events += self._split(self._stops.release())
        self.reasoning_tokens += self._splitter.is_reasoning
        return events

    def finish(self) -> list[AnyEvent]:
        """Return the last events: what was held back, and the end of the open part."""
        events = self._split(self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.release())
        reasoning, answer = self._splitter.finish()
        events += self._emit(reasoning, answer)
        if self._calls:
            events += self._message(self._calls.finish())
        return events + self._close()

    def _split(self, text: str) -> list[AnyEvent]:
        return self._emit(*self._splitter.feed(text)) if text else []

    def _emit(self, reasoning: str, answer: str) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        if reasoning:
            if self._open != "reasoning":
                events.append(ReasoningStart())
            events.append(ReasoningDelta(content=reasoning))
            self._open = "reasoning"
        if self._calls is None:
            return events + self._message(answer)
        for part in self._calls.feed(answer) if answer else ():
            if isinstance(part, str):
                events += self._message(part)
            else:
                events += [*self._close(), part]
                self._logprobs.clear()  # those of the call itself
        return events

    def _message(self, text: str) -> list[AnyEvent]:
        if not text:
            return []
        events: list[AnyEvent] = [] if self._open == "message" else [*self._close(), MessageStart()]
        logprobs, self._logprobs = self._logprobs, []
        self._open = "message"
        return [*events, MessageDelta(content=text, logprobs=logprobs)]

    def _close(self) -> list[AnyEvent]:
        """End the open part."""
        ends: dict[str, list[AnyEvent]] = {"reasoning": [ReasoningEnd()], "message": [MessageEnd()]}
        was_open, self._open = self._open, ""
        return ends.get(was_open, [])


def replay(parser: OutputParser, tokens: list[int], piece: Callable[[int], bytes], constraint: Constraint | None = None) -> bool:
    """Bring a parser, and a constraint, to the state after these tokens, without events: their text was sent before the crash.

    Returns whether nothing may follow the last one.
    """
    complete = False
    if constraint is not None:
        constraint.follow(parser)
    for token in tokens:
        if constraint is not None and constraint.active:
            constraint.accept(token)
        parser.feed(piece(token))
        if constraint is not None:
            complete = constraint.is_complete
            constraint.follow(parser)
    return complete
