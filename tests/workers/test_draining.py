"""Cordoned and draining nodes, with real hosts and runners: what has begun ends where it is, what has not goes elsewhere or waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.workers.support import Bench, make_host, wait_for
from workers.schemas import SamplingParams

if TYPE_CHECKING:
    from models_app.models import Generation, InstalledModel
    from models_app.reaper import Reaper

LONG = SamplingParams(temperature=0.0, repeat_penalty=1.0, max_tokens=1500, ignore_eos=True)


@pytest.fixture
def other(bench: Bench, tmp_path: Path) -> Iterator[Bench]:
    """Return a second node."""
    from models_app.store import DjangoStore

    other = Bench(make_host(tmp_path / "other", store=DjangoStore("other-node", engines=[])), bench.principal.user)
    other.host.start()
    yield other
    other.host.stop()


def command(verb: str, name: str = "test-node") -> None:
    from models_app import nodes

    getattr(nodes, verb)(principal=None, node=nodes.get(None, name))


def status(name: str = "test-node") -> str:
    from models_app import nodes

    return nodes.get(None, name).status


def tend(reaper: Reaper) -> bool:
    """Do what the io worker does every two seconds."""
    reaper.run()
    return True


def has_ended(generation: Generation) -> bool:
    generation.refresh_from_db()
    return generation.is_finished


def test_draining_loses_nothing(bench: Bench, starter: InstalledModel, other: Bench) -> None:
    """The answers that run end here, word for word; those that come meanwhile are given by the other node."""
    from models_app.models import ModelInstance
    from models_app.reaper import Reaper

    reaper = Reaper()
    whole = bench.run(starter, "What is GGUF?", sampling=LONG)
    running = [bench.create(starter, "What is GGUF?", sampling=LONG) for _ in range(2)]
    wait_for(lambda: all(len(bench.text(generation)) > 50 for generation in running))
    command("drain")
    late = [bench.create(starter, "What is a token?") for _ in range(2)]  # to the draining node, by a choice that is a second old
    wait_for(lambda: tend(reaper) and all(map(has_ended, [*running, *late])), seconds=60)
    for generation in [*running, *late]:
        bench.finished(generation)
    assert [(g.status, g.node, g.resumes, g.content) for g in running] == [("completed", "test-node", 0, whole.content)] * 2
    assert {(g.status, g.node, g.resumes) for g in late} == {("completed", "other-node", 0)}
    assert all(generation.content == bench.text(generation) != "" for generation in late)
    wait_for(lambda: status() == "drained")
    assert set(ModelInstance.objects.values_list("node_id", flat=True)) == {"other-node"}


def test_without_another_node_the_rest_waits(bench: Bench, starter: InstalledModel) -> None:
    from models_app.reaper import Reaper

    bench.run(starter, "What is a token?")
    command("drain")
    wait_for(lambda: status() == "drained")
    waiting = bench.create(starter, "What is GGUF?")
    Reaper().run()
    waiting.refresh_from_db()
    assert waiting.status == "queued"
    command("uncordon")
    wait_for(lambda: tend(Reaper()) and has_ended(waiting), seconds=30)
    assert bench.finished(waiting).status == "completed"


def test_a_cordoned_node_serves_what_it_has_and_loads_nothing(bench: Bench, starter: InstalledModel, other: Bench, tmp_path: Path) -> None:
    from models_app.models import ModelInstance

    bench.run(starter, "What is a token?")
    command("cordon")
    wait_for(lambda: not bench.host.loader.may_load)
    assert bench.run(starter, "What is a token?").node == "test-node"
    copy = tmp_path / "second.gguf"
    copy.symlink_to(starter.file)
    second = bench.install(copy, "test/second")
    generation = bench.create(second, "What is a token?")
    bench.finished(generation)
    assert (generation.status, generation.node) == ("completed", "other-node")
    asked = ModelInstance.objects.create(identifier="x", model=second, node_id="test-node", config={})
    bench.host.load(asked.pk)
    wait_for(lambda: ModelInstance.objects.get(pk=asked.pk).status == "failed")
    assert "taken out of service" in ModelInstance.objects.get(pk=asked.pk).error
