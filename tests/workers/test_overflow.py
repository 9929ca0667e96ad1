"""Conversations longer than the context: what is left out, by which policy, and who is told."""

from __future__ import annotations

import pytest

from models_app.models import InstalledModel
from tests.workers.support import GREEDY, Bench
from workers.events import ContextOverflow
from workers.overflow import shorten
from workers.schemas import ChatMessage, OverflowPolicy


def talk(pattern: str) -> list[ChatMessage]:
    """Return messages by their roles' first letters; each says its own place."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [ChatMessage(role=roles[letter], content=str(i)) for i, letter in enumerate(pattern)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "pattern", "at_most", "kept"),
    [
        ("rollingWindow", "suauauau", 4, "0 5 6 7"),
        ("rollingWindow", "suauauau", 5, "0 5 6 7"),
        ("rollingWindow", "uauauau", 3, "4 5 6"),
        ("rollingWindow", "suauauau", 2, "0 7"),
        ("truncateMiddle", "suauauau", 6, "0 1 2 5 6 7"),
        ("truncateMiddle", "suauauau", 4, "0 1 2 7"),
        ("truncateMiddle", "uauauau", 5, "0 1 4 5 6"),
        ("truncateMiddle", "suuuu", 3, "0 3 4"),
    ],
)
def test_what_is_kept(policy: OverflowPolicy, pattern: str, at_most: int, kept: str) -> None:
    messages = talk(pattern)
    found = shorten(messages, policy, lambda some: len(some) <= at_most)
    assert found is not None
    assert " ".join(message.content for message in found[0]) == kept
    assert found[1] == len(messages) - len(found[0])


def test_a_last_message_that_is_too_long_alone_cannot_be_helped() -> None:
    assert shorten(talk("suau"), "rollingWindow", lambda _some: False) is None


LONG_TALK = [
    message
    for i in range(40)
    for message in (ChatMessage(role="user", content=f"{i} " + "word " * 40), ChatMessage(role="assistant", content="I see. " * 10))
]
QUESTION = ChatMessage(role="user", content="Which port does the server use?")


@pytest.mark.parametrize("policy", ["truncateMiddle", "rollingWindow"])
def test_a_long_chat_goes_on_and_says_what_it_forgot(bench: Bench, starter: InstalledModel, policy: OverflowPolicy) -> None:
    generation = bench.create(starter, "", messages=[*LONG_TALK, QUESTION], sampling=GREEDY, context_overflow=policy)
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).status == "completed"
    told = [event for event in bench.events(generation) if isinstance(event, ContextOverflow)]
    assert len(told) == 1
    assert told[0].policy == policy
    assert 0 < told[0].dropped_messages < len(LONG_TALK)
    assert generation.stats["dropped_messages"] == told[0].dropped_messages
    assert generation.stats["input_tokens"] <= 2048 * 3 // 4


def test_the_default_is_to_say_that_it_does_not_fit(bench: Bench, starter: InstalledModel) -> None:
    generation = bench.create(starter, "", messages=[*LONG_TALK, QUESTION], sampling=GREEDY)
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).error_code == "context_length_exceeded"


def test_one_message_that_is_too_long_is_refused_under_every_policy(bench: Bench, starter: InstalledModel) -> None:
    huge = [ChatMessage(role="user", content="word " * 5000)]
    generation = bench.create(starter, "", messages=huge, sampling=GREEDY, context_overflow="rollingWindow")
    bench.host.generate(str(generation.pk))
    assert bench.finished(generation).error_code == "context_length_exceeded"
