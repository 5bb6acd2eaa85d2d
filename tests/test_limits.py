"""What one connection may cost: pure, with the time given."""

from __future__ import annotations

import pytest

from common import wire
from common.errors import WireError
from learner import limits
from learner.limits import STRANGERS, Limits

A, B = b"a", b"b"


def beat(held: int = 0) -> wire.Heartbeat:
    return wire.Heartbeat(capacity=1, held=tuple(range(held)))


def test_a_peer_that_is_wrong_now_and_then_always_hears_why() -> None:
    it = Limits()
    assert all(it.refuse(A, now) for now in range(1, 1000))
    assert not it.is_muted(A, 1000)


def test_a_peer_that_floods_is_told_a_few_times_then_counted_then_dropped_unread() -> None:
    it, told = Limits(), list[bool]()
    while not it.is_muted(A, 1.0):
        told.append(it.refuse(A, 1.0))
    assert sum(told) == limits.EXPLAINED
    assert len(told) == limits.EXPLAINED + limits.MUTED_AFTER + 1
    assert it.is_muted(A, limits.MUTED_S), "for a while"
    assert not it.is_muted(A, 2 + limits.MUTED_S)
    assert not it.is_muted(B, 1.0), "others are heard"


def test_strangers_are_always_read_for_one_of_them_may_be_an_actor() -> None:
    it = Limits()
    told = sum(it.refuse(STRANGERS, 1.0) for _ in range(5000))
    assert told == limits.EXPLAINED
    assert not it.is_muted(STRANGERS, 1.0)


def test_a_new_connection_begins_with_a_clean_account() -> None:
    it = Limits()
    while not it.is_muted(A, 1.0):
        it.refuse(A, 1.0)
    it.forget(A)
    assert not it.is_muted(A, 1.0)
    assert it.refuse(A, 1.0)


def test_heartbeats_by_the_thousand_are_refused_and_results_are_not() -> None:
    it = Limits()
    group = wire.Group(ticket=1, attempt=0, kind="main", problem="p", rollouts=())
    for _ in range(20_000):
        it.check(A, group, 1.0)
    for _ in range(int(limits.TALK)):
        it.check(A, beat(), 1.0)
    with pytest.raises(WireError, match="rate"):
        it.check(A, beat(), 1.0)
    it.check(A, beat(), 10.0)


def test_a_list_of_tickets_longer_than_anybody_can_hold_is_refused() -> None:
    it = Limits()
    it.check(A, beat(limits.MOST_HELD), 1.0)
    with pytest.raises(WireError, match="outstanding"):
        it.check(A, beat(limits.MOST_HELD + 1), 1.0)


def test_what_is_no_result_is_short() -> None:
    it = Limits()
    it.check(A, beat(), 1.0, limits.MOST_SAID)
    with pytest.raises(WireError, match="oversized"):
        it.check(A, beat(), 1.0, limits.MOST_SAID + 1)
    group = wire.Group(ticket=1, attempt=0, kind="main", problem="p", rollouts=())
    it.check(A, group, 1.0, 1 << 30)


@pytest.mark.parametrize("name", ["", "a\n12:00:00 learner I all is well", "a" * 201, "\x1b[2J"])
def test_a_name_is_a_word_or_two_in_one_line(name: str) -> None:
    hello = wire.Hello(protocol=1, digest="d", actor=name, capacity=1)
    with pytest.raises(WireError, match="name"):
        Limits().check(STRANGERS, hello, 1.0)


def test_results_that_nobody_waits_for_are_talk() -> None:
    it = Limits()
    for _ in range(int(limits.TALK)):
        it.talk(A, 1.0)
    with pytest.raises(WireError, match="rate"):
        it.talk(A, 1.0)


def test_the_desk_rests_after_a_turn_that_was_mostly_waste() -> None:
    it = Limits()
    it.refuse(A, 1.0)
    assert it.rest_ms() == 0
    for _ in range(limits.WASTE):
        it.waste()
    assert it.flooded, "and reads no more in that turn"
    assert it.rest_ms() == limits.REST_MS
    assert it.rest_ms() == 0, "one turn at a time"
