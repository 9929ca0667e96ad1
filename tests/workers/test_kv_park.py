"""States of ended sequences: which are kept, and which leave."""

from __future__ import annotations

from tests.workers.engines import GREEDY
from workers.engines.base import Sequence
from workers.engines.kv_park import MAX_STATES, KvPark, Parked


def state(number: int, size: int = 10, length: int = 50) -> Parked:
    return Parked([number] * length, "a", 0, bytearray(size))


def asking(number: int, owner: str = "a") -> Sequence:
    return Sequence(id="x", owner=owner, prompt=[number] * 60, shared_prefix=0, sampling=GREEDY, limit=8)


def kept(park: KvPark, numbers: range) -> list[int]:
    return [number for number in numbers if park.find(asking(number), whole=True)]


def test_bytes_are_bounded_and_what_was_used_last_stays() -> None:
    park = KvPark(limit_bytes=40)
    for number in range(4):
        park.add(state(number))
    assert park.find(asking(0), whole=True)
    park.add(state(4))
    assert kept(park, range(5)) == [0, 2, 3, 4]
    assert park.used_bytes == 40
    park.add(state(5, size=41))
    assert kept(park, range(6)) == [0, 2, 3, 4]


def test_a_state_takes_the_place_of_those_that_it_extends() -> None:
    park = KvPark(limit_bytes=1000)
    park.add(state(1))
    park.add(state(1, size=20, length=55))
    assert park.used_bytes == 20
    park.add(Parked([1] * 58, "b", 0, bytearray(20)))  # somebody else's
    assert park.used_bytes == 40
    assert park.find(asking(1, owner="c"), whole=True) is None


def test_the_number_of_states_is_bounded() -> None:
    park = KvPark(limit_bytes=10**9)
    for number in range(MAX_STATES + 3):
        park.add(state(number))
    assert park.used_bytes == 10 * MAX_STATES
    assert kept(park, range(5)) == [3, 4]
