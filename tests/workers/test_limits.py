"""Limits of one person through a real host: what is beyond them waits, says why, and goes on when there is room."""

from __future__ import annotations

from lmweb.models import User
from models_app.models import InstalledModel
from tests.workers.support import ENDLESS, Bench, wait_for
from workers.events import QueueUpdate
from workers.schemas import Lane, SamplingParams

SHORT = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


def waits(bench: Bench, generation: object) -> list[QueueUpdate]:
    return [event for event in bench.events(generation) if isinstance(event, QueueUpdate)]  # type: ignore[arg-type]


def test_what_is_beyond_the_limit_waits_and_says_why(bench: Bench, starter: InstalledModel, stranger: User) -> None:
    User.objects.filter(pk=bench.principal.user.pk).update(running_limit=1)
    running, api, chat = (bench.create(starter, "Hi", **fields) for fields in (ENDLESS, {"sampling": SHORT}, {"sampling": SHORT}))
    chat.request["lane"] = Lane.INTERACTIVE
    chat.save()
    other = bench.create(starter, "Hi", sampling=SHORT)
    other.user = stranger
    other.save()
    for generation in (running, api, chat, other):
        bench.host.generate(str(generation.pk))
    assert bench.finished(other).status == "completed"
    wait_for(lambda: waits(bench, api) and waits(bench, api)[-1].position == 1)
    assert waits(bench, api)[0].reason == "You have 1 answer running, as many as you may have at once."
    assert [event.position for event in waits(bench, chat)] == [0]
    assert not waits(bench, running)

    bench.host.cancel(str(running.pk))
    for generation in (running, api, chat):
        bench.finished(generation)
    assert (running.status, api.status, chat.status) == ("cancelled", "completed", "completed")
    assert chat.finished_at < api.finished_at
    assert bench.host._limits.holds() == {}


def test_one_that_is_held_back_can_be_stopped(bench: Bench, starter: InstalledModel) -> None:
    User.objects.filter(pk=bench.principal.user.pk).update(running_limit=1)
    running, held = (bench.create(starter, "Hi", **ENDLESS) for _ in range(2))
    for generation in (running, held):
        bench.host.generate(str(generation.pk))
    wait_for(lambda: waits(bench, held))
    bench.host.cancel(str(held.pk))
    assert bench.finished(held).status == "cancelled"
    assert held.output_tokens == []
    bench.host.cancel(str(running.pk))
    assert bench.finished(running).status == "cancelled"
