"""How much of a prompt fits beside those who decode, and who pays for a step."""

from __future__ import annotations

from dataclasses import dataclass

from workers.fairness import FairShare

#: While anybody decodes, a step that also takes in a prompt should not last longer than this, or than a few plain steps.
TARGET_STEP_SECONDS = 0.2
TARGET_STEP_FACTOR = 6.0


@dataclass(slots=True)
class Pace:
    """Running estimates that size the prompt share of a step: seconds per prompt token, seconds of a step without prompts."""

    per_prompt_token: float = 0.0
    plain_step: float = 0.0

    def budget(self) -> int:
        """Return how many prompt tokens fit into a step beside decoding sequences."""
        if not self.per_prompt_token:
            return 64
        target = max(TARGET_STEP_SECONDS, TARGET_STEP_FACTOR * self.plain_step)
        return int(max(0.0, target - self.plain_step) / self.per_prompt_token)

    def note(self, seconds: float, prefill_tokens: int, decoding: int) -> None:
        """Learn from a step."""
        if prefill_tokens >= 16:
            rest = self.plain_step if decoding else 0.0
            self.per_prompt_token = _blend(self.per_prompt_token, max(seconds - rest, seconds * 0.25) / prefill_tokens)
        elif not prefill_tokens:
            self.plain_step = _blend(self.plain_step, seconds)

    def charge(self, fair: FairShare, decoding: list[str], prompts: list[tuple[str, int]], seconds: float) -> None:
        """Share the time of a step among those who took part: prompts by their tokens, the rest evenly among the decoding.

        ``decoding`` are the owners of the decoding sequences, ``prompts`` owners with the prompt tokens that were computed.
        """
        total = sum(tokens for _, tokens in prompts)
        prompt_seconds = seconds if not decoding else min(seconds, self.per_prompt_token * total)
        for owner, tokens in prompts:
            fair.charge(owner, prompt_seconds * tokens / (total or 1))
        for owner in decoding:
            fair.charge(owner, (seconds - prompt_seconds) / len(decoding))


def _blend(old: float, new: float) -> float:
    return new if not old else 0.7 * old + 0.3 * new
