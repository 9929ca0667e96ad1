"""Two nodes in one process, each with its runners: requests come by the database, as they do from web servers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.utils import timezone

from tests.micro_models import make_micro
from tests.workers.support import GREEDY, Bench, make_host, wait_for
from workers.policy import Policy
from workers.schemas import ChatMessage, GenerationRequest, OutputFormat, SamplingParams
from workers.store import Claim

if TYPE_CHECKING:
    from lmweb.models import User
    from models_app.models import Generation, InstalledModel


@pytest.fixture
def start(transactional_db: None, owner: User, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Return what starts a node; ``files`` is a models directory of its own."""
    from models_app.store import DjangoStore

    class OwnFiles(DjangoStore):
        files: Path | None = None

        def claim(self, generation_id: str) -> Claim | None:
            claim = super().claim(generation_id)
            if claim is None or self.files is None:
                return claim
            return dataclasses.replace(claim, model=dataclasses.replace(claim.model, path=str(self.files / Path(claim.model.path).name)))

    benches: list[Bench] = []

    def start(name: str, *, files: Path | None = None, **policy: Any) -> Bench:
        store = OwnFiles(name, engines=[])
        store.files = files
        benches.append(Bench(make_host(tmp_path / name, Policy(**policy), store=store), owner))
        benches[-1].host.start()
        return benches[-1]

    yield start
    for bench in benches:
        bench.host.stop()


def ask(bench: Bench, model: InstalledModel, text: str, *, sampling: SamplingParams = GREEDY, **fields: Any) -> Generation:
    """Ask as a web server does: the router chooses the node."""
    from models_app.generations import start_generation

    request = GenerationRequest(model=model.key, messages=[ChatMessage(role="user", content=text)], sampling=sampling, **fields)
    return start_generation(principal=bench.principal, request=request, source="test")


def states() -> dict[str, str]:
    from models_app.models import ModelInstance

    return dict(ModelInstance.objects.values_list("node_id", "status"))


def states_of(model: InstalledModel) -> dict[str, str]:
    return dict(model.instances.values_list("node_id", "status"))


def test_replicas_share_the_requests(start: Callable[..., Bench], starter_gguf: Path) -> None:
    from models_app import loading, routing
    from models_app.models import ModelInstance

    a, b = start("a"), start("b")
    model = a.install(starter_gguf, "lmweb/starter")
    for bench, name in ((a, "a"), (b, "b")):
        bench.host.load(loading.request_load(principal=None, model=model, node=name).pk)
    wait_for(lambda: set(states().values()) == {"ready"})
    assert set(ModelInstance.objects.values_list("identifier", flat=True)) == {"lmweb/starter"}
    routing.forget()
    asked = [ask(a, model, "Which port does the server use?") for _ in range(2)]
    asked += [ask(a, model, f"What is {number}?") for number in range(6)]
    done = [a.finished(each) for each in asked]
    assert {each.status for each in done} == {"completed"}
    assert min(Counter(each.node for each in done).values()) >= 3
    assert done[0].content == done[1].content == "The server listens on port 1234 by default."
    assert done[0].node == done[1].node, "the same beginning, the same node"


def test_a_node_without_the_file_says_so_and_another_one_answers(start: Callable[..., Bench], starter_gguf: Path, tmp_path: Path) -> None:
    from models_app.models import ModelInstance

    a, _b = start("a", files=tmp_path / "empty"), start("b")
    model = a.install(starter_gguf, "lmweb/starter")
    done = a.finished(a.create(model, "Which port does the server use?", node="a"))
    assert (done.status, done.node, done.resumes) == ("completed", "b", 0)
    assert done.content == a.text(done) == "The server listens on port 1234 by default."
    assert states() == {"a": "failed", "b": "ready"}
    assert ModelInstance.objects.get(node="a").error == "The file of lmweb/starter is not on the worker 'a'."
    assert a.finished(ask(a, model, "What is GGUF?")).node == "b"


def test_a_node_without_the_memory_hands_over_what_it_has_told_already(start: Callable[..., Bench], starter_gguf: Path) -> None:
    """The web server's estimate is a guess; the node has the last word."""
    a, _b = start("a", limit_bytes=1000**2), start("b")
    model = a.install(starter_gguf, "lmweb/starter")
    asked = [a.create(model, "Which port does the server use?", node="a") for _ in range(3)]
    for each in asked:
        done = a.finished(each)
        assert (done.status, done.node) == ("completed", "b")
        assert done.content == a.text(done)
        assert [entry.seq for entry in a.entries(done)] == list(range(1, done.seq + 2))


def test_where_no_node_can_the_reason_of_the_last_one_is_told(start: Callable[..., Bench], starter_gguf: Path, tmp_path: Path) -> None:
    a, _b = start("a", files=tmp_path / "empty"), start("b", limit_bytes=1000**2)
    model = a.install(starter_gguf, "lmweb/starter")
    done = a.finished(a.create(model, "hello", node="a"))
    assert (done.status, done.error_code, done.node) == ("failed", "insufficient_memory", "b")
    assert states() == {"a": "failed", "b": "failed"}
    again = a.finished(ask(a, model, "hello"))
    assert again.status == "failed", "and nothing goes round in circles"


def test_what_waits_for_memory_moves_to_a_node_that_has_some(
    start: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import loader

    monkeypatch.setattr(loader, "MOVE_SECONDS", 0.3)
    a = start("a")
    busy, other = (a.install(make_micro(tmp_path / f"{n}.gguf", seed=n, layers=16), f"test/{n}") for n in range(2))
    long = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)
    first = ask(a, busy, "to be", sampling=long)
    wait_for(lambda: a.text(first))
    one = next(iter(a.host.runners.by_id.values()))
    a.host.runners.policy = Policy(limit_bytes=int(1.5 * max(one.memory_bytes(), one.needed_bytes)), turn_seconds=0)
    asked = [ask(a, other, str(number), sampling=SamplingParams(max_tokens=4)) for number in range(3)]
    wait_for(lambda: states_of(other) == {"a": "loading"})
    start("b")
    done = [a.finished(each) for each in asked]
    assert {(each.status, each.node) for each in done} == {("completed", "b")}
    assert states_of(other) == {"b": "ready"}
    first.refresh_from_db()
    assert (first.status, first.node) == ("running", "a")
    a.host.cancel(str(first.pk))


def test_the_reaper_does_not_wait_for_the_leases_of_a_dead_node(start: Callable[..., Bench], tmp_path: Path) -> None:
    from models_app.models import Generation
    from models_app.reaper import Reaper
    from workers.models import WorkerNode

    a = start("a")
    model = a.install(make_micro(tmp_path / "slow.gguf", layers=16), "test/slow")
    counted = " ".join(map(str, range(1, 150)))  # the only text that is allowed: what is lost or doubled would show
    cut = ask(a, model, "to be", output_format=OutputFormat(kind="regex", value=counted))
    wait_for(lambda: len(a.text(cut)) > 50)
    a.host.stopping.set()  # as a dead one, it neither saves nor beats nor gives anything back
    a.host.loader.stop()
    a.host.runners.stop()
    b = start("b")
    WorkerNode.objects.filter(name="a").update(heartbeat_at=timezone.now() - timedelta(seconds=9))
    assert Generation.objects.get(pk=cut.pk).lease_until > timezone.now()
    reaper = Reaper()
    reaper.run()
    reaper.run()
    done = b.finished(cut)
    assert (done.status, done.node, done.resumes) == ("completed", "b", 1)
    assert done.content == b.text(done) == counted
    assert [entry.seq for entry in b.entries(done)] == list(range(1, done.seq + 2))
