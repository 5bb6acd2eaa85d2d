"""Actors come, go, come back and are turned away, over a real ROUTER; what they hold goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common import wire
from learner.config import LearnerConfig
from tests.counter import DIGEST, RUN, Actor, Counter


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    made = Counter(tmp_path)
    yield made
    made.close()


def test_a_late_result_of_an_expired_lease_is_welcome(tmp_path: Path) -> None:
    counter = Counter(
        tmp_path,
        LearnerConfig(groups_per_step=2, group_size=2, max_lag=0, heartbeat_s=0.05, lease_s=0.3),
    )
    try:
        counter.desk.announce(0)
        slow = counter.actor(capacity=1, name="slow")
        grant = slow.grants(1)[0]
        quick = counter.actor(capacity=8, name="quick", pid=2)
        again = next(
            g for g in iter(lambda: quick.hear(wire.Grant), None) if g.ticket.id == grant.ticket.id
        )
        assert again.attempt > grant.attempt
        assert slow.answer(grant) == "ack"
        assert quick.answer(again) == "duplicate"
    finally:
        counter.close()


def test_an_actor_that_vanishes_frees_its_tickets(counter: Counter) -> None:
    counter.desk.announce(0)
    gone = counter.actor(capacity=4, name="gone")
    ids = {grant.ticket.id for grant in gone.grants(4)}
    gone.socket.close(0)
    other = counter.actor(capacity=4, name="other", pid=2)
    assert {grant.ticket.id for grant in other.grants(4)} == ids


def test_an_actor_that_reconnects_keeps_what_it_holds_and_owes(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    grants = actor.grants(4)
    ids = [grant.ticket.id for grant in grants]
    again = Actor(counter.context, counter.endpoint)
    counter.actors.append(again)
    again.hello(4, run=RUN, held=tuple(ids[:2]), owed=(ids[2],))
    assert again.hear(wire.Welcome).forget == ()
    assert again.grants(1)[0].ticket.id == ids[3], "what it lost is leased anew"
    assert again.answer(grants[2]) == "ack"


def test_an_actor_is_told_to_forget_what_nobody_waits_for(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    grant = actor.grants(4)[0]
    actor.answer(grant)
    again = Actor(counter.context, counter.endpoint)
    counter.actors.append(again)
    again.hello(4, run=RUN, held=(grant.ticket.id, 999))
    assert again.hear(wire.Welcome).forget == (grant.ticket.id, 999)


@pytest.mark.parametrize(
    ("fields", "reason", "values"),
    [
        ({"protocol": 99}, "protocol", (str(wire.PROTOCOL), "99")),
        ({"digest": "other"}, "digest", (DIGEST, "other")),
    ],
)
def test_another_protocol_or_recipe_is_refused_with_both_values(
    counter: Counter, fields: dict[str, Any], reason: str, values: tuple[str, str]
) -> None:
    actor = Actor(counter.context, counter.endpoint)
    counter.actors.append(actor)
    actor.hello(1, **fields)
    refused = actor.hear(wire.Refused)
    assert (refused.reason, refused.ours, refused.theirs) == (reason, *values)


def test_an_actor_whose_results_are_invalid_again_and_again_is_quarantined(
    counter: Counter,
) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=1)
    for _ in range(2):
        grant = actor.grants(1)[0]
        actor.answer(grant, tokens=[[999], [5]])
    assert actor.hear(wire.Refused).reason == "quarantined"
    back = Actor(counter.context, counter.endpoint)
    counter.actors.append(back)
    back.hello(1)
    assert back.hear(wire.Refused).reason == "quarantined"


def test_thousands_of_credits_are_all_used_and_no_sign_of_a_dead_actor(tmp_path: Path) -> None:
    many = LearnerConfig(groups_per_step=3000, group_size=2, max_lag=0, heartbeat_s=0.05)
    counter = Counter(tmp_path, many)
    try:
        counter.desk.announce(0)
        actor = counter.actor(capacity=10_000)
        assert {grant.ticket.id for grant in actor.grants(3000)} == set(range(3000))
        assert counter.desk.look(lambda: counter.desk.counts["lost"]) == 0
    finally:
        counter.close()


def test_drain_ends_open_tickets_as_surplus_and_sends_everybody_away(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=4)
    actor.grants(4)
    counter.desk.drain(final=True, deadline_s=0.2)
    assert actor.hear(wire.Drain).final
    assert counter.ledger.sums()["main"].dropped == {"surplus": 4}


def test_no_more_tickets_than_the_credit(counter: Counter) -> None:
    counter.desk.announce(0)
    actor = counter.actor(capacity=3)
    grants = actor.grants(3)
    assert actor.hears_nothing_but_pulses()
    assert actor.answer(grants[0]) == "ack"
    assert len(actor.grants(1)) == 1
