"""What to leave out when a conversation is longer than the context: LM Studio's context overflow policies.

A prompt is shortened by whole messages. What goes out of sight while an answer grows is counted in tokens
(``workers.engines.base.Sequence``).
"""

from __future__ import annotations

from collections.abc import Callable

from workers.schemas import ChatMessage, OverflowPolicy

#: Room that a shortened prompt leaves for the answer, at most: a quarter of the context, if not less was asked for.
ANSWER_SHARE = 4


def room_for_answer(context_length: int, max_tokens: int | None) -> int:
    """Return the tokens to keep free of a prompt that has to be shortened anyway."""
    share = max(1, context_length // ANSWER_SHARE)
    return min(max_tokens or share, share)


def shorten(
    messages: list[ChatMessage], policy: OverflowPolicy, fits: Callable[[list[ChatMessage]], bool]
) -> tuple[list[ChatMessage], int] | None:
    """Return the messages that the model gets and how many were left out, or None if even the fewest do not fit.

    ``truncateMiddle`` keeps the system prompt and the first exchange, ``rollingWindow`` the system prompt only; both keep as many
    of the newest messages as fit. What is kept after the gap begins with the user, because many chat templates demand turns
    that alternate.
    """
    head = _head_length(messages, policy)
    starts = [i for i in range(head, len(messages)) if messages[i].role == "user" or i == len(messages) - 1]
    low, high = 0, len(starts)
    while low < high:  # the longest tail that fits; the later it starts, the shorter it is
        middle = (low + high) // 2
        if fits(messages[:head] + messages[starts[middle] :]):
            high = middle
        else:
            low = middle + 1
    if low == len(starts):
        return None
    return messages[:head] + messages[starts[low] :], starts[low] - head


def kept_messages(messages: list[ChatMessage], policy: OverflowPolicy) -> list[ChatMessage]:
    """Return the first messages that stay in sight while an answer grows past the context.

    ``rollingWindow`` keeps the system prompt, ``truncateMiddle`` the first question too.
    """
    n = 0
    while n < len(messages) and messages[n].role in {"system", "developer"}:
        n += 1
    return messages[: n + (policy == "truncateMiddle")]


def _head_length(messages: list[ChatMessage], policy: OverflowPolicy) -> int:
    n = 0
    while n < len(messages) - 1 and messages[n].role in {"system", "developer"}:
        n += 1
    if policy == "truncateMiddle":
        first_answer = next((i for i in range(n, len(messages) - 1) if messages[i].role == "assistant"), None)
        if first_answer is not None:
            return first_answer + 1
    return n
