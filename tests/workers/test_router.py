"""Which node takes a request: tables of nodes in, placement out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from workers.memory import AutoEvict
from workers.router import Load, Node, Placement, Refuse, Replica, Serve, Wait, Wanted, load, place, serve, with_request

GB = 1000**3
M, OTHER, THIRD = 1, 2, 3


def node(name: str, *replicas: Replica, free: float = 8, work: dict[int, int] | None = None, **fields: Any) -> Node:
    return Node(name, int(free * GB), replicas=replicas, work=work or {}, **fields)


def has(model: int = M, status: Any = "ready", *, gb: float = 4, **fields: Any) -> Replica:
    return Replica(
        fields.pop("id", model * 10), model, fields.pop("identifier", f"test/{model}"), status, memory_bytes=int(gb * GB), **fields
    )


def go(nodes: Iterable[Node], *, needs: float = 4, auto_evict: AutoEvict = AutoEvict.NEEDED, **fields: Any) -> Placement:
    return place(list(nodes), Wanted(M, "test/1", **fields), lambda: int(needs * GB), auto_evict)


# --- a node that has it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param([node("a"), node("b", has())], "b", id="ready beats free memory"),
        pytest.param([node("a", has(status="loading")), node("b", has(), work={M: 40})], "b", id="ready beats loading, busy or not"),
        pytest.param([node("a", has(), work={M: 3}), node("b", has(), work={M: 2})], "b", id="the least busy replica"),
        pytest.param([node("a", has(slots=4), work={M: 3}), node("b", has(slots=16), work={M: 8})], "b", id="busy is relative to slots"),
        pytest.param([node("a", has(), work={OTHER: 9}), node("b", has(), work={OTHER: 1})], "b", id="else the less busy machine"),
        pytest.param([node("a", has(), state="draining"), node("b", has(), work={M: 9})], "b", id="draining takes nothing new"),
        pytest.param([node("a"), node("b", has(), state="cordoned")], "b", id="cordoned serves what it has"),
        pytest.param([node("a", has(), heartbeat_age_seconds=9), node("b", has(), work={M: 9})], "b", id="dead is dead"),
        pytest.param([node("a", has(status="unloading")), node("b", has(status="loading"))], "b", id="loading beats nothing"),
        pytest.param(
            [node("a", has(), work={M: 9}), node("b", has(OTHER), has(id=5, identifier="mine"), work={M: 12})], "a", id="any instance"
        ),
    ],
)
def test_in_memory(nodes: list[Node], expected: str) -> None:
    assert go(nodes) == Serve(expected)


def test_an_instance_that_the_request_names_comes_first() -> None:
    nodes = [node("a", has()), node("b", has(identifier="mine"), work={M: 9})]
    assert go(nodes, identifier="mine") == Serve("b")
    assert go(nodes, identifier="gone") == Serve("a")


@pytest.mark.parametrize(
    ("at_home", "elsewhere", "expected"),
    [(0, 0, "home"), (2, 0, "home"), (4, 0, "home"), (5, 0, "other"), (9, 5, "home"), (9, 4, "other")],
)
def test_a_chat_stays_where_its_prefix_is_unless_that_is_clearly_busier(at_home: int, elsewhere: int, expected: str) -> None:
    nodes = [node("home", has(), work={M: at_home}), node("other", has(), work={M: elsewhere})]
    assert go(nodes, chat="x", home="home") == Serve(expected)


def test_a_chat_whose_home_is_gone_goes_on_elsewhere() -> None:
    assert go([node("a", has()), node("b", has(), state="draining")], chat="x", home="b") == Serve("a")


def test_new_chats_spread_and_every_server_sends_them_the_same_way() -> None:
    nodes = [node(name, has()) for name in "abcd"]
    chosen = {chat: go(nodes, chat=chat) for chat in map(str, range(200))}
    assert chosen == {chat: go(reversed(nodes), chat=chat) for chat in chosen}
    assert all(list(chosen.values()).count(Serve(name)) > 30 for name in "abcd")


def test_a_burst_spreads_over_the_replicas() -> None:
    """Between two looks at the database the router keeps count itself."""
    nodes = {name: node(name, has()) for name in "abc"}
    for number in range(30):
        placement = go(nodes.values(), chat=str(number))
        assert isinstance(placement, Serve)
        nodes[placement.node] = with_request(nodes[placement.node], placement, Wanted(M, "test/1"), 0)
    assert [each.work[M] for each in nodes.values()] == [10, 10, 10]


# --- where to load it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param([node("a", free=3), node("b", free=5)], Load("b"), id="where it fits"),
        pytest.param(
            [node("a", has(OTHER), work={OTHER: 3}), node("b", has(OTHER), work={OTHER: 1})], Load("b"), id="the less busy machine"
        ),
        pytest.param([node("a", free=9), node("b", free=12)], Load("b"), id="where most memory is free"),
        pytest.param([node("a", has(OTHER), free=1), node("b", has(THIRD), free=5)], Load("b"), id="nobody has to leave"),
        pytest.param(
            [node("a", has(OTHER, unused_seconds=60), free=1), node("b", has(THIRD, unused_seconds=600), free=1)],
            Load("b", (30,)),
            id="the longest unused leaves",
        ),
        pytest.param(
            [node("a", has(OTHER), free=1, work={OTHER: 1}), node("b", has(THIRD), free=1)], Load("b", (30,)), id="idle leaves before busy"
        ),
        pytest.param(
            [node("a", has(OTHER), free=1, work={OTHER: 3}), node("b", has(THIRD), free=1, work={THIRD: 1})],
            Wait("b", (30,), "test/1 is loaded on b when test/3 has finished."),
            id="the fewest answers are waited for",
        ),
        pytest.param(
            [node("a", has(OTHER, is_movable=False), free=1), node("b", has(THIRD), free=1)], Load("b", (30,)), id="pinned ones stay"
        ),
        pytest.param([node("a", has(status="failed"), free=30), node("b", free=5)], Load("b"), id="not where it has just failed"),
        pytest.param([node("a", has(status="failed"))], Load("a"), id="the only one tries again"),
        pytest.param([node("a", free=20), node("b", work={M: 1})], Load("b"), id="where requests wait for its load already"),
        pytest.param(
            [node("a", free=5), node("b", has(OTHER), free=1, work={M: 1, OTHER: 1})], Load("a"), id="unless it can begin elsewhere"
        ),
        pytest.param([node("a", free=9, work={OTHER: 1}), node("b", has(OTHER), free=1)], Load("b", (20,)), id="not behind other loads"),
        pytest.param([node("a", has(OTHER, "waiting"), free=9), node("b", free=5)], Load("b"), id="nor behind what a person waits for"),
        pytest.param([node("a", state="cordoned"), node("b", has(OTHER), free=1)], Load("b"), id="cordoned loads nothing"),
        pytest.param([node("a", formats=frozenset({"mlx"})), node("b", formats=frozenset({"gguf"}))], Load("b"), id="an engine for it"),
        pytest.param([node("a", formats=frozenset({"mlx"}))], Load("a"), id="the only one says what it lacks"),
        pytest.param([node("a", state="draining")], None, id="all are leaving"),
        pytest.param([node("a", heartbeat_age_seconds=60)], None, id="all are dead"),
    ],
)
def test_loading(nodes: list[Node], expected: Placement | None) -> None:
    placement = go(nodes)
    assert isinstance(placement, Refuse) if expected is None else placement == expected


def test_one_at_a_time_prefers_a_node_where_nobody_has_to_leave() -> None:
    nodes = [node("a", has(OTHER), free=30), node("b", free=5)]
    assert go(nodes, auto_evict=AutoEvict.ON) == Load("b")
    assert go(nodes, auto_evict=AutoEvict.NEEDED) == Load("a")
    both = [node(name, has(OTHER, id=number, unused_seconds=number), free=30) for number, name in enumerate("ab")]
    assert go(both, auto_evict=AutoEvict.ON) == Load("b", (1,))
    assert isinstance(go([node("a", has(OTHER), free=1), node("b", free=1)], auto_evict=AutoEvict.OFF), Refuse)


def test_one_at_a_time_means_one_of_its_kind() -> None:
    both = [node("a", has(OTHER, is_embedding=True), has(THIRD), free=30), node("b", state="cordoned")]
    both.append(node("c", has(OTHER, is_embedding=True, id=7), has(THIRD, id=8), free=29))
    assert go(both, auto_evict=AutoEvict.ON) == Load("a", (30,))
    assert go(both, auto_evict=AutoEvict.ON, is_embedding=True) == Load("a", (20,))


@pytest.mark.parametrize(
    ("nodes", "fields", "words", "nearest"),
    [
        ([], {}, "No worker is running", ""),
        ([node("a", heartbeat_age_seconds=60)], {}, "No worker is running", ""),
        ([node("a", state="cordoned"), node("b", state="draining")], {}, "taken out of service", ""),
        ([node("a", free=1), node("b", has(OTHER), free=2)], {"needs": 9}, "needs about 9.00 GB of memory", "b"),
        ([node("a")], {"excluded": frozenset({"a"})}, "None of the workers could load test/1", ""),
    ],
)
def test_refusals_say_why(nodes: list[Node], fields: dict[str, Any], words: str, nearest: str) -> None:
    refused = go(nodes, **fields)
    assert isinstance(refused, Refuse)
    assert words in refused.reason
    assert refused.node == nearest


def test_the_estimate_is_asked_for_only_where_it_matters() -> None:
    def never() -> int:
        raise AssertionError

    assert place([node("a", has()), node("b")], Wanted(M, "test/1"), never) == Serve("a")
    assert load([node("a")], Wanted(M, "test/1"), never) == Load("a")
    assert serve([node("a")], Wanted(M, "test/1")) is None


def test_what_was_sent_to_a_node_counts_before_the_node_says_so() -> None:
    wanted = Wanted(M, "test/1")
    before = node("a", has(OTHER), free=1)
    after = with_request(before, Load("a", (20,)), wanted, 4 * GB)
    assert (after.free_bytes, [r.status for r in after.replicas], after.work) == (1 * GB, ["loading"], {M: 1})
    assert go([after, node("b", free=30)]) == Serve("a"), "the next request for it waits for the same load"
