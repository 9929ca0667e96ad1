"""What a node does by itself with its models: LM Studio's policies, and the turns of models that want the same memory."""

from __future__ import annotations

from dataclasses import dataclass

from workers.memory import AutoEvict, Guardrail

#: A turn lasts so many times as long as the load took, up to a limit, so that most of the time goes to answers.
TURN_PER_LOAD = 8.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What a node does by itself.

    ``turn_seconds`` is the longest turn, 0 means first come, first served. ``limit_bytes`` is what models may take together, 0: no limit but the
    machine's memory.
    """

    guardrail: Guardrail = Guardrail.BALANCED
    jit: bool = True
    jit_ttl_seconds: int | None = 60 * 60
    auto_evict: AutoEvict = AutoEvict.ON
    turn_seconds: float = 30.0
    limit_bytes: int = 0

    def turn(self, load_seconds: float) -> float:
        """Return how long a model whose load took this long keeps its memory while requests wait for another one, in seconds."""
        return min(self.turn_seconds, TURN_PER_LOAD * load_seconds)

    @property
    def is_unlimited(self) -> bool:
        """Whether loads are not checked against memory."""
        return self.guardrail is Guardrail.OFF and not self.limit_bytes
